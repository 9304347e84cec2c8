# SPDX-License-Identifier: Apache-2.0
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from method_case import MethodCase, gaussian, gradient
from oracles import wsld as oracle
from tutelage.core import Batch, Objective, Signals
from tutelage.core.error import UserError
from tutelage.methods.logits.kd import kd
from tutelage.methods.logits.wsld import WSLD, Form, wsld
from tutelage.tasks.classification import Classification

Arrays = dict[str, NDArray[Any]]
SHAPE = {"logits": (6, 5)}
FORMS: tuple[Form, ...] = ("cross_entropy", "kl")


def case() -> MethodCase:
    return MethodCase(
        term=WSLD,
        student=lambda seed: gaussian(seed, SHAPE),
        teacher=lambda seed: gaussian(seed + 1000, SHAPE, 2.0),
    )


def drawn(seed: int = 0, rows: int = 6, classes: int = 5, scale: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """Free student logits, teacher logits, classes."""
    found = gaussian(seed, {"student": (rows, classes), "teacher": (rows, classes)}, scale)
    target = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(seed))
    return found["student"].double().requires_grad_(), found["teacher"].double(), target


# the authors' numbers


def golden(claim: str, arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    return core(arrays, meta) if claim == "core/wsld" else classic(arrays, meta)


def core(arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    for suffix, dtype in (("", torch.float64), ("_f32", torch.float32)):
        student = torch.tensor(arrays["student_logits"], dtype=dtype, requires_grad=True)
        teacher = torch.tensor(arrays["teacher_logits"], dtype=dtype)
        batch = Batch.of(torch.zeros(len(student), 1), torch.tensor(arrays["labels"]))
        term = WSLD(temperature=meta["temp"])
        loss = meta["alpha"] * case().loss(term, {"logits": student}, {"logits": teacher}, batch)
        answer |= {f"loss{suffix}": loss, f"grad_student_logits{suffix}": gradient(loss, student)}
    return answer


def classic(arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    student = torch.tensor(arrays["s_logits"], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor(arrays["t_logits"], dtype=torch.float64)
    target = torch.tensor(arrays["target"])
    loss = meta["alpha"] * wsld(student, teacher, target, temperature=meta["tau"], eps=meta["eps"])
    whole = step(student, teacher, target, meta)
    answer = {"loss": loss, "grad_s_logits": gradient(loss, student)}
    for name in ("loss_total", "loss_total_official"):
        if name in arrays:
            answer |= {name: whole, f"grad_s_logits__{name}": gradient(whole, student)}
    return answer


def step(student: Tensor, teacher: Tensor, target: Tensor, meta: dict[str, Any]) -> Tensor:
    """The weighted sum with the task's own loss, through the Objective."""
    objective = Objective(wsld=meta["alpha"] * WSLD(temperature=meta["tau"]))
    sources = {
        "student": Signals(student, {"logits": student}),
        "teacher": Signals(teacher, {"logits": teacher}),
    }
    batch = Batch.of(torch.zeros(len(student), 1), target)
    total: Tensor = objective(sources, ["student"], batch, Classification(student.shape[1]), 0).total
    return total


# the equation, worked out by loops


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 6),
    classes=st.integers(1, 10),
    temperature=st.floats(0.25, 20),
    scale=st.floats(0, 30),
)
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_loops(form: Form, seed: int, rows: int, classes: int, temperature: float, scale: float) -> None:
    student, teacher, target = drawn(seed, rows, classes, scale)
    expected = oracle.wsld(student.detach().numpy(), teacher.numpy(), target.numpy(), temperature, 1.0, form=form)
    found = wsld(student, teacher, target, temperature=temperature, form=form)
    assert found.item() == pytest.approx(expected, rel=1e-8, abs=1e-11)


def test_the_weighted_step_equals_the_loops() -> None:
    student, teacher, target = drawn(1)
    expected = oracle.total(student.detach().numpy(), teacher.numpy(), target.numpy())
    meta = {"alpha": 2.25, "tau": 4.0}
    assert step(student, teacher, target, meta).item() == pytest.approx(expected["loss"], rel=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_holds_the_weights_constant(form: Form) -> None:
    student, teacher, target = drawn(2)
    found = gradient(wsld(student, teacher, target, temperature=3.0, form=form), student)
    weights = oracle.sample_weights(student.detach().numpy(), teacher.numpy(), target.numpy())
    expected = 3 * ((student / 3).softmax(1) - (teacher / 3).softmax(1)).detach().numpy() / 6
    np.testing.assert_allclose(found.numpy(), np.array(weights)[:, None] * expected, rtol=1e-9)


# limits and identities


@pytest.mark.parametrize("form", FORMS)
def test_a_sure_teacher_gives_every_sample_its_full_weight(form: Form) -> None:
    student, teacher, target = drawn(3)
    sure = teacher + 50 * torch.eye(5, dtype=torch.float64)[target]
    found = wsld(student, sure, target, temperature=2.0, form=form)
    torch.testing.assert_close(found, kd(student, sure, temperature=2.0, form=form))


def test_a_student_far_ahead_has_nothing_to_learn() -> None:
    _, teacher, target = drawn(4)
    ahead = teacher + 60 * torch.eye(5, dtype=torch.float64)[target]
    behind = teacher - 60 * torch.eye(5, dtype=torch.float64)[target]
    assert wsld(ahead, teacher, target, form="kl").item() == pytest.approx(0, abs=1e-12)
    assert wsld(behind, teacher, target, form="kl") > 1


def test_equal_losses_weigh_one_minus_one_over_e() -> None:
    student, _, target = drawn(5)
    found = wsld(student, student.detach(), target, temperature=1.0)
    entropy = kd(student, student.detach(), temperature=1.0, form="cross_entropy")
    torch.testing.assert_close(found, (1 - np.exp(-1)) * entropy, rtol=1e-5, atol=0)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(shift=st.floats(-1e3, 1e3), seed=st.integers(0, 1000))
def test_a_constant_and_the_order_of_classes_change_nothing(shift: float, seed: int) -> None:
    student, teacher, target = drawn(seed)
    classes = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    found = wsld(student[:, classes] + shift, teacher[:, classes] - shift, classes.argsort()[target])
    torch.testing.assert_close(found, wsld(student, teacher, target), rtol=1e-8, atol=1e-9)


# labels that are not there


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), kept=st.lists(st.booleans(), min_size=6, max_size=6))
def test_without_a_label_the_teachers_class_counts(seed: int, kept: list[bool]) -> None:
    student, teacher, target = drawn(seed)
    labelled = torch.tensor(kept)
    found = wsld(student, teacher, target.where(labelled, -1), labelled)
    torch.testing.assert_close(found, wsld(student, teacher, target.where(labelled, teacher.argmax(1))))


# odd cases


def test_no_rows_give_a_connected_zero() -> None:
    student = torch.zeros(0, 5, requires_grad=True)
    loss = wsld(student, torch.zeros(0, 5), torch.zeros(0, dtype=torch.long))
    assert loss.item() == 0
    assert gradient(loss, student).shape == (0, 5)


def test_one_row_is_its_own_mean() -> None:
    student, teacher, target = drawn(7)
    each = [wsld(student[n : n + 1], teacher[n : n + 1], target[n : n + 1]) for n in range(6)]
    torch.testing.assert_close(torch.stack(each).mean(), wsld(student, teacher, target))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_extremes(form: Form, dtype: torch.dtype) -> None:
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [0, 0, 0]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [-1e4, 1e4, -1e4], [0, 0, 0]], dtype=dtype)
    target = torch.tensor([0, 1, 2])
    loss = wsld(student, teacher, target, form=form)
    expected = oracle.wsld(
        student.detach().double().numpy(), teacher.double().numpy(), target.numpy(), alpha=1.0, form=form
    )
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    grad = gradient(loss, student)
    assert grad.dtype == dtype
    assert grad.isfinite().all()


def test_autocast_does_not_reach_the_comparison() -> None:
    student, teacher, target = drawn(8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = wsld(student.float(), teacher.float(), target)
    assert inside == wsld(student.float(), teacher.float(), target)


# errors


@pytest.mark.parametrize(("student", "teacher"), [((2, 3), (2, 4)), ((2, 3, 4, 4), (2, 3, 4, 4))])
def test_logits_that_do_not_fit(student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    said = f"wsld takes two [B, K] tensors of logits: the student's are {[*student]}, the teacher's {[*teacher]}"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        wsld(torch.zeros(student), torch.zeros(teacher), torch.tensor([0, 0]))


def test_soft_labels() -> None:
    said = "wsld takes one class a row, [2], not a target of shape [2, 3]; it cannot use soft labels"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        wsld(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3))


def test_targets_that_are_no_classes() -> None:
    here = case()
    student, teacher = here.tensors()
    said = "wsld needs class labels, and this data has list for a target"
    with pytest.raises(UserError, match=f"^{said}$"):
        here.loss(WSLD(), student, teacher, replace(here.batch(), target=[{}] * 6))


def test_options_that_are_none() -> None:
    with pytest.raises(UserError, match=r"^temperature must be > 0, not 0$"):
        WSLD(temperature=0)
    with pytest.raises(UserError, match=r"^form 'ce' is not known; valid: cross_entropy, kl$"):
        WSLD(form="ce")  # type: ignore[arg-type]
