# SPDX-License-Identifier: Apache-2.0
from pathlib import Path
from typing import Any

import pytest

from tutelage.core.error import UserError
from tutelage.run.quick import DEFAULTS, asked, recipe

MODELS: dict[str, Any] = {"student": "tutelage:resnet8", "data": "digits"}


def test_flags_and_defaults_make_a_whole_recipe() -> None:
    found = recipe(**MODELS, teacher="tutelage:resnet20", method="mgd+kd")
    assert found.student.model == "tutelage:resnet8"
    assert found.teacher is not None
    assert found.teacher.model == "tutelage:resnet20"
    assert list(found.objective) == ["task", "mgd", "kd"]
    assert found.optimizer.name == DEFAULTS["optimizer"]["name"]
    assert found.train.epochs == DEFAULTS["train"]["epochs"]


def test_a_teacher_alone_means_kd_and_neither_means_the_task() -> None:
    assert set(recipe(**MODELS, teacher="tutelage:resnet20").objective) == {"task", "kd"}
    assert recipe(**MODELS).objective == {"task": 1.0}


def test_values_are_set_above_the_defaults() -> None:
    found = recipe(**MODELS, sets=["optimizer.lr=0.5", "train.steps=7"])
    assert found.optimizer.lr == 0.5
    assert (found.train.steps, found.train.epochs) == (7, None)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"student": None}, "give a recipe, or --student and --data (and --teacher)"),
        ({"data": None}, "give a recipe, or --student and --data (and --teacher)"),
        ({"method": "kd"}, "--method kd needs a --teacher"),
        ({"method": "tf_nkd+kd+mgd"}, "--method kd+mgd needs a --teacher"),
        ({"method": "tf_nkd", "teacher": "tutelage:resnet20"}, "--method tf_nkd reads no teacher; leave --teacher out"),
        ({"method": "kdd"}, "unknown method 'kdd'; did you mean kd?"),
    ],
)
def test_flags_that_do_not_fit_each_other_are_named(flags: dict[str, str | None], said: str) -> None:
    with pytest.raises(UserError) as caught:
        recipe(**{**MODELS, **flags})
    assert str(caught.value).startswith(said)


BASE = """
student: {model: tutelage:resnet8, width: 0.5}
teacher: {model: tutelage:resnet20, weights: a.pt}
data: {source: digits, batch_size: 32}
objective: {kd: 1.0}
train: {epochs: 2}
"""


def test_flags_beside_a_recipe_take_its_models_place() -> None:
    Path("a.yaml").write_text(BASE)
    found, name = asked(
        "a.yaml", student="tutelage:vgg8", teacher="run:runs/b", data="folder:x y", sets=["train.seed=4"]
    )
    assert name == "a"
    assert (found.student.model, found.student.options) == ("tutelage:vgg8", {})
    assert found.teacher is not None
    assert (found.teacher.model, found.teacher.weights) == ("run:runs/b", None)
    assert (found.data.source, found.data.batch_size) == ("folder:x y", 32)
    assert found.train.seed == 4


def test_the_same_model_keeps_its_options() -> None:
    Path("a.yaml").write_text(BASE)
    found, _ = asked("a.yaml", student="tutelage:resnet8", data=None)
    assert found.student.options == {"width": 0.5}
    assert found == asked("a.yaml", student=None, data=None)[0]


def test_a_method_is_not_given_beside_a_recipe() -> None:
    Path("a.yaml").write_text(BASE)
    with pytest.raises(UserError, match="--method belongs to the quick form"):
        asked("a.yaml", student=None, data=None, method="kd")


def test_a_run_is_called_after_its_method_and_student() -> None:
    names = [
        asked(None, **MODELS, teacher="tutelage:resnet20", method="kd+mgd")[1],
        asked(None, **MODELS, teacher="tutelage:resnet20")[1],
        asked(None, **MODELS)[1],
    ]
    assert names == ["kd+mgd-resnet8", "kd-resnet8", "alone-resnet8"]
