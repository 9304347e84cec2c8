# SPDX-License-Identifier: Apache-2.0
"""Pose by the command line: videos, and people who are not as they should be."""

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.test_pose import person, whole, written
from film import COLOURS, SIDES, filmed
from tiny_recipe import Told, tutelage
from tutelage.run.distill import distill
from tutelage.run.recipe import Recipe, parse

CAPSYS = pytest.CaptureFixture[str]


def recipe(root: Path, **data: Any) -> Recipe:
    return parse(
        {
            "task": "pose",
            "student": {"model": "tutelage:rtmpose_t", "widen": 0.125, "stages": 3, "hidden": 32, "s": 16},
            "data": {"source": f"coco:{root}", "image_size": [64, 48], "batch_size": 2, **data},
            "train": {"steps": 2, "save_every": None},
        }
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of two steps, and the set it saw."""
    home = tmp_path_factory.mktemp("pose")
    written(home / "set", [person(1, 1), person(2, 2)])
    written(home / "set", [person(3, 1), person(4, 2)], "person_keypoints_val.json")
    distill(recipe(home / "set"), home / "run", quiet=True)
    return home


def test_a_video_is_looked_at_frame_by_frame(capsys: CAPSYS, run: Path) -> None:
    filmed(Path("walk.mp4"), 3)
    told = tutelage(capsys, "predict", run / "run", "walk.mp4", "--out", "drawn", "--openpose", "--json")
    assert (told.code, told.err) == (0, [])
    names = [f"walk.mp4/walk-{number:06d}.png" for number in range(3)]
    assert [row["image"] for row in told.document["images"]] == names
    assert json.loads(Path("drawn/answers.json").read_text()) == told.document["images"]
    rows = json.loads(Path("drawn/coco.json").read_text())
    assert [row["image_id"] for row in rows] == [Path(name).stem for name in names]
    assert all(len(row["keypoints"]) == 3 * 18 for row in rows), "OpenPose's order has a neck"
    for number, name in enumerate(names):
        drawing = told.document["drawings"][name]
        assert drawing == f"drawn/{Path(name).stem}.png"
        with Image.open(drawing) as picture:
            assert picture.size == SIDES
            assert np.abs(np.asarray(picture)[0, 0].astype(float) - COLOURS[number]).max() < 40


def test_people_of_a_video_are_looked_for_in_the_boxes_of_a_detector(capsys: CAPSYS, run: Path) -> None:
    filmed(Path("walk.mp4"), 2)
    found = [{"image": "walk.mp4/walk-000001.png", "boxes": [[5, 5, 30, 40], [30, 5, 60, 40]], "scores": [0.9, 0.8]}]
    Path("boxes.json").write_text(json.dumps(found))
    told = tutelage(capsys, "predict", run / "run", "walk.mp4", "--boxes", "boxes.json", "--json")
    assert [len(row["people"]) for row in told.document["images"]] == [1, 2]


def test_a_video_without_its_reader_is_one_line(capsys: CAPSYS, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filmed(Path("walk.mp4"), 2)
    Path("damaged.mp4").write_bytes(b"no video")
    told = tutelage(capsys, "predict", run / "run", "damaged.mp4")
    assert (told.code, len(told.err)) == (2, 1)
    assert told.err[0].startswith("tutelage: damaged.mp4 cannot be read as a video: ")
    monkeypatch.setitem(sys.modules, "av", None)
    told = tutelage(capsys, "predict", run / "run", "walk.mp4")
    said = "walk.mp4: reading videos needs PyAV: pip install 'tutelage[video]', or give a folder of its frames"
    assert (told.code, told.err) == (2, [f"tutelage: {said}"])


# --- people who are not as they should be ----------------------------------------------------------------------


def said(told: Told) -> str:
    """Return the one line of a command that was refused."""
    assert (told.code, told.out, len(told.err)) == (2, [], 1), told
    assert told.err[0].startswith("tutelage: ")
    return told.err[0]


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ([], "holds no annotations"),
        ([person(1, 1, keypoints=[0] * 51)], "nobody in it has a visible keypoint (1 of 1 have none)"),
        ([person(1, 1, bbox=[200, 5, 30, 45])], "1 boxes outside their image (first annotation 1); nobody with a"),
        (
            [person(1, 1), person(2, 2, bbox=[60, 5, 60, 45])],
            "1 boxes over an edge (first annotation 2); data.on_error:",
        ),
        ([person(1, 1), person(2, 2, bbox=[9, 9, 0, 9])], "1 boxes without area (first annotation 2); data.on_error:"),
        ([person(1, 1), person(2, 2, keypoints=[1, 2, 2])], "1 people whose keypoints are not 17 (first annotation 2"),
        ([person(1, 1), person(2, 2, keypoints=[float("nan")] * 51)], "1 keypoints that are no numbers (first"),
        ([person(1, 1), person(2, 2, area=float("nan"))], "1 people whose area is no positive number (first"),
    ],
)
def test_a_set_that_cannot_be_learned_from_or_scored_on_is_one_line(
    capsys: CAPSYS, run: Path, rows: list[dict[str, Any]], line: str
) -> None:
    root = written(Path("set"), rows)
    written(root, [person(3, 1)], "person_keypoints_val.json")
    Path("recipe.yaml").write_text(recipe(root).text())
    assert line in said(tutelage(capsys, "train", "recipe.yaml", "--out", "never"))
    assert not Path("never").exists()
    assert line in said(tutelage(capsys, "evaluate", run / "run", "--data", f"coco:{root}"))


def test_what_can_be_left_out_is_and_no_score_is_nan(capsys: CAPSYS, run: Path) -> None:
    """Of a person with one keypoint, of one in a crowd, of boxes that are cut, and of nothing but these to score on."""
    one = [20.0, 20.0, 2, *[0.0] * 48]
    rows = [person(1, 1, keypoints=one), person(2, 2, bbox=[60, 5, 60, 45]), person(3, 2, bbox=[9, 9, 0, 9])]
    root = written(Path("set"), rows)
    written(root, [person(4, 1, keypoints=one), person(5, 2, iscrowd=1)], "person_keypoints_val.json")
    Path("recipe.yaml").write_text(recipe(root, on_error="skip").text())
    told = tutelage(capsys, "train", "recipe.yaml", "--out", "run", "--json")
    assert told.code == 0
    again = tutelage(capsys, "evaluate", "run", "--json")
    for scores in (told.document["scores"], again.document):
        assert {"ap", "oks", "loss"} <= set(scores)
        assert all(math.isfinite(value) for value in scores.values())
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(value) for record in records for value in record.values() if isinstance(value, float))


def test_keypoints_of_another_set_are_refused(capsys: CAPSYS, run: Path) -> None:
    root = written(Path("set"), [whole(n, 1) for n in range(4)], "coco_wholebody_train_v1.0.json")
    line = said(tutelage(capsys, "evaluate", run / "run", "--data", f"wholebody:{root}"))
    assert "17" in line
    assert "133" in line


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ({}, "is neither COCO results nor a detector's answers, both lists of rows"),
        (
            [{"image_id": 1, "bbox": [1, 2, 3]}],
            "row 0 of boxes.json is none of COCO results or of a detector's answers",
        ),
        ([{"image_id": 1, "bbox": [float("nan")] * 4}], "(a box or a score is no number)"),
    ],
)
def test_boxes_that_are_none_are_one_line(capsys: CAPSYS, run: Path, rows: Any, line: str) -> None:
    Path("boxes.json").write_text(json.dumps(rows))
    image = run / "set" / "000000000001.jpg"
    assert line in said(tutelage(capsys, "predict", run / "run", image, "--boxes", "boxes.json"))
    given = recipe(run / "set", pose={"boxes": "boxes.json"})
    Path("recipe.yaml").write_text(given.text())
    assert line in said(tutelage(capsys, "train", "recipe.yaml", "--out", "never"))


def test_a_person_beyond_the_image_is_looked_for_all_the_same(capsys: CAPSYS, run: Path) -> None:
    boxes = [[500, 500, 30, 40], [5, 5, 0, 4], [-20, -20, 40, 50]]
    Path("boxes.json").write_text(json.dumps([{"image_id": 1, "bbox": box, "score": 0.9} for box in boxes]))
    image = run / "set" / "000000000001.jpg"
    told = tutelage(capsys, "predict", run / "run", image, "--boxes", "boxes.json", "--json")
    assert told.code == 0
    assert len(told.document["images"][0]["people"]) == 2, "a box without area is nobody's"
    assert not {"NaN", "Infinity"} & set(re.findall(r"\w+", "".join(told.out)))
