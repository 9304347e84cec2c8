# SPDX-License-Identifier: Apache-2.0
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from method_case import MethodCase, gaussian, gradient
from oracles import dml as oracle
from tutelage.core import Batch, Distiller, Objective, Signals
from tutelage.core.error import UserError
from tutelage.core.objective import Entry
from tutelage.methods.logits.kd import kd
from tutelage.methods.online.dml import DML, Form, dml
from tutelage.models.load import load as load_model
from tutelage.run.distill import distill
from tutelage.run.quick import recipe as quick_recipe
from tutelage.run.recipe import parse
from tutelage.tasks.classification import Classification

Arrays = dict[str, NDArray[Any]]
FORMS: dict[Form, str] = {"exact": "paper", "shifted": "code"}  # ours, the oracle's


def case(**options: Any) -> MethodCase:
    return MethodCase(
        term=lambda: DML(**options),
        student=lambda seed: gaussian(seed, {"logits": (6, 5)}),
        teacher=lambda seed: gaussian(seed + 1000, {"logits": (6, 5)}, 2.0),
    )


def pair(seed: int = 0, rows: int = 6, classes: int = 5, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    drawn = gaussian(seed, {"student": (rows, classes), "peer": (rows, classes)}, scale)
    return drawn["student"].double().requires_grad_(), drawn["peer"].double().requires_grad_()


def cohort(logits: list[Tensor], target: Tensor) -> Any:
    """One step of students that all learn from each other, through the Objective: its losses."""
    names = [f"net{n}" for n in range(len(logits))]
    entries = {
        f"{one}_from_{other}": Entry(DML(), weight=1 / (len(names) - 1), student=one, teacher=other)
        for one in names
        for other in names
        if one != other
    }
    sources = {name: Signals(given_, {"logits": given_}) for name, given_ in zip(names, logits, strict=True)}
    batch = Batch.of(torch.zeros(len(target), 1), target)
    return Objective(entries, task=1.0)(sources, names, batch, Classification(logits[0].shape[1]), 0)


# the authors' numbers


def golden(claim: str, arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    target, count = torch.tensor(arrays["target"]), meta["num_networks"]
    for suffix, dtype in (("", torch.float64), ("_f32", torch.float32)):
        logits = [torch.tensor(arrays[f"logits_{n}"], dtype=dtype, requires_grad=True) for n in range(count)]
        found: dict[str, Tensor] = {}
        for own in range(count):
            peers = [n for n in range(count) if n != own]
            for peer in peers:
                fixed = logits[peer].detach()
                found[f"loss_kl_net{own}_from{peer}"] = dml(logits[own], fixed)
                found[f"alt_tfofficial_kl_net{own}_from{peer}"] = dml(logits[own], fixed, form="shifted")
            entries = {
                f"from_{peer}": Entry(DML(), weight=1 / len(peers), student="own", teacher=f"peer{peer}")
                for peer in peers
            }
            sources = {"own": Signals(logits[own], {"logits": logits[own]})} | {
                f"peer{peer}": Signals(None, {"logits": logits[peer].detach()}) for peer in peers
            }
            batch = Batch.of(torch.zeros(len(target), 1), target)
            task = Classification(logits[own].shape[1])
            total: Tensor = Objective(entries, task=1.0)(sources, ["own"], batch, task, 0).total
            found["loss" if own == 0 else f"loss_net{own}"] = total
        for name, loss in found.items():
            answer[f"{name}{suffix}"] = loss
            marker = "" if name == "loss" else f"__{name}"
            slopes = torch.autograd.grad(loss, logits, allow_unused=True)
            for n, slope in enumerate(slopes):
                zero = torch.zeros_like(logits[n])
                answer[f"grad_logits_{n}{marker}{suffix}"] = zero if slope is None else slope
    return {name: value for name, value in answer.items() if name in arrays}


# the equation, worked out by loops


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 6), classes=st.integers(1, 8), scale=st.floats(0, 20))
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_loops(form: Form, seed: int, rows: int, classes: int, scale: float) -> None:
    student, peer = pair(seed, rows, classes, scale)
    expected = oracle.peer_kl(student.detach().numpy(), peer.detach().numpy(), FORMS[form])
    assert dml(student, peer, form=form).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_cohort_equals_the_loops(count: int) -> None:
    logits = [gaussian(n, {"z": (6, 5)}, 2.0)["z"].double().requires_grad_() for n in range(count)]
    target = torch.tensor([0, 4, 2, 2, 1, 3])
    arrays = [one.detach().numpy() for one in logits]
    expected = [oracle.dml(arrays, target.numpy(), own) for own in range(count)]
    losses = cohort(logits, target)
    assert losses.total.item() == pytest.approx(sum(one["loss"] for one in expected), rel=1e-10)
    for own, one in enumerate(expected):
        assert losses.parts[f"task.net{own}"].item() == pytest.approx(one["ce"], rel=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: Form) -> None:
    student, peer = pair(2, rows=3, classes=4)
    assert torch.autograd.gradcheck(lambda s: dml(s, peer.detach(), form=form), student)


# limits and identities


def test_it_is_kd_without_a_temperature() -> None:
    student, peer = pair(3)
    torch.testing.assert_close(dml(student, peer), kd(student, peer, temperature=1.0))


def test_the_shift_moves_little() -> None:
    student, peer = pair(4)
    torch.testing.assert_close(dml(student, peer, form="shifted"), dml(student, peer), rtol=1e-4, atol=1e-6)
    assert dml(student, peer, form="shifted") != dml(student, peer)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_to_learn_from_ones_double(form: Form) -> None:
    student, _ = pair(5)
    loss = dml(student, student.detach(), form=form)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert gradient(loss, student).abs().max() < 1e-7


# students of one cohort


def test_each_student_learns_from_its_own_loss_alone() -> None:
    logits = [gaussian(n, {"z": (4, 3)}, 2.0)["z"].double().requires_grad_() for n in range(3)]
    target = torch.tensor([0, 2, 1, 0])
    joint = torch.autograd.grad(cohort(logits, target).total, logits)
    for own, slope in enumerate(joint):
        fixed = [one if n == own else one.detach() for n, one in enumerate(logits)]
        own_loss = torch.nn.functional.cross_entropy(fixed[own], target)
        own_loss = own_loss + sum(dml(fixed[own], fixed[n]) for n in range(3) if n != own) / 2
        torch.testing.assert_close(slope, torch.autograd.grad(own_loss, logits[own])[0])


def test_students_train_together_and_their_gradients_stay_apart() -> None:
    torch.manual_seed(0)
    students = {"student": nn.Linear(4, 3), "peer": nn.Linear(4, 3)}
    objective = Objective(
        {"dml": Entry(DML(), teacher="peer"), "peer": Entry(DML(), student="peer", teacher="student")}
    )
    batch = Batch.of(torch.randn(6, 4), torch.tensor([0, 1, 2, -1, 0, 1]))
    machine = Distiller(students, objective, task=Classification(3), sample=batch)
    optimizer = torch.optim.SGD(machine.param_groups(), lr=0.5)
    apart = []
    for _ in range(30):
        losses = machine(batch)
        losses.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        machine.after_step(losses)
        apart.append(losses.parts["dml"].item() + losses.parts["peer"].item())
    assert apart[-1] < 0.2 * apart[0]
    assert set(losses.parts) == {"task.student", "task.peer", "dml", "peer"}
    machine.close()


def test_a_peer_stays_fixed_unless_it_is_live() -> None:
    batch = Batch.of(torch.randn(6, 4), torch.tensor([0, 1, 2, -1, 0, 1]))
    for live in (False, True):
        students = {"student": nn.Linear(4, 3), "peer": nn.Linear(4, 3)}
        objective = Objective({"dml": Entry(DML(), teacher="peer", live=live)}, task=1.0)
        machine = Distiller(students, objective, task=Classification(3), sample=batch)
        machine(batch).total.backward()
        with_dml = students["peer"].weight.grad
        assert with_dml is not None
        alone = torch.autograd.grad(
            Classification(3).loss(students["peer"](batch.inputs), batch), students["peer"].weight
        )[0]
        assert torch.allclose(with_dml, alone) != live
        machine.close()


RECIPE: dict[str, Any] = {
    "student": {"model": "tutelage:resnet8", "width": 0.25},
    "peers": {"peer": {"model": "tutelage:resnet8", "width": 0.25}},
    "data": {"source": "digits", "batch_size": 64},
    "objective": {
        "task": 1.0,
        "dml": {"weight": 1.0, "teacher": "peer"},
        "back": {"method": "dml", "student": "peer", "teacher": "student"},
    },
    "train": {"steps": 2, "save_every": None},
}


def test_a_recipe_names_several_students(tmp_path: Path) -> None:
    found = distill(parse(RECIPE), tmp_path, quiet=True)
    assert 0 <= found.scores["top1"] <= 1
    metrics = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    assert all(word in metrics for word in ("task.student", "task.peer", '"dml"', '"back"'))
    peer = load_model(f"run:{tmp_path / 'peers' / 'peer'}")  # what learnt along is kept beside the student
    student = load_model(f"run:{tmp_path}")
    assert peer.module.state_dict().keys() == student.module.state_dict().keys()


def test_quick_flags_make_peers_of_the_students_kind() -> None:
    made = quick_recipe(student="tutelage:resnet8", data="digits", method="dml")
    assert made.peers["peer"].model == "tutelage:resnet8"
    assert made.teacher is None


def test_a_peer_that_nobody_reads(tmp_path: Path) -> None:
    said = "peers.other: no term of the objective reads it; name it as a term's student or teacher"
    changed = {**RECIPE, "peers": {**RECIPE["peers"], "other": "tutelage:resnet8"}}
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        distill(parse(changed), tmp_path, quiet=True)


# odd cases


def test_no_rows_give_a_connected_zero() -> None:
    student = torch.zeros(0, 5, requires_grad=True)
    loss = dml(student, torch.zeros(0, 5))
    assert loss.item() == 0
    assert gradient(loss, student).shape == (0, 5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_extremes(form: Form, dtype: torch.dtype) -> None:
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]], dtype=dtype, requires_grad=True)
    peer = torch.tensor([[-1e4, 1e4, 0.0], [-1e4, 1e4, -1e4]], dtype=dtype)
    loss = dml(student, peer, form=form)
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert gradient(loss, student).isfinite().all()


# errors


def test_logits_of_two_shapes() -> None:
    said = "dml compares logits of one shape: the student's are [2, 3], the peer's [2, 4]"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        dml(torch.zeros(2, 3), torch.zeros(2, 4))


def test_options() -> None:
    with pytest.raises(UserError, match=re.escape("form 'sum' is not known; valid: exact, shifted")):
        DML(form="sum")  # type: ignore[arg-type]
