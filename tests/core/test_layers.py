# SPDX-License-Identifier: Apache-2.0
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tutelage.core import Batch, Card, Distiller, Live, Model, Objective, Reads, Signals, Tap, Term
from tutelage.core.error import UserError
from tutelage.core.layers import Layers
from tutelage.core.tap import expand, is_role
from tutelage.models.load import load
from tutelage.tasks.classification import Classification


def signals(*names: str) -> Signals:
    return Signals(None, {name: torch.zeros(2, 1) for name in names})


# patterns


def test_a_pattern_stands_for_every_index_in_its_order() -> None:
    known = [f"stages[{n}]" for n in (10, 2, 0)] + ["stages[2].pre", "stages[1].pre@strong", "blocks[1]"]
    assert expand("stages[*]", known) == ("stages[0]", "stages[2]", "stages[10]")
    assert expand("stages[*].pre", known) == ("stages[2].pre",)
    assert expand("stages[*].pre@strong", known) == ("stages[1].pre@strong",)
    assert expand("layer4", known) == ("layer4",)
    assert expand("hidden[*]", known) == ()


@pytest.mark.parametrize("role", ["stages[*]", "stages[*].pre", "stages[3].norm", "classifier.weight"])
def test_these_are_roles(role: str) -> None:
    assert is_role(role)


def test_a_model_without_the_role_says_what_it_has() -> None:
    said = "Linear has no role 'stages[*]'; its roles: map"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        Model(nn.Linear(1, 1), {"map": Tap("")}).expand(Tap("stages[*]"))
    with pytest.raises(UserError, match=re.escape("Linear lends no 'stages[*].norm'; it lends: classifier")):
        Model(nn.Linear(1, 1), modules={"classifier": ""}).lent("stages[*].norm")


# pairs


@pytest.mark.parametrize(
    ("student", "teacher", "found"),
    [
        pytest.param(3, 3, [(0, 0), (1, 1), (2, 2)], id="equally many"),
        pytest.param(2, 4, [(0, 2), (1, 3)], id="a deeper teacher"),
        pytest.param(4, 1, [(3, 0)], id="a shallow teacher"),
    ],
)
def test_the_deepest_meet_the_deepest(student: int, teacher: int, found: list[tuple[int, int]]) -> None:
    layers = Layers.parse(["stages[*]"], ["stages[*].pre"])
    one = signals("logits", *(f"stages[{n}]" for n in range(student)))
    other = signals("map", *(f"stages[{n}].pre" for n in range(teacher)))
    assert layers.pairs(one, other) == tuple((f"stages[{a}]", f"stages[{b}].pre") for a, b in found)


def test_named_layers_keep_their_order() -> None:
    layers = Layers.parse(["layer3", "layer1"], ["stages[1]", "stages[0]"])
    here = signals("layer1", "layer3", "stages[0]", "stages[1]")
    assert layers.pairs(here, here) == (("layer3", "stages[1]"), ("layer1", "stages[0]"))
    assert not layers.open


@pytest.mark.parametrize(
    ("student", "teacher", "said"),
    [
        ("map", ["map"], "student_taps: expected a list of roles or module paths, not 'map'"),
        (["map"], [], "teacher_taps: expected a list of roles or module paths, not []"),
        (
            ["layer1", "layer2"],
            ["layer1"],
            "student_taps names 2 layers and teacher_taps 1; they are compared pair by pair",
        ),
    ],
)
def test_options(student: Any, teacher: Any, said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        Layers.parse(student, teacher)


# in a Distiller

CARD = Card(
    name="Probe",
    title="None",
    authors="None",
    year=2020,
    venue="None",
    paper="url:none",
    claims="None",
    reads={"student": ("stages[*]",), "teacher": ("stages[*]",)},
)


class Probe(Term):
    """Notes what it was built with."""

    def __init__(self, *borrows: str, student: tuple[Any, ...] = ("stages[*]",)) -> None:
        super().__init__()
        self.layers, self.borrows = Layers.parse(student, ["stages[*]"]), borrows

    @property
    def reads(self) -> Reads:
        return Reads(self.layers.student, self.layers.teacher, self.borrows)

    def build(self, student: Signals, teacher: Signals | None, facts: Any) -> None:
        assert teacher is not None
        self.pairs = self.layers.pairs(student, teacher)
        self.lent = tuple(teacher.borrowed)

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> Tensor:  # type: ignore[override]
        return torch.stack([student[one].mean() - teacher[other].mean() for one, other in self.pairs]).sum()


def distiller(term: Term, task: float = 1.0) -> tuple[Distiller, Batch]:
    one = load({"model": "tutelage:resnet8", "width": 0.25}, num_classes=5, in_channels=1, seed=0)
    other = load("tutelage:resnet8", num_classes=5, in_channels=1, seed=1)
    batch = Batch.of(torch.rand(4, 1, 8, 8), torch.arange(4), views={"strong": torch.rand(4, 1, 8, 8)})
    objective = Objective(task=task, probe=term)
    return Distiller(one, objective, task=Classification(5), teacher=Live(other), sample=batch), batch


def test_all_stages_of_two_models() -> None:
    term = Probe("stages[*].norm")
    machine, batch = distiller(term)
    assert term.pairs == tuple((f"stages[{n}]", f"stages[{n}]") for n in range(3))
    assert term.lent == tuple(f"stages[{n}].norm" for n in range(3))
    losses = machine(batch, machine.observe(batch))
    losses.total.backward()
    stem = next(machine.student.parameters())
    assert stem.grad is not None
    assert stem.grad.any()
    machine.close()


def test_all_stages_of_another_view() -> None:
    term = Probe(student=("stages[*]@strong",))
    machine, batch = distiller(term)
    assert [one for one, _ in term.pairs] == [f"stages[{n}]@strong" for n in range(3)]
    sources = machine._read(batch, machine.observe(batch))
    seen, _ = machine.objective.pair("probe", sources, machine.models)
    for n in range(3):
        expected = sources["student@strong"][f"stages[{n}]"]
        torch.testing.assert_close(seen[f"stages[{n}]@strong"], expected)
    machine.close()


# a parameter as a signal


class Weighing(Term):
    """Reads a layer's own weight."""

    def __init__(self, place: Any) -> None:
        super().__init__()
        self.tap = Tap.parse(place)

    @property
    def reads(self) -> Reads:
        return Reads((self.tap,))

    def forward(self, student: Signals, teacher: Signals | None, batch: Batch) -> Tensor:
        return student[self.tap.name].square().sum()


@pytest.mark.parametrize("place", ["classifier.weight", {"where": "linear", "side": "weight"}])
def test_a_weight_is_read_alive(place: Any) -> None:
    machine, batch = distiller(Weighing(place), task=0.0)
    weight = machine.student.get_parameter("linear.weight")
    losses = machine(batch, machine.observe(batch))
    torch.testing.assert_close(losses.parts["probe"], weight.detach().square().sum())
    losses.total.backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, 2 * weight.detach())
    machine.close()


def test_a_module_without_a_weight() -> None:
    said = "tap 'layer1.0.act1:weight' met no tensor at the weight of 'layer1.0.act1': say which with `key`"
    with pytest.raises(UserError, match=re.escape(said)):
        distiller(Weighing({"where": "layer1.0.act1", "side": "weight"}))


def test_a_classifier_that_is_not_known() -> None:
    said = "Linear has no role 'classifier.weight'; its roles: none"
    with pytest.raises(UserError, match=re.escape(said)):
        Model(nn.Linear(1, 1)).resolve(Tap("classifier.weight"))


# the norm before a stage's last activation


@pytest.mark.parametrize(
    ("spec", "found"),
    [
        ({"model": "tutelage:resnet8"}, ["layer1.0.bn2", "layer2.0.bn2", "layer3.0.bn2"]),
        (
            {"model": "tutelage:resnet8", "shortcut": "B"},  # a norm in the shortcut runs later
            ["layer1.0.bn2", "layer2.0.bn2", "layer3.0.bn2"],
        ),
    ],
)
def test_the_norm_of_the_branch(spec: dict[str, Any], found: list[str]) -> None:
    model = load(spec, num_classes=5, in_channels=1, seed=0)
    assert [model.modules[f"stages[{n}].norm"] for n in range(3)] == found
