# SPDX-License-Identifier: Apache-2.0
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from method_case import MethodCase, gaussian, gradient
from oracles import ttm as oracle
from tutelage.core.error import UserError
from tutelage.methods.logits.kd import kd
from tutelage.methods.logits.ttm import TTM, Form, ttm

Arrays = dict[str, NDArray[Any]]
SHAPE = {"logits": (6, 5)}
FORMS: dict[Form, str] = {"plain": "ttm", "weighted": "wttm"}  # ours, the oracle's


def case() -> MethodCase:
    return MethodCase(
        term=lambda: TTM(gamma=0.5, form="weighted"),
        student=lambda seed: gaussian(seed, SHAPE),
        teacher=lambda seed: gaussian(seed + 1000, SHAPE, 2.0),
    )


def pair(seed: int = 0, rows: int = 6, classes: int = 5, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    drawn = gaussian(seed, {"student": (rows, classes), "teacher": (rows, classes)}, scale)
    return drawn["student"].double().requires_grad_(), drawn["teacher"].double()


# the authors' numbers


def golden(claim: str, arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    for form, name in (("plain", ""), ("weighted", "_wttm")):
        student = torch.tensor(arrays["s_logits"], dtype=torch.float64, requires_grad=True)
        teacher = torch.tensor(arrays["t_logits"], dtype=torch.float64)
        term = TTM(gamma=meta["gamma"], form=form)  # type: ignore[arg-type]
        loss = case().loss(term, {"logits": student}, {"logits": teacher}, case().batch())
        answer |= {f"loss{name}": loss, f"grad_s_logits{name and '__loss_wttm'}": gradient(loss, student)}
    return answer


# the equation, worked out by loops


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 6),
    classes=st.integers(1, 10),
    gamma=st.floats(0.05, 2),
    scale=st.floats(0, 30),
)
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_loops(form: Form, seed: int, rows: int, classes: int, gamma: float, scale: float) -> None:
    student, teacher = pair(seed, rows, classes, scale)
    expected = oracle.ttm(student.detach().numpy(), teacher.numpy(), gamma)[FORMS[form]]
    assert ttm(student, teacher, gamma=gamma, form=form).item() == pytest.approx(expected, rel=1e-9, abs=1e-11)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: Form) -> None:
    student, teacher = pair(1, rows=3, classes=4)
    assert torch.autograd.gradcheck(lambda s: ttm(s, teacher, gamma=0.3, form=form), student)


# limits and identities


def test_at_power_1_it_is_kd_at_temperature_1() -> None:
    student, teacher = pair(2)
    for form in FORMS:  # all powers sum to 1 then
        torch.testing.assert_close(ttm(student, teacher, gamma=1.0, form=form), kd(student, teacher, temperature=1.0))


def test_the_gradient_is_that_of_a_softened_label() -> None:
    student, teacher = pair(3)
    expected = (student.softmax(1) - (teacher / 4).softmax(1)).detach() / 6
    torch.testing.assert_close(gradient(ttm(student, teacher, gamma=1 / 4), student), expected)


def test_a_vanishing_power_asks_for_equal_probabilities() -> None:
    student, teacher = pair(4)
    expected = -student.log_softmax(1).mean(1).mean() - np.log(5)
    torch.testing.assert_close(ttm(student, teacher, gamma=1e-9), expected, rtol=1e-7, atol=0)
    weighted = ttm(student, teacher, gamma=1e-9, form="weighted")
    torch.testing.assert_close(weighted, 5 * expected, rtol=1e-7, atol=0)


def test_flat_teachers_weigh_more() -> None:
    student, _ = pair(5, rows=1)
    flat, sharp = torch.zeros(1, 5, dtype=torch.float64), 40 * torch.eye(5, dtype=torch.float64)[:1]
    for teacher, weight in ((flat, 5**0.8), (sharp, 1 + 4 * np.exp(-0.2 * 40))):
        one, other = (ttm(student, teacher, gamma=0.2, form=form) for form in FORMS)
        assert (other / one).item() == pytest.approx(weight, rel=1e-6)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(shift=st.floats(-1e3, 1e3), seed=st.integers(0, 1000))
@pytest.mark.parametrize("form", FORMS)
def test_a_constant_and_the_order_of_classes_change_nothing(form: Form, shift: float, seed: int) -> None:
    student, teacher = pair(seed)
    classes = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    found = ttm(student[:, classes] + shift, teacher[:, classes] - shift, form=form)
    torch.testing.assert_close(found, ttm(student, teacher, form=form), rtol=1e-8, atol=1e-9)


def test_masked_classes_count_nothing() -> None:
    student, teacher = pair(6, classes=4)
    gap = torch.full((6, 1), -torch.inf, dtype=torch.float64)
    for form in FORMS:
        loss = ttm(torch.cat([student, gap], dim=1), torch.cat([teacher, gap], dim=1), form=form)
        torch.testing.assert_close(loss, ttm(student, teacher, form=form))
        assert gradient(loss, student).isfinite().all()


# odd cases


@pytest.mark.parametrize("form", FORMS)
def test_no_rows_give_a_connected_zero(form: Form) -> None:
    student = torch.zeros(0, 5, requires_grad=True)
    loss = ttm(student, torch.zeros(0, 5), form=form)
    assert loss.item() == 0
    assert gradient(loss, student).shape == (0, 5)


@pytest.mark.parametrize("form", FORMS)
def test_one_row_is_its_own_mean(form: Form) -> None:
    student, teacher = pair(7)
    each = [ttm(student[n : n + 1], teacher[n : n + 1], form=form) for n in range(6)]
    torch.testing.assert_close(torch.stack(each).mean(), ttm(student, teacher, form=form))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_extremes(form: Form, dtype: torch.dtype) -> None:
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [0, 0, 0]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [-1e4, 1e4, -1e4], [0, 0, 0]], dtype=dtype)
    loss = ttm(student, teacher, form=form)
    expected = oracle.ttm(student.detach().double().numpy(), teacher.double().numpy(), 0.1)[FORMS[form]]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert gradient(loss, student).isfinite().all()


def test_autocast_does_not_reach_the_comparison() -> None:
    student, teacher = (part.detach().float() for part in pair(8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = ttm(student, teacher, form="weighted")
    assert inside == ttm(student, teacher, form="weighted")


# errors


def test_logits_of_two_shapes() -> None:
    said = "ttm compares logits of one shape: the student's are [2, 3], the teacher's [2, 4]"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        ttm(torch.zeros(2, 3), torch.zeros(2, 4))


def test_options_that_are_none() -> None:
    with pytest.raises(UserError, match=r"^gamma must be > 0, not 0$"):
        TTM(gamma=0)
    with pytest.raises(UserError, match=r"^form 'wttm' is not known; valid: plain, weighted$"):
        TTM(form="wttm")  # type: ignore[arg-type]
