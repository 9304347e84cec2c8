# SPDX-License-Identifier: Apache-2.0
"""The verbs that train nothing: models, inspect, check, cite, doctor."""

from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest

from tiny_recipe import recipe, tree, tutelage
from tutelage.models import names as names_module
from tutelage.models.source import listed
from tutelage.report.number import TIMES
from tutelage.run import doctor as doctor_module

CAPSYS = pytest.CaptureFixture[str]


# --- models ------------------------------------------------------------------------------------------------------


def test_own_models_come_first(capsys: CAPSYS) -> None:
    told = tutelage(capsys, "models", "resnet20")
    assert told.out[:2] == ["classification", "  tutelage:resnet20  A residual network of 6n + 2 layers"]
    told = tutelage(capsys, "models", "resnet18")
    assert "  timm:resnet18" in told.out
    assert told.out[-1] == "  torchvision:resnet18"


def test_a_pattern_may_be_a_part_or_the_whole_or_ask_one_source(capsys: CAPSYS) -> None:
    assert tutelage(capsys, "models", "timm:test_vit?").out[1:] == [f"  timm:test_vit{n}" for n in "234"]
    assert set(tutelage(capsys, "models", "torchvision:").out) > {"  torchvision:resnet18", "  torchvision:vit_b_16"}
    (one,) = tutelage(capsys, "models", "TUTELAGE:resnet14", "--json").document
    assert (one["name"], one["task"]) == ("tutelage:resnet14", "classification")


def test_every_task_has_models_and_own_ones_say_what_they_are() -> None:
    found = list(names_module.names())
    assert list(dict.fromkeys(one.task for one in found)) == list(names_module.TASKS)
    own = {(one.task, one.name): one.what for one in found if one.name.startswith("tutelage:")}
    assert all(own.values())
    for task, folder in (("detection", "detectors"), ("segmentation", "segmenters"), ("pose", "poses")):
        assert {name for home, name in own if home == task} == {f"tutelage:{name}" for name in listed(folder)}
    assert {task for task, _ in own} == {"classification", "detection", "segmentation", "pose"}


def test_models_of_one_task(capsys: CAPSYS) -> None:
    told = tutelage(capsys, "models", "--task", "segmentation")
    assert told.out[0] == "segmentation"
    assert {line.split()[0] for line in told.out[1:]} > {
        *("tutelage:pspnet", "timm:NAME", "torchvision:lraspp_mobilenet_v3_large", "hf:segformer", "hf:mask2former")
    }
    told = tutelage(capsys, "models", "retinanet", "--task", "detection")
    assert [line.split()[0] for line in told.out[1:]] == [
        *("tutelage:retinanet", "torchvision:retinanet_resnet50_fpn", "torchvision:retinanet_resnet50_fpn_v2")
    ]
    assert "bert" in "".join(tutelage(capsys, "models", "hf:bert", "--task", "language").out)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["--task", "poses"], "tutelage: no models for a task 'poses'; did you mean pose?"),
        (
            ["yolox_q", "--task", "detection"],
            "tutelage: no model for detection matches 'yolox_q'; did you mean yolox_x?",
        ),
    ],
)
def test_no_model_of_a_task(capsys: CAPSYS, asked: list[str], said: str) -> None:
    told = tutelage(capsys, "models", *asked)
    assert (told.code, told.err) == (2, [said])


def test_no_model_matches(capsys: CAPSYS) -> None:
    told = tutelage(capsys, "models", "timm:resnte18")
    assert (told.code, told.err) == (2, ["tutelage: no model matches 'timm:resnte18'; did you mean resnet18?"])


def test_a_library_that_is_missing_offers_nothing(capsys: CAPSYS, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers.models.auto.modeling_auto", None)
    assert list(names_module.names("hf:")) == []


# --- inspect -----------------------------------------------------------------------------------------------------


def test_roles_shapes_size_and_cost(capsys: CAPSYS) -> None:
    found = tutelage(capsys, "inspect", "tutelage:resnet8", "--size", "16", "--classes", "5", "--json").document
    assert (found["kind"], found["seen"], found["gives"]) == ("ResNet", [16, 16], [1, 5])
    assert found["roles"]["stages[2]"] == {"place": "layer3", "shape": [1, 64, 4, 4]}
    assert found["roles"]["pooled"] == {"place": "linear (input)", "shape": [1, 64]}
    assert next(iter(found["roles"])) == "stem"
    assert found["lends"]["classifier"] == "linear"
    # by hand: the linear layer has 64 x 5 weights and 5 biases; the stem 3 x 16 x 9 and two vectors of its norm
    other = tutelage(capsys, "inspect", "tutelage:resnet8", "--size", "16", "--classes", "6", "--json").document
    assert other["parameters"] - found["parameters"] == 65
    assert other["macs"] - found["macs"] == 64
    assert other["size"] - found["size"] == 4 * 65


def test_a_model_of_one_size_is_shown_that_size(capsys: CAPSYS) -> None:
    told = tutelage(capsys, "inspect", "timm:test_vit", "--size", "64")
    text = "\n".join(told.out)
    assert "160 x 160, 3 channels" in text
    assert f"160 {TIMES} 160" in text
    assert "blocks[0]" in text


def test_the_folder_of_a_run_is_its_student(capsys: CAPSYS) -> None:
    assert tutelage(capsys, "train", recipe(), "--out", "run").code == 0
    found = tutelage(capsys, "inspect", "run", "--json").document
    assert (found["gives"], found["seen"], found["class_names"]) == ([1, 10], [8, 8], list("0123456789"))


def test_inspect_leaves_nothing_behind(capsys: CAPSYS) -> None:
    tutelage(capsys, "inspect", "tutelage:resnet8")
    assert tree() == {}
    assert tutelage(capsys, "inspect", "tutelage:resnet9").code == 2


# --- check -------------------------------------------------------------------------------------------------------


def test_check_says_what_meets_what_and_writes_nothing(capsys: CAPSYS) -> None:
    path = recipe()
    before = set(tree())
    told = tutelage(capsys, "check", path)
    text = "\n".join(told.out)
    assert told.code == 0
    for word in ("teacher", "logits", "mgd", "gradient norm", "share (%)", "teacher on a few validation batches"):
        assert word in text
    assert told.out[-1] == "4 steps, a few seconds"
    assert set(tree()) == before
    found = tutelage(capsys, "check", path, "--json").document
    assert set(found["losses"]) == {"task", "kd", "mgd"}
    assert sum(one["share"] for one in found["losses"].values()) == pytest.approx(1.0)


def test_check_decides_what_is_open(capsys: CAPSYS) -> None:
    path = recipe(
        objective={"task": 1.0, "kd": {"weight": {"share": 0.5}}},
        student={"model": "tutelage:resnet8"},
        teacher={"model": "tutelage:resnet8", "fit": "auto"},
    )
    told = tutelage(capsys, "check", path)
    assert told.err == ["tutelage:resnet8 has no weights: it is fitted to the data first, 4 steps (teacher.fit)"]
    assert any(line.startswith("look: the teacher is fitted to the data before the training") for line in told.out)
    (row,) = (line.split() for line in told.out if line.strip().startswith("kd "))
    assert float(row[-1]) == pytest.approx(50, abs=10)


# --- cite ----------------------------------------------------------------------------------------------------------


def test_cite_prints_the_papers_of_a_recipe(capsys: CAPSYS) -> None:
    told = tutelage(capsys, "cite", recipe())
    assert [line for line in told.out if line.startswith("@")] == ["@misc{hinton2015kd,", "@misc{yang2022mgd,"]
    assert tutelage(capsys, "cite", "tour", "--json").document[0]["name"] == "KD"


def test_cite_finds_methods_inside_of_methods(capsys: CAPSYS) -> None:
    nested = {"task": 1.0, "soft": {"method": "nkd", "weight": 1.0, "of": {"method": "kd"}}}
    told = tutelage(capsys, "cite", recipe(objective=nested))
    assert [line for line in told.out if line.startswith("@")] == ["@misc{yang2023nkd,", "@misc{hinton2015kd,"]


def test_cite_takes_the_folder_of_a_run(capsys: CAPSYS) -> None:
    assert tutelage(capsys, "distill", recipe(), "--out", "run").code == 0
    assert any("Hinton" in line for line in tutelage(capsys, "cite", "run").out)


def test_nothing_to_cite(capsys: CAPSYS) -> None:
    told = tutelage(capsys, "cite", recipe(objective={"task": 1.0}, teacher=None))
    assert told.err == ["tutelage: tiny.yaml uses no method of a paper: its objective is the task alone"]
    assert tutelage(capsys, "cite", "nothing").code == 2


# --- doctor ----------------------------------------------------------------------------------------------------------


def test_the_doctor_finds_versions_and_trains(capsys: CAPSYS) -> None:
    told = tutelage(capsys, "doctor", "--json")
    assert (told.code, told.err) == (0, [])
    found = told.document
    assert found["faults"] == []
    assert found["packages"][""]["timm"] == version("timm")
    assert "pytest" not in {name for held in found["packages"].values() for name in held}
    assert found["last"] < found["first"]
    assert found["environment"]["torch"].startswith(version("torch").partition("+")[0])
    assert tree() == {}


@pytest.fixture
def _ill(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = SimpleNamespace(metrics=Path("metrics"), path=Path("run"))
    result = SimpleNamespace(scores={"loss": 1.0}, folder=folder)
    monkeypatch.setattr(doctor_module, "packages", lambda: {"": {"timm": None}, "onnx": {"onnxruntime": None}})
    monkeypatch.setattr(doctor_module, "distill", lambda *given, **more: result)
    monkeypatch.setattr(doctor_module, "read_metrics", lambda path: [])
    monkeypatch.setattr(doctor_module, "curve", lambda *given: [(1.0, 2.0), (2.0, 3.0)])
    monkeypatch.setattr(doctor_module, "evaluate", lambda path: {"loss": 9.0})


@pytest.mark.usefixtures("_ill")
def test_the_doctor_says_what_is_wrong(capsys: CAPSYS) -> None:
    told = tutelage(capsys, "doctor")
    assert told.code == 1
    assert told.out[-3:] == [
        "wrong: timm is missing: pip install tutelage",
        "wrong: ten steps of training did not lower the loss: 2.000 to 3.000",
        "wrong: the saved student does not answer as the trained one did",
    ]
    assert any("pip install 'tutelage[onnx]'" in line for line in told.out)  # no fault, but said
