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
from torch.nn import functional as F

from method_case import MethodCase, gaussian, gradient
from oracles import fkd as oracle
from tutelage.core import Batch
from tutelage.core.error import UserError
from tutelage.methods.logits.fkd import FKD, Form, fkd, recover, store
from tutelage.methods.logits.kd import kd

Arrays = dict[str, NDArray[Any]]
SHAPE = {"logits": (6, 5)}
FORMS: tuple[Form, ...] = ("hard", "marginal_renorm", "marginal_smoothing", "smoothing")


def case() -> MethodCase:
    return MethodCase(
        term=lambda: FKD(k=2),
        student=lambda seed: gaussian(seed, SHAPE),
        teacher=lambda seed: gaussian(seed + 1000, SHAPE, 2.0),
    )


def pair(seed: int = 0, rows: int = 6, classes: int = 5, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    drawn = gaussian(seed, {"student": (rows, classes), "teacher": (rows, classes)}, scale)
    return drawn["student"].double().requires_grad_(), drawn["teacher"].double()


# the authors' numbers


def golden(claim: str, arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    """Names say what is kept: `loss_marginal_renorm_k5`, `out_recovered_smoothing`; `loss` is smoothing, k = 5."""
    teacher = torch.tensor(arrays["t_logits"], dtype=torch.float64)
    kept = {"": "marginal_smoothing_k5"}
    kept |= {name[4:]: name[5:] for name in arrays if re.fullmatch(r"loss_\w+(?<!_f32)", name)}
    answer: dict[str, Any] = {}
    for suffix, words in kept.items():
        form, _, number = words.partition("_k")
        options: dict[str, Any] = {"form": form, "k": int(number or 1)}
        student = torch.tensor(arrays["s_logits"], dtype=torch.float64, requires_grad=True)
        term = FKD(temperature=meta["student_temp"], **options)
        loss = case().loss(term, {"logits": student}, {"logits": teacher}, case().batch())
        grad = f"grad_s_logits__loss{suffix}" if suffix else "grad_s_logits"
        index, value = store(teacher, **options)
        answer |= {f"loss{suffix}": loss, grad: gradient(loss, student)}
        answer[f"out_recovered_{words}"] = recover(index, value, meta["num_classes"], form=options["form"])
        if form == "hard":
            answer[f"out_quantized_{words}"] = index[:, 0]
        elif form == "smoothing":
            answer[f"out_quantized_{words}"] = torch.cat([index, value], dim=1)
        else:
            answer[f"out_quantized_{words}"] = torch.stack([index, value], dim=1)
    return {name: value for name, value in answer.items() if name in arrays}


# the equation, worked out by loops


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 6),
    classes=st.integers(2, 10),
    k=st.integers(1, 9),
    temperature=st.floats(0.25, 20),
    scale=st.floats(0, 30),
)
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_loops(
    form: Form, seed: int, rows: int, classes: int, k: int, temperature: float, scale: float
) -> None:
    student, teacher = pair(seed, rows, classes, scale)
    k = min(k, classes - 1)  # the loops divide by what is left
    dense = oracle.recovered(teacher.numpy(), form, k)
    np.testing.assert_allclose(
        recover(*store(teacher, form=form, k=k), classes, form=form).numpy(), dense, rtol=1e-9, atol=1e-12
    )
    expected = oracle.fkd(student.detach().numpy(), teacher.numpy(), form, k, temperature)
    found = fkd(student, teacher, form=form, k=k, temperature=temperature)
    assert found.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: Form) -> None:
    student, teacher = pair(1, rows=3, classes=4)
    assert torch.autograd.gradcheck(lambda s: fkd(s, teacher, form=form, k=2, temperature=2.0), student)


# limits and identities


@pytest.mark.parametrize("form", ["marginal_smoothing", "marginal_renorm"])
@pytest.mark.parametrize("k", [5, 9])
def test_with_every_class_kept_it_is_kd_with_the_teachers_entropy(form: Form, k: int) -> None:
    student, teacher = pair(2)
    whole = kd(student, teacher, temperature=1.0, form="cross_entropy")
    torch.testing.assert_close(fkd(student, teacher, form=form, k=k), whole)
    torch.testing.assert_close(fkd(student, teacher, k=4), whole)  # the last class gets what is left


def test_hard_is_cross_entropy_with_the_teachers_class() -> None:
    student, teacher = pair(3)
    torch.testing.assert_close(fkd(student, teacher, form="hard"), F.cross_entropy(student, teacher.argmax(1)))


def test_smoothing_keeps_one() -> None:
    student, teacher = pair(4)
    expected = fkd(student, teacher, form="marginal_smoothing", k=1)
    torch.testing.assert_close(fkd(student, teacher, form="smoothing", k=3), expected)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(shift=st.floats(-1e3, 1e3), seed=st.integers(0, 1000))
@pytest.mark.parametrize("form", FORMS)
def test_a_constant_and_the_order_of_classes_change_nothing(form: Form, shift: float, seed: int) -> None:
    student, teacher = pair(seed)
    classes = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    found = fkd(student[:, classes] + shift, teacher[:, classes] - shift, form=form, k=2)
    torch.testing.assert_close(found, fkd(student, teacher, form=form, k=2), rtol=1e-8, atol=1e-9)


def test_the_gradient_is_that_of_a_label() -> None:
    student, teacher = pair(5)
    target = recover(*store(teacher, k=2), 5)
    expected = (student.softmax(1) - target).detach() / 6
    torch.testing.assert_close(gradient(fkd(student, teacher, k=2), student), expected)


# odd cases


@pytest.mark.parametrize("form", FORMS)
def test_no_rows_give_a_connected_zero(form: Form) -> None:
    student = torch.zeros(0, 5, requires_grad=True)
    loss = fkd(student, torch.zeros(0, 5), form=form)
    assert loss.item() == 0
    assert gradient(loss, student).shape == (0, 5)


@pytest.mark.parametrize("form", FORMS)
def test_one_row_is_its_own_mean(form: Form) -> None:
    student, teacher = pair(6)
    each = [fkd(student[n : n + 1], teacher[n : n + 1], form=form) for n in range(6)]
    torch.testing.assert_close(torch.stack(each).mean(), fkd(student, teacher, form=form))


def test_labels_and_their_absence_do_not_matter() -> None:
    student, teacher = case().tensors()
    bare = Batch.of(torch.zeros(6, 1))
    assert case().loss(FKD(), student, teacher, case().batch()) == case().loss(FKD(), student, teacher, bare)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_extremes(form: Form, dtype: torch.dtype) -> None:
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [0, 0, 0]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [-1e4, 1e4, -1e4], [0, 0, 0]], dtype=dtype)
    loss = fkd(student, teacher, form=form, k=2)
    expected = oracle.fkd(student.detach().double().numpy(), teacher.double().numpy(), form, 2)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert gradient(loss, student).isfinite().all()


def test_autocast_does_not_reach_the_comparison() -> None:
    student, teacher = (part.detach().float() for part in pair(7))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = fkd(student, teacher, k=2)
    assert inside == fkd(student, teacher, k=2)


# errors


def test_logits_of_two_shapes() -> None:
    said = "fkd takes two [B, K] tensors of logits: the student's are [2, 3], the teacher's [2, 4]"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        fkd(torch.zeros(2, 3), torch.zeros(2, 4))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"form": "soft"},
            "form 'soft' is not known; valid: hard, marginal_renorm, marginal_smoothing, smoothing",
        ),
        ({"k": 0}, "k is the number of classes kept, at least 1, not 0"),
        ({"temperature": 0}, "temperature must be > 0, not 0"),
    ],
)
def test_options_that_are_none(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        FKD(**options)
