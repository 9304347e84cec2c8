# SPDX-License-Identifier: Apache-2.0
"""`tutelage.distill`: the same run from Python, with names or with objects."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import tutelage
from photos import photos
from tiny_run import network
from tutelage.core import InputSpec, Live, Model
from tutelage.core.error import UserError
from tutelage.data.digits import digits
from tutelage.models.adapt import adapt

STEPS: dict[str, Any] = {"steps": 2}


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def pairs(count: int = 24, classes: int = 4) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.rand(count, 1, 8, 8, generator=generator), torch.arange(count) % classes)


# --- names ---------------------------------------------------------------------------------------------------------


def test_names_make_the_run_of_the_command_line() -> None:
    said: list[str] = []
    result = tutelage.distill(
        teacher="tutelage:resnet8", student="tutelage:resnet8", data="digits", method="kd", train=STEPS, say=said.append
    )
    assert result.folder.path == Path("runs/kd-resnet8")
    assert said[0].startswith("tutelage:resnet8 has no weights: it is fitted to the data first, 2 steps")
    recipe = yaml.safe_load(Path("runs/kd-resnet8/recipe.yaml").read_text())
    assert recipe["train"]["steps"] == 2
    assert recipe["train"]["epochs"] is None
    assert recipe["train"]["clip"] == 5.0  # the rest is as with quick flags
    assert recipe["optimizer"]["name"] == "adamw"
    assert result.student.class_names == tuple("0123456789")


def test_sections_lie_over_the_defaults() -> None:
    result = tutelage.distill(
        student={"model": "tutelage:resnet8", "width": 0.5},
        data={"source": "digits", "labels": 50, "batch_size": 10},
        optimizer={"name": "sgd", "lr": 0.2},
        train=STEPS,
        task={"label_smoothing": 0.1},
        out="run",
    )
    recipe = result.folder.recipe()
    assert recipe.optimizer.model_dump() == {"name": "sgd", "lr": 0.2, "weight_decay": 0.0, "decay_norms": False}
    assert recipe.student.options == {"width": 0.5}
    assert recipe.data.labels == 50
    assert recipe.task.options == {"label_smoothing": 0.1}


def test_a_folder_is_a_path() -> None:
    place = photos(Path("photos"))
    result = tutelage.distill(student="tutelage:resnet8", data=place, train={"steps": 1}, out="run")
    assert result.folder.recipe().data.image_size == 32


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"method": "kd"}, "--method kd needs a --teacher"),
        ({"method": "kd", "objective": {"task": 1.0}}, "give a method or an objective, not both"),
        ({"train": {"stpes": 1}}, "recipe: train.stpes: unknown key; did you mean steps?"),
        ({"trian": {}}, "recipe: trian: unknown key; did you mean train?"),
        ({"data": [1, 2, 3]}, "data: a pair of sets is (training, validation), not 3 of them"),
        ({"data": {"validation": 1}}, "data: a mapping of sets has train, validation and test, not validation"),
        ({"data": 7}, "train: expected a data set with a length, or a DataLoader of one, not int"),
    ],
)
def test_mistakes(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        tutelage.distill(**{"student": "tutelage:resnet8", "data": "digits", "train": STEPS, **given})
    assert str(error.value) == said


# --- objects -------------------------------------------------------------------------------------------------------


def test_a_module_is_trained_in_place_and_the_teacher_stays() -> None:
    student, teacher = network(4, seed=1), network(6, seed=2)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    first = student.state_dict()["0.weight"].clone()
    result = tutelage.distill(student=student, teacher=teacher, data=pairs(), method="kd", train=STEPS, out="run")
    assert result.student.module is student
    assert not torch.equal(student.state_dict()["0.weight"], first)
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in (*student, *teacher))
    assert "agreement" in result.scores


def test_objects_resume_to_the_same_bits() -> None:
    given: dict[str, Any] = {"data": pairs(), "method": "kd", "train": {"steps": 4, "save_every": "2 steps"}}
    whole, part = network(4, seed=1), network(4, seed=1)
    tutelage.distill(student=whole, teacher=network(6, seed=2), out="whole", **given)
    tutelage.distill(student=part, teacher=network(6, seed=2), out="part", **given)
    for name in ("result.json", "student.json", "student.safetensors", "checkpoints/step_000000004.safetensors"):
        Path("part", name).unlink()
    resumed, fresh = network(4, seed=9), network(4, seed=8)
    tutelage.distill(student=resumed, teacher=network(6, seed=2), out="part", **given)
    tutelage.distill(student=fresh, teacher=network(6, seed=2), out="part", **given)  # finished: weights are read
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor)
        assert torch.equal(fresh.state_dict()[name], tensor)


def test_roles_are_found_in_a_module() -> None:
    objective = {"task": 1.0, "mgd": {"weight": 0.1, "mask": "channel"}}
    result = tutelage.distill(
        student=network(4, seed=1),
        teacher=network(6, seed=2),
        data=pairs(),
        objective=objective,
        train=STEPS,
        out="run",
    )
    assert result.folder.recipe().objective == objective


def test_a_loader_gives_its_set_and_batch_size() -> None:
    loader = DataLoader(pairs(), batch_size=6, shuffle=True)
    result = tutelage.distill(student=network(4, seed=1), data=loader, train=STEPS, out="run")
    assert result.folder.recipe().data.batch_size == 6
    result = tutelage.distill(
        student=network(4, seed=1), data=loader, train=STEPS, out="other", data_options={"batch_size": 5}
    )
    assert result.folder.recipe().data.batch_size == 5


def test_a_loader_with_batches_of_its_own_is_refused() -> None:
    loader = DataLoader(pairs(), collate_fn=lambda samples: samples)
    with pytest.raises(
        UserError, match=r"^train: a DataLoader with a collate_fn of its own makes batches that are not"
    ):
        tutelage.distill(student=network(4, seed=1), data=loader, train=STEPS)


def test_named_models_learn_from_sets_in_hand() -> None:
    train, held_out = digits()
    sets = {
        "train": TensorDataset(train.images, train.targets),
        "validation": TensorDataset(held_out.images, held_out.targets),
    }
    result = tutelage.distill(student="tutelage:resnet8", data=sets, train=STEPS, out="run")
    kept = result.folder.result()
    assert kept is not None
    assert sum(there for _, there in kept["classes"].values()) == 600


def test_normalised_images_are_refused_for_models_that_normalise() -> None:
    images = torch.randn(24, 3, 8, 8)
    data = TensorDataset(images, torch.arange(24) % 4)
    with pytest.raises(UserError, match=r"^data: pixels lie between .*: leave the normalisation out of the data set$"):
        tutelage.distill(student="tutelage:resnet8", data=data, train=STEPS)
    body = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)]
    tutelage.distill(student=nn.Sequential(*body), data=data, train=STEPS, out="run")  # a module takes them as they are


def test_models_and_teachers_are_taken_as_they_are() -> None:
    student = adapt(network(4, seed=1), torch.zeros(2, 1, 8, 8), input=InputSpec(channels=1))
    teacher = Live(Model.of(network(6, seed=2)), mode="batch_statistics")
    result = tutelage.distill(student=student, teacher=teacher, data=pairs(), method="kd", train=STEPS, out="run")
    assert result.student is student
    assert result.folder.recipe().teacher is not None


def test_the_run_of_an_object_says_that_it_was_one() -> None:
    tutelage.distill(student=network(4, seed=1), data=pairs(), train=STEPS, out="run")
    with pytest.raises(
        UserError, match=r"^model 'object:Sequential' was an object in Python: build it there, and load"
    ):
        tutelage.distill(student="run:run", data="digits", train=STEPS)
