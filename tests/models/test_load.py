# SPDX-License-Identifier: Apache-2.0
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from models.readings import noise, stages
from tutelage.core import Model
from tutelage.core.error import UserError
from tutelage.models.load import load, rebuild
from tutelage.models.source import listed

DIGITS: dict[str, Any] = {"num_classes": 10, "in_channels": 1, "image_size": (8, 8)}


def same(first: Model, second: Model) -> bool:
    pairs = zip(first.module.state_dict().values(), second.module.state_dict().values(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def test_a_name_alone() -> None:
    model = load("tutelage:resnet8", **DIGITS)
    assert model(noise(8, channels=1)).shape == (2, 10)
    assert model.input is not None
    assert (model.input.mean, model.input.channels) == ((0.5,), 1)
    assert model.modules["classifier"] == "linear"
    assert stages(model) == ["stages[0]", "stages[1]", "stages[2]"]
    colour = load("tutelage:resnet8").input
    assert colour is not None
    assert colour.mean == (0.485, 0.456, 0.406)


def test_options_of_the_constructor() -> None:
    model = load({"model": "tutelage:resnet8", "width": 0.5, "shortcut": "B"}, **DIGITS)
    assert model.module.get_submodule("conv1").out_channels == 8
    assert any("shortcut" in key for key in model.module.state_dict())


def test_the_mapping_wins_over_the_datas_facts() -> None:
    model = load(
        {"model": "tutelage:resnet8", "num_classes": 3, "in_channels": 2, "class_names": ["x", "y", "z"]}, **DIGITS
    )
    assert model(noise(8, channels=2)).shape == (2, 3)
    assert model.class_names == ("x", "y", "z")


def test_a_seed_decides_the_weights_and_moves_no_generator() -> None:
    before = torch.get_rng_state()
    first, again, other = (load("tutelage:resnet8", seed=seed, **DIGITS) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert same(first, again)
    assert not same(first, other)
    torch.manual_seed(5)
    one = load("tutelage:resnet8", **DIGITS)
    torch.manual_seed(5)
    assert same(one, load("tutelage:resnet8", **DIGITS))


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
def test_weights_of_a_file(tmp_path: Path, name: str) -> None:
    trained = load("tutelage:resnet8", seed=1, **DIGITS)
    state = trained.module.state_dict()
    if name.endswith("safetensors"):
        save_file(state, tmp_path / name)
    else:
        torch.save({"state_dict": {f"module.{key}": tensor for key, tensor in state.items()}}, tmp_path / name)
    model = load({"model": "tutelage:resnet8", "weights": str(tmp_path / name)}, seed=2, **DIGITS)
    assert same(trained, model)
    message = f"weights: {tmp_path / name} does not fit ResNet: "
    with pytest.raises(UserError, match=re.escape(message) + r".*conv1.weight is \[16, 1, 3, 3\], not \[8, 1, 3, 3\]"):
        load({"model": "tutelage:resnet8", "weights": str(tmp_path / name), "width": 0.5}, **DIGITS)


def test_roles_and_input_may_be_said() -> None:
    spec = {
        "model": "tutelage:resnet8",
        "roles": {"map": "layer2", "stem": {"where": "layer1.0", "side": "input"}, "classifier": "layer3"},
        "input": {"size": 16, "mean": [0.1], "std": [0.2]},
    }
    model = load(spec, **DIGITS)
    assert model.roles["map"].where == "layer2"
    assert model.roles["stem"].name == "layer1.0:input"
    assert model.modules["classifier"] == "layer3"
    assert "classifier" not in model.roles
    assert model.input is not None
    assert (model.input.size, model.input.mean, model.input.channels) == ((16, 16), (0.1,), 1)


def run_folder(root: Path, model: Model, **more: Any) -> str:
    (root / "student.json").write_text(json.dumps({**model.source, **more}))
    save_file(model.module.state_dict(), root / "student.safetensors")
    return f"run:{root}"


SPECS: list[str | dict[str, Any]] = [
    "tutelage:resnet8",
    {"model": "tutelage:resnet14", "width": 0.5, "input": {"size": [16, 16], "mean": [0.3], "std": [0.4]}},
    {"model": "timm:resnet18", "block": "BasicBlock"},
]


@pytest.mark.parametrize("spec", SPECS[:2])
def test_a_runs_student_is_built_again(tmp_path: Path, spec: Any) -> None:
    student = load(spec, seed=3, class_names=[f"class {n}" for n in range(10)], **DIGITS)
    again = load(run_folder(tmp_path, student, task="classification"))
    assert same(student, again)
    assert again.source == student.source
    assert again.class_names == student.class_names
    assert again.input == student.input
    assert again.roles == student.roles
    student.module.eval()
    again.module.eval()
    assert torch.equal(student(noise(8, channels=1)), again(noise(8, channels=1)))


def test_a_record_needs_no_weights() -> None:
    student = load({"model": "tutelage:resnet8", "roles": {"map": "layer2"}}, seed=3, **DIGITS)
    again = rebuild(json.loads(json.dumps(student.source)), seed=3)
    assert same(student, again)
    assert again.roles["map"].where == "layer2"


def test_more_may_be_said_of_a_runs_student(tmp_path: Path) -> None:
    place = run_folder(tmp_path, load("tutelage:resnet8", **DIGITS))
    model = load({"model": place, "roles": {"map": "layer2"}, "input": {"size": 8}}, num_classes=10)
    assert model.roles["map"].where == "layer2"
    assert model.input is not None
    assert (model.input.size, model.input.mean) == ((8, 8), (0.5,))


@pytest.mark.parametrize(
    ("change", "given", "message"),
    [
        ("gone", {}, "model 'run:{root}/no': no such folder"),
        ("no record", {}, "model 'run:{root}': it has no student.json: is the run finished?"),
        ("no weights", {}, "model 'run:{root}': it has no student.safetensors: is the run finished?"),
        ("{", {}, "{root}/student.json is damaged ("),
        ("[]", {}, "{root}/student.json does not say how to build the model: it needs `model`"),
        (None, {"width": 2.0}, "model 'run:{root}': 'width' is fixed by the run"),
        (None, {"weights": "x.pth"}, "model 'run:{root}' has its own weights"),
    ],
)
def test_what_is_wrong_with_a_run_is_said(
    tmp_path: Path, change: str | None, given: dict[str, Any], message: str
) -> None:
    place = run_folder(tmp_path, load("tutelage:resnet8", **DIGITS))
    if change == "gone":
        place += "/no"
    elif change in ("no record", "no weights"):
        (tmp_path / ("student.json" if change == "no record" else "student.safetensors")).unlink()
    elif change is not None:
        (tmp_path / "student.json").write_text(change)
    with pytest.raises(UserError, match=f"^{re.escape(message.replace('{root}', str(tmp_path)))}"):
        load({"model": place, **given})


def test_a_runs_classes_are_the_datas(tmp_path: Path) -> None:
    place = run_folder(tmp_path, load("tutelage:resnet8", **DIGITS))
    with pytest.raises(UserError, match=f"^{re.escape(f'model {place!r} has 10 classes, the data 7')}$"):
        load(place, num_classes=7)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tutelage:resnet9", "unknown model 'tutelage:resnet9'; did you mean resnet"),
        ("tim:resnet18", "model 'tim:resnet18' is not known: write KIND:NAME; did you mean timm?"),
        (
            "resnet18",
            "model 'resnet18' is not known: write KIND:NAME; valid: hf, python, run, timm, torchvision, tutelage",
        ),
        ("timm:", "model 'timm:' is not known: write KIND:NAME"),
        (
            {"weights": None},
            "a model needs the word `model`: hf:..., python:..., run:..., timm:..., torchvision:..., tutelage:...",
        ),
        (
            {"model": "tutelage:resnet8", "wdith": 2},
            "tutelage:resnet8: ResNet.__init__() got an unexpected keyword argument 'wdith'",
        ),
        (
            {"model": "tutelage:resnet8", "weights": "pretrained"},
            "tutelage:resnet8 comes without weights: give a file as `weights`",
        ),
        ({"model": "tutelage:resnet8", "input": {"men": 1}}, "input.men is not known; did you mean mean?"),
        (
            {"model": "tutelage:resnet8", "roles": {"map": {"where": "x", "kee": 1}}},
            "unknown word 'kee' in a tap; did you mean key?",
        ),
        ({"model": "tutelage:resnet8", "input": {"channels": 3}}, "model 'tutelage:resnet8' does not run on images of"),
    ],
)
def test_what_is_wrong_is_said(spec: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        load(spec, **DIGITS)


@pytest.mark.parametrize("folder", ["detectors", "networks", "poses", "segmenters"])
def test_constructors_are_those_that_the_files_of_a_folder_list(folder: str) -> None:
    found = listed(folder)
    assert found
    assert all(map(callable, found.values()))
    assert listed(folder, "NOTHING_OF_THE_KIND") == {}
