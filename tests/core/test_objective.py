# SPDX-License-Identifier: Apache-2.0
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from core.networks import BLANK, CLASSES, Distance, images, small_batch
from tutelage.core import Batch, Card, Draw, Entry, Facts, Objective, Outcome, Schedule, Signals, Tap, Term
from tutelage.core.error import UserError
from tutelage.core.signals import NONE
from tutelage.methods.logits.kd import KD
from tutelage.tasks.classification import Classification

TASK = Classification(CLASSES)


def logits(seed: int, rows: int = 4) -> Signals:
    drawn = torch.randn(rows, CLASSES, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    return Signals(drawn, {"logits": drawn})


def losses(objective: Objective, batch: Batch | None = None, step: int = 0, **sources: Signals) -> Any:
    given = {"student": logits(0), "teacher": logits(1), **sources}
    students = [name for name in given if name.startswith("student")]
    return objective(given, students, batch or small_batch(), TASK, step)


# labels and weights


def test_labels_keep_their_order() -> None:
    objective = Objective({"b": KD(), "a": 0.5 * KD()}, task=0.1, c=Entry(KD(), 2.0))
    assert objective.labels == ("task", "b", "a", "c")
    assert [objective.weight(label, 0) for label in objective.labels] == [0.1, 1.0, 0.5, 2.0]
    assert list(objective.terms) == ["b", "a", "c"]


def test_a_weighted_term_is_an_entry() -> None:
    term = KD()
    for entry in (0.5 * term, term * 0.5):
        assert entry == Entry(term, 0.5)
    assert (entry.student, entry.teacher, entry.live) == ("student", "teacher", False)


@pytest.mark.parametrize("label", ["task", "keys", "train", "a.b"])
def test_a_label_that_cannot_be_used_is_refused(label: str) -> None:
    with pytest.raises(UserError) as error:
        Objective({label: KD()})
    assert str(error.value) == f"objective.{label}: this label is taken or not a plain word; choose another"


def test_what_is_no_term_is_refused() -> None:
    with pytest.raises(UserError, match=r"objective.kd: expected a term or `weight \* term`, not 0.9"):
        Objective(kd=0.9)  # type: ignore[arg-type]
    term = KD()
    with pytest.raises(UserError, match=r"objective\.b: the same term stands under another label; make a second"):
        Objective(a=term, b=0.5 * term)
    with pytest.raises(UserError, match="a weight is a number or a schedule, not 'much'"):
        Objective(task="much")


def test_the_total_is_the_weighted_sum() -> None:
    found = losses(Objective(task=0.3, kd=0.7 * KD(), far=Entry(Distance(), 0.01)))
    assert set(found.parts) == {"task", "kd", "far"}
    expected = 0.3 * found.parts["task"] + 0.7 * found.parts["kd"] + 0.01 * found.parts["far"]
    torch.testing.assert_close(found.total, expected)
    student, teacher, batch = logits(0), logits(1), small_batch()
    torch.testing.assert_close(found.parts["task"], TASK.loss(student.output, batch).detach())
    torch.testing.assert_close(found.parts["kd"], KD()(student, teacher, batch).detach())
    assert not any(part.requires_grad for part in found.parts.values())


def test_weights_follow_their_schedule() -> None:
    objective = Objective(
        task={"linear": [1, 0], "until": "2 epochs"}, kd=Entry(KD(), Schedule.parse({"cosine": [0, 2]}))
    )
    objective.facts = Facts(steps_per_epoch=5, total_steps=20)
    for step, (task, kd) in {0: (1.0, 0.0), 5: (0.5, None), 10: (0.0, 1.0), 20: (0.0, 2.0)}.items():
        assert objective.weight("task", step) == pytest.approx(task)
        assert kd is None or objective.weight("kd", step) == pytest.approx(kd)
        found = losses(objective, step=step)
        weights = objective.weight("task", step), objective.weight("kd", step)
        torch.testing.assert_close(found.total, weights[0] * found.parts["task"] + weights[1] * found.parts["kd"])


def test_the_weight_that_counts_for_what_is_reached() -> None:
    objective = Objective(task=0.0, a=Entry(KD(), {"linear": [0, 1]}), b=Entry(KD(), {"cosine": [3, 0]}))
    assert [objective.final_weight(label) for label in objective.labels] == [0.0, 1.0, 3.0]


# denominators


class Labelled(Distance):
    """Over labelled rows only."""

    @property
    def card(self) -> Card:
        return replace(BLANK, averages="labelled")


def test_a_term_s_mean_is_weighed_by_its_own_count() -> None:
    objective = Objective(task=0.0, far=Distance(), near=Labelled())
    assert objective.averages(TASK) == ("labelled", "samples")
    batch = replace(
        small_batch(), mean_count={"labelled": torch.tensor(6.0).double(), "samples": torch.tensor(2.0).double()}
    )
    found = losses(objective, batch)
    torch.testing.assert_close(found.total, 4 / 2 * found.parts["far"] + 3 / 6 * found.parts["near"])
    assert found.total.dtype == torch.float32


def test_a_step_without_labels_is_a_connected_zero() -> None:
    batch = replace(Batch.of(images()), mean_count={"labelled": torch.zeros(()).double()})
    student = logits(0)
    found = losses(Objective(), batch, student=student)
    assert found.total == 0
    (grad,) = torch.autograd.grad(found.total, student.output)
    assert not grad.any()


# sources


def test_a_student_in_the_teacher_s_place_is_cut_unless_live() -> None:
    for live in (False, True):
        one, other = logits(0), logits(1)
        objective = Objective({"kd": Entry(KD(), student="student", teacher="student2", live=live)}, task=0.0)
        losses(objective, student=one, student2=other).total.backward()
        assert one.output.grad.any()
        assert (other.output.grad is not None and bool(other.output.grad.any())) == live


def test_several_students_learn_the_task_by_name() -> None:
    found = losses(Objective(task=0.5), student=logits(0), student2=logits(2))
    assert set(found.parts) == {"task.student", "task.student2"}
    torch.testing.assert_close(found.total, 0.5 * sum(found.parts.values()))


def test_signals_are_read_by_name() -> None:
    signals = logits(0)
    assert signals.logits is signals["logits"]
    with pytest.raises(KeyError, match="'map' was not recorded; recorded: logits"):
        signals["map"]
    with pytest.raises(KeyError, match="recorded: nothing"):
        Signals(None, {}).logits  # noqa: B018, the access is the test
    cut = signals.detach()
    assert not cut.logits.requires_grad
    assert not cut.output.requires_grad
    assert Signals([1], NONE).detach().output is None


# what terms return


class Giving(Term):
    """Returns what it is told to."""

    def __init__(self, given: Any) -> None:
        super().__init__()
        self.given = given

    def forward(self, *given: Any) -> Any:
        return self.given


def test_parts_are_logged_and_summed() -> None:
    one, two = torch.tensor(1.0), torch.tensor(2.0)
    for given in ({"x": one, "y": two}, Outcome({"x": one, "y": two})):
        found = losses(Objective(task=0.0, term=2.0 * Giving(given)))
        assert {label: value.item() for label, value in found.parts.items() if label != "task"} == {
            "term.x": 1.0,
            "term.y": 2.0,
        }
        assert found.total == 6
        assert found.kept == {}


def test_what_is_kept_is_handed_on() -> None:
    memory: Mapping[str, Tensor] = {"vectors": torch.ones(4, 2)}
    found = losses(Objective(term=Giving(Outcome({"x": torch.tensor(1.0)}, memory))))
    assert found.kept == {"term": memory}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (torch.ones(3), "term 'term' returned shape [3]; a term returns one number"),
        ({"x": torch.ones(1)}, "term 'term.x' returned shape [1]; a term returns one number"),
        (1.0, "term 'term' returned 1.0; a term returns one number, or parts by name"),
        (None, "term 'term' returned None; a term returns one number, or parts by name"),
        ({}, "term 'term' returned {}; a term returns one number, or parts by name"),
    ],
    ids=["vector", "vector part", "float", "none", "no part"],
)
def test_what_is_no_number_is_refused(given: Any, said: str) -> None:
    with pytest.raises(UserError) as error:
        losses(Objective(term=Giving(given)))
    assert str(error.value).startswith(said)


# draws


class Drawing(Distance):
    """Weighs rows by draws."""

    def draw(self, student: Signals, teacher: Signals | None, batch: Batch, draw: Draw) -> Tensor:
        self.source = draw
        return draw.uniform(batch.index, ())

    def forward(self, student: Signals, teacher: Signals | None, batch: Batch, *draws: Any) -> Any:
        return (draws[0] * student.logits.square().mean(1)).mean()


def test_draws_are_keyed_by_seed_step_and_label() -> None:
    def value(seed: int = 0, step: int = 0, label: str = "far") -> float:
        objective = Objective({label: Drawing()}, task=0.0)
        objective.facts = Facts(seed=seed)
        total: Tensor = losses(objective, step=step).total
        return total.item()

    assert value() == value()
    assert len({value(), value(seed=1), value(step=1), value(label="near")}) == 4
    term = Drawing()
    losses(Objective(far=term), step=3)
    assert term.source == Draw(0, 3, "far")
    assert isinstance(term.student_tap, Tap)
