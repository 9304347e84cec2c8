# SPDX-License-Identifier: Apache-2.0
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tiny_recipe import KD_MGD, MODEL
from tutelage.core import Batch, Facts, Feeder, Signals, Term
from tutelage.core.error import UserError
from tutelage.run import distill as distill_module
from tutelage.run.assemble import Assembled, assemble
from tutelage.run.check import check, duration
from tutelage.run.distill import distill
from tutelage.run.recipe import Recipe, parse
from tutelage.run.untouched import untouched


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.py").write_text(MODEL)


def tiny(**sections: Any) -> Recipe:
    return parse({**KD_MGD, **sections})


class Silent(Term):
    """Gives no gradient."""

    def forward(self, student: Signals, teacher: Signals | None, batch: Batch, *draws: Any) -> Tensor:
        return 0.0 * student.logits.sum()


class Infinite(Term):
    """Is not finite."""

    def forward(self, student: Signals, teacher: Signals | None, batch: Batch, *draws: Any) -> Tensor:
        return student.logits.sum() / 0.0


class Warns(Term):
    """Says that it means little here."""

    def forward(self, student: Signals, teacher: Signals | None, batch: Batch, *draws: Any) -> Tensor:
        return student.logits.square().mean()

    def caveats(self, facts: Facts) -> tuple[str, ...]:
        return (f"with {facts.num_classes} classes this means little",)


class Counts(Feeder):
    """Remembers how often it was asked."""

    def __init__(self) -> None:
        self.count = torch.zeros(())

    def feed(self, batch: Batch, *others: Any) -> Iterator[Batch]:
        self.count += 1
        yield batch

    def state(self) -> dict[str, Tensor]:
        return {"count": self.count}


def everything(made: Assembled) -> dict[str, Any]:
    distiller = made.distiller
    parts: dict[str, nn.Module] = {"distiller": distiller}
    parts |= {f"teacher {n}": one for n, t in distiller.teachers.items() for one in t.networks()}
    state: dict[str, Any] = {
        f"{part}.{name}": tensor.clone() for part, one in parts.items() for name, tensor in one.state_dict().items()
    }
    state |= {f"{part} {name}": m.training for part, one in parts.items() for name, m in one.named_modules()}
    state["gradients"] = [p.grad is None for p in distiller.parameters()]
    state["step"], state["random"] = distiller.step, torch.get_rng_state()
    return state


def same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)


# --- what is found ---------------------------------------------------------------------------------------------


def test_values_gradients_and_shares() -> None:
    made = assemble(tiny())
    found = check(made)
    assert list(found.losses) == ["task", "kd", "mgd"]
    assert [one.weight for one in found.losses.values()] == [0.5, 0.5, 0.1]
    weighted = {label: one.weight * one.gradient for label, one in found.losses.items()}
    for label, one in found.losses.items():
        assert one.share == pytest.approx(weighted[label] / sum(weighted.values()))
    assert found.teacher is not None
    assert set(found.teacher) == {"top1", "top5", "loss", "ece"}
    assert found.steps == 4
    assert found.seconds > 0
    assert found.memory is None
    assert found.inputs == {"student": "as they come", "teacher": "as they come"}
    assert found.plain()["losses"]["kd"]["weight"] == 0.5


def test_the_gradient_is_the_one_of_the_first_batches() -> None:
    made = assemble(tiny(objective={"task": 1.0}, teacher=None))
    found = check(made)
    distiller = made.distiller
    batch = next(made.data.train.epoch(0))
    distiller.train()
    losses = distiller(batch)
    losses.total.backward()
    first = torch.stack([p.grad.norm() for p in distiller.student.parameters() if p.grad is not None]).norm()
    # the mean of two steps, the second one after an update: near the first, not equal to it
    assert found.losses["task"].gradient == pytest.approx(float(first), rel=0.5)
    assert found.losses["task"].gradient != float(first)


def test_a_loss_without_gradient_is_an_error() -> None:
    made = assemble(tiny(objective={"task": 1.0, "still": {"method": f"{__name__}:Silent"}}, teacher=None))
    with pytest.raises(UserError, match=r"^objective.still: its gradient on the student is zero on two steps: it"):
        check(made)


def test_a_schedule_counts_with_its_end() -> None:
    """A loss that is off at first is looked at as it will be."""
    ramp = {"linear": [0, 0.5], "until": "2 steps"}
    found = check(assemble(tiny(objective={"task": 1.0, "kd": {"weight": ramp}})))
    assert found.losses["kd"].weight == 0.5
    assert found.losses["kd"].share > 0


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    made = assemble(tiny(objective={"task": 1.0, "far": {"method": f"{__name__}:Infinite"}}, teacher=None))
    with pytest.raises(UserError, match=r"^objective.far: not finite on the first batches"):
        check(made)


def test_remarks_tell_of_lost_meaning_and_of_untrained_teachers() -> None:
    objective = {"task": 1.0, "kd": 0.5, "odd": {"method": f"{__name__}:Warns"}}
    found = check(assemble(tiny(objective=objective)))
    assert found.remarks[0] == "odd: with 10 classes this means little"
    assert found.remarks[1].endswith("little more than chance: is it trained?")
    assert found.brief[0].startswith("the student's gradient comes from task ")
    assert found.brief[1] == f"look: {found.remarks[0]}"
    assert found.brief[-1] == "4 steps, a few seconds"
    assert replace(found, steps=1).forecast == "1 step, a few seconds"
    assert check(assemble(tiny()), fitted=False).remarks == (
        "the teacher is fitted to the data before the training: what it says here means nothing yet",
    )


def test_durations_are_said_as_people_do() -> None:
    said = [duration(seconds) for seconds in (3, 61, 119, 5399, 5400, 100_000)]
    assert said[:3] == ["a few seconds", "about 1 minute", "about 2 minutes"]
    assert said[3:] == ["about 90 minutes", "about 1.5 hours", "about 27.8 hours"]


# --- what is left ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["eval", "batch_statistics", "train"])
def test_nothing_is_changed(mode: str) -> None:
    small = {"model": "python:model.py:small", "norm": True, "dropout": 0.5}
    made = assemble(tiny(student=small, teacher={**small, "width": 6, "mode": mode}))
    feeder = Counts()
    made.distiller.feeders = (feeder,)
    before = everything(made)
    check(made)
    after = everything(made)
    assert [name for name in before if not same(before[name], after[name])] == []
    assert feeder.count == 0


def test_a_look_is_undone_even_if_it_fails() -> None:
    made = assemble(tiny())
    before = everything(made)

    def spoil() -> None:
        with untouched(made), torch.no_grad():
            for parameter in made.distiller.parameters():
                parameter.add_(1.0)
            made.distiller.step = 7
            torch.rand(3)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        spoil()
    assert all(same(before[name], after) for name, after in everything(made).items())


def test_a_checked_run_ends_with_the_bits_of_an_unchecked_one(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"model": "python:model.py:small", "norm": True, "dropout": 0.5}
    recipe = tiny(student=small, train={"steps": 3, "save_every": None, "ema": 0.5})
    checked = distill(recipe, Path("checked"), quiet=True).student.module.state_dict()

    class Nothing:
        brief: tuple[str, ...] = ()

    monkeypatch.setattr(distill_module, "check", lambda made: Nothing())
    other = distill(recipe, Path("unchecked"), quiet=True).student.module.state_dict()
    assert list(checked) == list(other)
    assert all(torch.equal(checked[name], other[name]) for name in checked)


def test_a_run_is_checked_before_anything_is_written() -> None:
    objective = {"task": 1.0, "still": {"method": f"{__name__}:Silent"}}
    with pytest.raises(UserError, match="teaches nothing"):
        distill(tiny(objective=objective, teacher=None), Path("run"), quiet=True)
    assert not Path("run").exists()


def test_a_finished_or_resumed_run_is_not_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny(train={"steps": 2, "save_every": "1 steps"})
    distill(recipe, Path("run"), quiet=True)
    Path("run/result.json").unlink()
    monkeypatch.setattr(distill_module, "check", lambda made: pytest.fail("checked"))
    said: list[str] = []
    distill(recipe, Path("run"), quiet=True, say=said.append)
    assert any("step_000000002" in line for line in said)
    start = time.perf_counter()
    distill(recipe, Path("run"), quiet=True)
    assert time.perf_counter() - start < 5


def test_reading_processes_start_again_after_the_check() -> None:
    one, other = (
        distill(
            tiny(
                data={"source": "digits", "batch_size": 300, "workers": workers}, train={"steps": 5, "save_every": None}
            ),
            Path(f"workers-{workers}"),
            quiet=True,
        ).student.module.state_dict()
        for workers in (0, 1)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
