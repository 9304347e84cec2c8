# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from photos import photos
from tiny_recipe import recipe, tutelage

CAPSYS = pytest.CaptureFixture[str]
TRAIN = ("train", "--student", "tutelage:resnet8", "--data", "photos", "--set", "train.steps=6", "--out", "run")


@pytest.fixture
def run(capsys: CAPSYS) -> str:
    photos(Path("photos"))
    assert tutelage(capsys, *TRAIN, "--set", "data.batch_size=8").code == 0
    return "run"


def test_every_image_gets_its_likeliest_classes(capsys: CAPSYS, run: str) -> None:
    told = tutelage(capsys, "predict", run, "photos/cat", "photos/dog/0.jpg", "--top", "2")
    assert (told.code, told.err) == (0, [])
    rows = [line.split() for line in told.out if line.strip().startswith("photos")]
    assert [row[0] for row in rows] == [f"photos/cat/{n}.{'png' if n % 2 else 'jpg'}" for n in range(8)] + [
        "photos/dog/0.jpg"
    ]
    for _, first, chance, second, other in rows:
        assert {first, second} < {"cat", "dog", "owl"}
        assert 100 >= float(chance) >= float(other) >= 0


def test_predictions_agree_with_the_evaluation(capsys: CAPSYS, run: str) -> None:
    """The images of the validation split, one by one, score what `evaluate` says."""
    told = tutelage(capsys, "evaluate", run, "--json")
    from tutelage.data.load import load as load_data

    held_out = load_data({"source": "photos", "image_size": 32}).validation.samples
    names = [held_out.name(number) for number in range(len(held_out))]
    seen = tutelage(capsys, "predict", run, *names, "--json").document["images"]
    right = [one["classes"][0] == Path(one["path"]).parent.name for one in seen]
    assert sum(right) / len(right) == pytest.approx(told.document["top1"])
    chances = [dict(zip(one["classes"], one["probabilities"], strict=True)) for one in seen]
    likelihood = [chance[Path(name).parent.name] for chance, name in zip(chances, names, strict=True)]
    assert -torch.tensor(likelihood).log().mean() == pytest.approx(told.document["loss"], abs=1e-4)


def test_files_that_cannot_be_read_are_named(capsys: CAPSYS, run: str) -> None:
    Path("photos/cat/bad.png").write_text("no image")
    told = tutelage(capsys, "predict", run, "photos/cat", "--json")
    assert told.code == 2
    assert told.err == [
        "cannot read photos/cat/bad.png: no image",
        "tutelage: 1 of 9 files could not be read; --skip lets them pass",
    ]
    assert len(told.document["images"]) == 8
    assert told.document["unreadable"] == {"photos/cat/bad.png": "no image"}
    assert tutelage(capsys, "predict", run, "photos/cat", "--skip").code == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run", "nowhere"), "no file or folder nowhere"),
        (("run", "."), "no image below ."),
        (("timm:test_resnet", "a.png"), "timm:test_resnet has random weights and would only guess: give --weights"),
        (
            ("timm:test_resent", "a.png", "--weights", "w"),
            "unknown model 'timm:test_resent'; did you mean test_resnet?",
        ),
        (("run", "a.png", "--top", "0"), "--top must be at least 1, not 0"),
        (
            ("timm:test_resnet", "a.png", "--task", "detectoin"),
            "task: unknown task 'detectoin'; did you mean detection?",
        ),
    ],
)
def test_bad_input(capsys: CAPSYS, arguments: tuple[str, ...], said: str) -> None:
    photos(Path("dark"), 1)
    Path("dark/cat/0.jpg").rename("a.png")
    for path in Path("dark").glob("*/*"):
        path.unlink()
    if arguments[1] == ".":
        Path("a.png").unlink()
    told = tutelage(capsys, "predict", *arguments)
    assert told.code == 2
    assert told.err[0].startswith(f"tutelage: {said}")


def test_weights_of_a_file_with_its_own_classes(capsys: CAPSYS, run: str) -> None:
    told = tutelage(
        *(capsys, "predict", "tutelage:resnet8", "photos/cat/0.jpg", "--json", "--top", "3"),
        *("--weights", "run/student.safetensors", "--classes", "3"),
    )
    (seen,) = told.document["images"]
    assert sorted(seen["classes"]) == ["0", "1", "2"]  # the file names no classes
    (own,) = tutelage(capsys, "predict", run, "photos/cat/0.jpg", "--json").document["images"]
    assert seen["probabilities"] == pytest.approx(own["probabilities"])


def test_grey_models_read_grey_images(capsys: CAPSYS) -> None:
    assert tutelage(capsys, "train", recipe(), "--out", "digits").code == 0
    photos(Path("photos"), 2)
    told = tutelage(capsys, "predict", "digits", "photos", "--json")
    assert told.code == 0
    assert len(told.document["images"]) == 6
    assert load_file("digits/student.safetensors")["0.weight"].shape[1] == 1
    assert json.loads(Path("digits/student.json").read_text())["image_size"] == [8, 8]
