# SPDX-License-Identifier: Apache-2.0
"""From a folder of photographs to a student that is handed over, as a newcomer would."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file

from photos import photos
from tiny_recipe import Told, metrics, tutelage
from tutelage.data.augment import build
from tutelage.data.folder import read_image

CAPSYS = pytest.CaptureFixture[str]
MODELS = ("--teacher", "timm:test_resnet", "--student", "timm:test_efficientnet")
SHORT = ("--set", "train.steps=2", "--set", "data.batch_size=8", "--set", "data.image_size=32")


def distilled(capsys: CAPSYS, *more: str) -> Told:
    return tutelage(capsys, "distill", *MODELS, "--data", "photos", "--method", "kd", *SHORT, "--out", "run", *more)


# --- the newcomer's path -----------------------------------------------------------------------------------------


def test_a_folder_becomes_a_student_that_plain_timm_and_onnx_runtime_load(capsys: CAPSYS) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    photos(Path("photos"))
    told = distilled(capsys)
    assert told.code == 0
    assert told.err[:3] == [
        "3 classes (cat, dog, owl): 21 images to learn from, 3 to validate on (10 % of each class, held out)",
        "training images: random resized crop, flip (data.augment)",
        "timm:test_resnet has no weights: it is fitted to the data first, 2 steps (teacher.fit)",
    ]
    assert told.err[-1] == "2 steps, a few seconds"
    assert told.out[-2:] == ["run/student.safetensors", "run/report.html"]
    assert [line.split()[0] for line in told.out[:-3]] == ["top1", "loss", "ece", "agreement"]
    resolved = yaml.safe_load(Path("run/recipe.yaml").read_text())
    assert resolved["teacher"]["fit"]["train"] == {"steps": 2, "seed": 0}
    assert yaml.safe_load(Path("run/asked.yaml").read_text())["teacher"]["fit"]["when"] == "auto"
    assert Path("run/teacher/student.safetensors").exists()

    image = "photos/cat/0.jpg"
    told = tutelage(capsys, "predict", "run", image, "--json")
    (seen,) = told.document["images"]
    assert sum(seen["probabilities"]) == pytest.approx(1.0, abs=1e-5)
    resized = build(None, train=False, size=32)
    assert resized is not None
    pixels = resized(read_image(Path(image), 3)[None], torch.zeros(1, dtype=torch.long)) / 255
    wanted = dict(zip(seen["classes"], seen["probabilities"], strict=True))
    expected = torch.tensor([wanted[name] for name in ("cat", "dog", "owl")])

    assert tutelage(capsys, "export", "run", "--to", "safetensors").out == ["run/exported.safetensors: 0.42 MB"]
    plain = timm.create_model("test_efficientnet", checkpoint_path="run/exported.safetensors", num_classes=3).eval()
    mean, std = (torch.tensor(plain.pretrained_cfg[word]).view(1, 3, 1, 1) for word in ("mean", "std"))
    with torch.no_grad():
        assert plain((pixels - mean) / std).softmax(1)[0] == pytest.approx(expected, abs=1e-5)

    told = tutelage(capsys, "export", "run", "--to", "onnx")
    assert told.code == 0
    assert told.out[1].startswith("largest difference from PyTorch on the same pixels: ")
    session = runtime.InferenceSession("run/student.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"pixels": np.concatenate([pixels.numpy()] * 3)})  # any number of images
    assert torch.from_numpy(logits).softmax(1)[2] == pytest.approx(expected, abs=1e-4)


def test_the_same_command_goes_on_and_then_says_that_it_is_done(capsys: CAPSYS) -> None:
    photos(Path("photos"))
    first = distilled(capsys)
    again = distilled(capsys)
    assert again.err == ["run holds this run, finished; remove the folder to run it again"]
    assert again.out == first.out
    assert distilled(capsys, "--set", "optimizer.lr=0.5").code == 2


def test_a_teacher_with_weights_is_not_fitted(capsys: CAPSYS) -> None:
    photos(Path("photos"))
    torch.manual_seed(0)
    state = timm.create_model("test_resnet", num_classes=3).state_dict()
    save_file({key: value.contiguous() for key, value in state.items()}, "teacher.safetensors")
    told = distilled(capsys, "--set", "teacher.weights=teacher.safetensors")
    assert told.code == 0
    assert not any("fitted" in line for line in told.err)
    assert not Path("run/teacher").exists()


def test_a_body_with_other_classes_is_fitted_with_a_new_last_layer(capsys: CAPSYS) -> None:
    photos(Path("photos"))
    torch.manual_seed(0)
    state = timm.create_model("test_resnet", num_classes=7).state_dict()
    save_file({key: value.contiguous() for key, value in state.items()}, "seven.safetensors")
    told = distilled(capsys, "--set", "teacher.weights=seven.safetensors", "--set", "optimizer.lr=1e-9")
    assert told.code == 0
    assert told.err[2] == (
        "timm:test_resnet tells 7 classes apart, the data has 3: it is fitted to the data first from its weights, "
        "with a new last layer, 1 step (teacher.fit)"
    )
    fitted = timm.create_model("test_resnet", checkpoint_path="run/teacher/student.safetensors", num_classes=3)
    assert torch.allclose(fitted.conv1[0].weight, state["conv1.0.weight"], atol=1e-6)


def test_the_fit_can_be_refused(capsys: CAPSYS) -> None:
    photos(Path("photos"))
    told = distilled(capsys, "--no-fit-teacher")
    assert told.code == 2
    assert told.err[-1] == (
        "tutelage: teacher: timm:test_resnet has no weights, and --no-fit-teacher (teacher.fit: never) forbids to fit "
        "it to the data; give other teacher.weights"
    )
    assert not Path("run").exists()


# --- bad images and folders ----------------------------------------------------------------------------------------


def train(capsys: CAPSYS, *more: str) -> Told:
    return tutelage(
        capsys, "train", "--student", "timm:test_efficientnet", "--data", "photos", *SHORT, "--out", "run", *more
    )


def test_an_unreadable_image_in_an_epoch(capsys: CAPSYS) -> None:
    photos(Path("photos"))
    Path("photos/cat/3.png").write_text("no image")
    told = train(capsys, "--set", "train.steps=3")
    assert told.code == 2
    assert told.err[-1] == ("tutelage: photos/cat/3.png: no image; data.on_error: skip leaves such samples out")
    told = train(capsys, "--set", "train.steps=3", "--set", "data.on_error=skip", "--out", "skipping")
    assert told.code == 0
    assert told.err[-1] == "training: 1 image was skipped as unreadable, such as photos/cat/3.png (no image)"
    assert metrics("skipping", "train")[-1]["step"] == 3


def test_an_empty_class(capsys: CAPSYS) -> None:
    photos(Path("photos"))
    Path("photos/newt").mkdir()
    told = train(capsys)
    assert (told.code, len(told.err)) == (2, 1)
    assert told.err[0].startswith("tutelage: class 'newt' is empty: no image in photos/newt (")


def test_a_class_missing_from_validation(capsys: CAPSYS) -> None:
    photos(Path("photos/train"))
    photos(Path("photos/val"), 2, classes=("owl", "cat"), skip=20)
    told = train(capsys)
    assert (told.code, told.err) == (2, ["tutelage: photos/val lacks 1 of 3 classes: dog"])


def test_a_label_out_of_range(capsys: CAPSYS) -> None:
    row = bytes(3 * 32 * 32)
    for number in range(1, 6):
        Path(f"data_batch_{number}.bin").write_bytes(b"".join(bytes([label]) + row for label in range(10)))
    Path("test_batch.bin").write_bytes(bytes([3]) + row + bytes([11]) + row)
    told = tutelage(capsys, "train", "--student", "tutelage:resnet8", "--data", "cifar10:.", *SHORT, "--out", "run")
    said = "tutelage: test_batch.bin: image 1 has class 11, out of range: the classes are 0 to 9"
    assert (told.code, told.err) == (2, [said])
    assert not Path("run").exists()


def test_validation_images_that_are_also_training_images(capsys: CAPSYS) -> None:
    photos(Path("photos/train"))
    photos(Path("photos/val"), 2, skip=20)
    copied = Path("photos/val/cat/same.jpg")
    copied.write_bytes(Path("photos/train/cat/0.jpg").read_bytes())
    told = train(capsys)
    assert told.code == 2
    assert told.err[-1] == (
        "tutelage: 1 of 7 validation images are also training images, so scores would flatter: "
        "photos/val/cat/same.jpg is photos/train/cat/0.jpg; remove them, or set data.allow_duplicates: true"
    )
    assert train(capsys, "--set", "data.allow_duplicates=true").code == 0


def test_a_teacher_of_other_classes_in_a_recipe(capsys: CAPSYS) -> None:
    photos(Path("photos"))
    sections = {
        "student": "timm:test_efficientnet",
        "data": {"source": "photos", "image_size": 32, "augment": "none"},
        "objective": {"task": 0.5, "kd": 0.5},
        "train": {"steps": 1},
    }
    state = timm.create_model("test_resnet", num_classes=7).state_dict()
    save_file({key: value.contiguous() for key, value in state.items()}, "seven.safetensors")
    for weights, said in (
        ("pretrained", "timm:test_resnet tells 1000 classes apart, the data has 3"),
        ("seven.safetensors", "weights: seven.safetensors are for 7 classes, and 3 are wanted"),
    ):
        teacher = {"model": "timm:test_resnet", "weights": weights}
        Path("recipe.yaml").write_text(yaml.safe_dump({**sections, "teacher": teacher}))
        told = tutelage(capsys, "distill", "recipe.yaml")
        assert (told.code, told.err) == (
            2,
            [f"tutelage: teacher: {said}: teacher.fit: auto fits it to the data first"],
        )
    assert not Path("runs").exists()


def test_classes_in_another_order(capsys: CAPSYS) -> None:
    photos(Path("photos"))
    assert train(capsys).code == 0
    card = json.loads(Path("run/student.json").read_text())
    card["class_names"] = ["dog", "cat", "owl"]
    Path("run/student.json").write_text(json.dumps(card))
    more = ("--teacher", "run:run", "--student", "timm:test_efficientnet", "--data", "photos", *SHORT)
    told = tutelage(capsys, "distill", *more, "--out", "other")
    assert told.code == 2
    assert told.err[-1] == (
        "tutelage: the teacher's classes (dog, cat, owl) are not the data's (cat, dog, owl), or lie in another order"
    )


def test_the_student_of_a_run_with_other_classes_is_no_teacher(capsys: CAPSYS) -> None:
    photos(Path("photos"))
    assert train(capsys).code == 0
    photos(Path("more"), 4, classes=("ant", "bee"))
    more = ("--teacher", "run:run", "--student", "timm:test_efficientnet", "--data", "more", *SHORT)
    told = tutelage(capsys, "distill", *more, "--out", "other")
    assert told.code == 2
    assert told.err[-1] == (
        "tutelage: teacher: run:run tells 3 classes apart, the data has 2; the student of a run cannot be fitted to "
        "other classes"
    )
