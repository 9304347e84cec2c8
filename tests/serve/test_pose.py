# SPDX-License-Identifier: Apache-2.0
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from film import COLOURS, SIDES, filmed
from tutelage.core import Batch
from tutelage.core.keypoints import BODY, WHOLEBODY
from tutelage.data.load import load as load_data
from tutelage.export.student import export
from tutelage.functional import openpose
from tutelage.models.load import load
from tutelage.models.poses.onnx import OnnxPose
from tutelage.serve.pose import PeopleDetector, PoseModel, TwoStage, drawn, frames, links, main, results
from tutelage.serve.simcc import whole
from tutelage.tasks.pose import Pose

SIZE = (64, 48)
DATA: dict[str, Any] = {"source": "figures", "image_size": list(SIZE), "pose": {"number": 4, "held_out": 4}}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    data = load_data({**DATA, "batch_size": 4}, task="pose", seed=0)
    spec = {"model": "tutelage:rtmpose_t", "widen": 0.125, "stages": 3, "hidden": 32, "s": 16}
    model = load(spec, **data.model_facts(), seed=0)
    path = tmp_path_factory.mktemp("onnx") / "pose.onnx"
    export(model, path, "onnx", size=SIZE)
    return model, path


class RawDetector(nn.Module):
    """Answers as YOLOX does for an input of 64 x 64: one person in the cell (4, 3) of stride 8, and little else."""

    def forward(self, pixels: Tensor) -> Tensor:
        raw = torch.zeros(1, 84, 7)
        raw[0, 3 * 8 + 4] = torch.tensor([0.5, 0.5, 1.3, 1.6, 0.9, 0.95, 0.1])
        return raw + 0 * pixels.mean()


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("detector") / "yolox.onnx"
    program = torch.onnx.export(
        RawDetector().eval(), (torch.zeros(1, 3, 64, 64),), input_names=["images"], dynamo=True, verbose=False
    )
    assert program is not None
    program.save(str(path))
    return path


def test_it_answers_as_the_student_does(student: tuple[Any, Path]) -> None:
    model, path = student
    data = load_data({**DATA, "batch_size": 4}, task="pose", seed=0)
    samples: Any = data.validation.samples
    batch: Batch = next(data.validation.epoch(0))
    task = Pose(133, flip=False)
    with torch.no_grad():
        expected, scores = task.points(model(batch.inputs), batch)
    engine = PoseModel(path)
    for row in range(len(batch)):
        image = samples.read(row).image.permute(1, 2, 0).numpy()
        points, own = engine(image, batch.extra["box"][row : row + 1].numpy())
        assert own[0] == pytest.approx(scores[row].numpy(), abs=0.05)
        near = np.abs(points[0] - expected[row].numpy()).max(1) < 1.5
        assert near.mean() > 0.9, "crops differ by the rounding of a grey level"


def test_the_two_stages_and_their_speed(student: tuple[Any, Path], detector: Path) -> None:
    engine = TwoStage(PoseModel(student[1]), PeopleDetector(detector))
    image = np.random.default_rng(0).integers(0, 255, (128, 96, 3), dtype=np.uint8)
    points, scores, boxes = engine(image)
    assert points.shape == (1, 133, 2)
    assert scores.shape == (1, 133)
    # the centre (4.5, 3.5) * 8 and sides exp(1.3) * 8 and exp(1.6) * 8, twice as large in the image
    half = 8 * np.exp([1.3, 1.6])
    assert boxes[0] == pytest.approx([72 - half[0], 56 - half[1], 72 + half[0], 56 + half[1]], rel=1e-5)
    assert engine.speed.startswith("1 images, ")
    nobody = PeopleDetector(detector, least=0.99)
    assert TwoStage(PoseModel(student[1]), nobody)(image)[2].tolist() == whole(image).tolist()


def test_a_detector_of_this_library_finds_the_people(student: tuple[Any, Path], tmp_path: Path) -> None:
    """Its export answers for one image: rows of score 0 stand for nothing, and labels are numbers of classes."""

    class Settled(nn.Module):
        def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            boxes = torch.tensor([[8.0, 4, 40, 60], [0, 0, 9, 9], [1, 1, 2, 2]]) + 0 * pixels.mean()
            return boxes, torch.tensor([0.9, 0.8, 0.0]) * pixels.amax((0, 1, 2, 3)), torch.tensor([2, 1, 2])

    names = ["boxes", "scores", "labels"]
    program = torch.onnx.export(
        Settled().eval(), (torch.zeros(1, 3, 64, 64),), input_names=["pixels"], output_names=names, dynamo=True
    )
    assert program is not None
    program.save(str(tmp_path / "detector.onnx"))
    image = np.full((128, 128, 3), 255, np.uint8)
    assert PeopleDetector(tmp_path / "detector.onnx", person=2)(image).tolist() == [[16, 8, 80, 120]]
    with pytest.raises(ValueError, match="is no detector"):
        PeopleDetector(student[1])


def test_images_of_a_folder_are_drawn_and_written(
    student: tuple[Any, Path], detector: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("000000000042", "b"):
        Image.new("RGB", (96, 128), (40, 80, 120)).save(folder / f"{name}.png")
    (folder / "broken.jpg").write_bytes(b"no image")
    assert (
        main([str(student[1]), str(folder), "--detector", str(detector), "--out", str(tmp_path / "o"), "--openpose"])
        == 0
    )
    said = capsys.readouterr()
    assert "2 people; 2 images, " in said.out
    assert "a second" in said.out
    assert "broken.jpg" in said.err
    rows = json.loads((tmp_path / "o" / "coco.json").read_text())
    assert [row["image_id"] for row in rows] == [42, "b"]
    assert len(rows[0]["keypoints"]) == 3 * 134
    assert (tmp_path / "o" / "b.png").is_file()


def test_pytorch_is_not_imported(student: tuple[Any, Path], tmp_path: Path) -> None:
    Image.new("RGB", (60, 80)).save(tmp_path / "one.png")
    code = (
        "import sys; from tutelage.serve.pose import main; "
        f"code = main([{str(student[1])!r}, {str(tmp_path / 'one.png')!r}]); "
        "sys.exit(code or 10 * ('torch' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "1 people; 1 images" in done.stdout


@pytest.mark.parametrize(
    ("pose", "images", "said"),
    [
        ("none.onnx", "one.png", "no file .*none.onnx"),
        ("broken.onnx", "one.png", "broken.onnx cannot be read"),
        ("yolox", "one.png", "is no pose model"),
        ("pose", "nothing", "no images in"),
        ("pose", "a.mp4", "reading videos needs PyAV: pip install 'tutelage\\[video\\]'"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    student: tuple[Any, Path],
    detector: Path,
    tmp_path: Path,
    pose: str,
    images: str,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    Image.new("RGB", (60, 80)).save(tmp_path / "one.png")
    (tmp_path / "broken.onnx").write_bytes(b"nothing")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "a.mp4").write_bytes(b"")
    file = {"pose": student[1], "yolox": detector}.get(pose, tmp_path / pose)
    assert main([str(file), str(tmp_path / images)]) == 2
    assert re.search(said, capsys.readouterr().err)


def test_drawings_change_where_a_limb_is() -> None:
    points, scores = np.zeros((1, 17, 2)), np.zeros((1, 17))
    points[0, 5], points[0, 7], scores[0, [5, 7]] = (10, 30), (50, 30), 0.9
    image = np.zeros((64, 64, 3), np.uint8)
    found = np.asarray(drawn(image, points, scores, links(17)))
    assert found[30, 30].any()
    assert not found[:20].any()
    assert not image.any()


def test_lines_are_those_of_the_layouts() -> None:
    assert set(links(17)) == set(BODY.links)
    assert set(links(133)) == set(WHOLEBODY.links)
    assert links(133, neck=True) == openpose.links(WHOLEBODY.links)


def test_rows_are_coco_results() -> None:
    row = results("7", np.ones((1, 2, 2)), np.array([[0.1, 0.5]]), np.array([[1.0, 2, 4, 8]]))[0]
    assert row == {
        **{"image_id": 7, "category_id": 1, "keypoints": [1.0, 1.0, 0.1, 1.0, 1.0, 0.5], "score": 0.5},
        "bbox": [1.0, 2.0, 3.0, 6.0],
    }


def test_a_video_is_drawn_and_written(
    student: tuple[Any, Path], detector: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filmed(tmp_path / "walk.mp4", 3)
    command = [str(student[1]), str(tmp_path / "walk.mp4"), "--detector", str(detector), "--out", str(tmp_path / "o")]
    assert main(command) == 0
    assert "3 people; 3 images, " in capsys.readouterr().out
    names = [f"walk-{number:06d}" for number in range(3)]
    assert [row["image_id"] for row in json.loads((tmp_path / "o" / "coco.json").read_text())] == names
    for number, name in enumerate(names):
        with Image.open(tmp_path / "o" / f"{name}.png") as picture:
            assert picture.size == SIDES
            found = np.asarray(picture)[0, 0].astype(float)
        assert np.abs(found - COLOURS[number]).max() < 40, "the frame itself lies under the drawing"
    (tmp_path / "damaged.mp4").write_bytes(b"no video")
    assert main([str(student[1]), str(tmp_path / "damaged.mp4")]) == 2
    assert "damaged.mp4 cannot be read as a video" in capsys.readouterr().err


def test_frames_come_in_order(tmp_path: Path) -> None:
    for name in ("b", "a"):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
    assert [name for name, _ in frames(tmp_path)] == ["a", "b"]


def test_an_onnx_file_is_a_model_that_can_be_scored(student: tuple[Any, Path]) -> None:
    data = load_data({**DATA, "batch_size": 4}, task="pose", seed=0)
    spec = {"model": "tutelage:onnx", "file": str(student[1]), "input": {"mean": [], "std": []}}
    model = load(spec, **data.model_facts())
    assert isinstance(model.module, OnnxPose)
    batch = next(data.validation.epoch(0))
    with torch.no_grad():
        expected = student[0](batch.inputs)
    assert torch.allclose(model(batch.inputs)[0], expected[0], atol=1e-4)
    scores = Pose(133).score([(model(batch.inputs), batch)])
    assert 0 <= scores["ap"] <= 1
