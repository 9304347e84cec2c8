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
from oracles import kd as oracle
from tutelage.core import Batch, Objective, Signals
from tutelage.core.error import UserError
from tutelage.methods.logits.kd import KD, kd
from tutelage.tasks.classification import Classification

Arrays = dict[str, NDArray[Any]]
SHAPE = {"logits": (6, 5)}


def case() -> MethodCase:
    return MethodCase(
        term=KD,
        student=lambda seed: gaussian(seed, SHAPE),
        teacher=lambda seed: gaussian(seed + 1000, SHAPE, 2.0),
    )


def pair(seed: int = 0, rows: int = 6, classes: int = 5, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    drawn = gaussian(seed, {"student": (rows, classes), "teacher": (rows, classes)}, scale)
    return drawn["student"].double().requires_grad_(), drawn["teacher"].double()


# the authors' numbers


def golden(claim: str, arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    return core(arrays, meta) if claim == "core/kd" else classic(arrays, meta)


def core(arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    for suffix, dtype in (("", torch.float64), ("_f32", torch.float32)):
        student = torch.tensor(arrays["student_logits"], dtype=dtype, requires_grad=True)
        teacher = torch.tensor(arrays["teacher_logits"], dtype=dtype)
        term = KD(temperature=meta["temp"], form="cross_entropy")
        loss = meta["alpha"] * case().loss(term, {"logits": student}, {"logits": teacher}, case().batch())
        answer |= {f"loss{suffix}": loss, f"grad_student_logits{suffix}": gradient(loss, student)}
    return answer


def classic(arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    student = torch.tensor(arrays["s_logits"], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor(arrays["t_logits"], dtype=torch.float64)
    loss = kd(student, teacher, temperature=meta["temperature"])
    weighted = step(student, teacher, torch.tensor(arrays["target"]), meta)
    single = kd(student.detach().float(), teacher.float(), temperature=meta["temperature"])
    return {
        "loss": loss,
        "grad_s_logits": gradient(loss, student),
        "loss_total_weighted": weighted,
        "grad_s_logits__loss_total_weighted": gradient(weighted, student),
        "loss_f32": single,
    }


def step(student: Tensor, teacher: Tensor, target: Tensor, meta: dict[str, Any]) -> Tensor:
    """The weighted sum with the task's own loss, through the Objective."""
    objective = Objective(task=meta["ce_weight"], kd=meta["kd_weight"] * KD(temperature=meta["temperature"]))
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
    rows=st.integers(1, 7),
    classes=st.integers(1, 12),
    temperature=st.floats(0.25, 20),
    scale=st.floats(0, 30),
)
@pytest.mark.parametrize("form", ["kl", "cross_entropy"])
def test_equals_the_loops(form: Any, seed: int, rows: int, classes: int, temperature: float, scale: float) -> None:
    student, teacher = pair(seed, rows, classes, scale)
    expected = oracle.kd(student.detach().numpy(), teacher.numpy(), temperature=temperature, form=form)
    found = kd(student, teacher, temperature=temperature, form=form)
    assert found.item() == pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_the_weighted_step_equals_the_loops() -> None:
    student, teacher = pair(3)
    target = torch.tensor([0, 4, 2, 2, 1, 3])
    meta = {"ce_weight": 0.1, "kd_weight": 0.9, "temperature": 4.0}
    expected = oracle.total(student.detach().numpy(), teacher.numpy(), target.numpy())
    assert step(student, teacher, target, meta).item() == pytest.approx(expected["loss"], rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_equals_the_library(temperature: float) -> None:
    student, teacher = pair(1)
    log_probs = F.log_softmax(student / temperature, dim=1)
    expected = F.kl_div(log_probs, (teacher / temperature).softmax(1), reduction="batchmean") * temperature**2
    torch.testing.assert_close(kd(student, teacher, temperature=temperature), expected)


@pytest.mark.parametrize("form", ["kl", "cross_entropy"])
def test_gradcheck(form: Any) -> None:
    student, teacher = pair(2, rows=3, classes=4)
    assert torch.autograd.gradcheck(lambda s: kd(s, teacher, temperature=2.0, form=form), student)


# limits and identities


def test_the_gradient_is_the_difference_of_probabilities() -> None:
    student, teacher = pair(4)
    expected = 3 * ((student / 3).softmax(1) - (teacher / 3).softmax(1)) / len(student)
    torch.testing.assert_close(gradient(kd(student, teacher, temperature=3.0), student), expected.detach())


def test_the_forms_differ_by_the_teachers_entropy() -> None:
    student, teacher = pair(5)
    kl, ce = (kd(student, teacher, temperature=2.0, form=form) for form in ("kl", "cross_entropy"))
    entropy = torch.distributions.Categorical(logits=teacher / 2).entropy().mean()
    torch.testing.assert_close(ce - kl, 4 * entropy)
    torch.testing.assert_close(gradient(kl, student), gradient(ce, student))


def test_nothing_to_learn_from_oneself() -> None:
    student, _ = pair(6)
    loss = kd(student, student.detach())
    assert loss.item() == pytest.approx(0, abs=1e-14)
    assert gradient(loss, student).abs().max() < 1e-14


@settings(max_examples=20, deadline=None, derandomize=True)
@given(shift=st.floats(-1e3, 1e3), seed=st.integers(0, 1000))
def test_a_constant_added_to_all_classes_changes_nothing(shift: float, seed: int) -> None:
    student, teacher = pair(seed)
    torch.testing.assert_close(kd(student + shift, teacher - shift), kd(student, teacher), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("temperature", "within"), [(100.0, 2e-2), (10_000.0, 2e-4)])
def test_at_high_temperature_it_is_half_the_squared_difference_of_centred_logits(
    temperature: float, within: float
) -> None:
    student, teacher = pair(7)
    centred = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    expected = centred.square().mean().item() / 2
    assert kd(student, teacher, temperature=temperature).item() == pytest.approx(expected, rel=within)


def test_masked_classes_count_nothing() -> None:
    student, teacher = pair(8, classes=4)
    gap = torch.full((6, 1), -torch.inf, dtype=torch.float64)
    with_gap = torch.cat([student, gap], dim=1)
    loss = kd(with_gap, torch.cat([teacher, gap], dim=1))
    torch.testing.assert_close(loss, kd(student, teacher))
    assert gradient(loss, student).isfinite().all()


# odd cases


def test_no_rows_give_a_connected_zero() -> None:
    student = torch.zeros(0, 5, requires_grad=True)
    loss = kd(student, torch.zeros(0, 5))
    assert loss.item() == 0
    assert gradient(loss, student).shape == (0, 5)


def test_one_row_is_its_own_mean() -> None:
    student, teacher = pair(9)
    each = [kd(student[n : n + 1], teacher[n : n + 1]) for n in range(6)]
    torch.testing.assert_close(torch.stack(each).mean(), kd(student, teacher))


def test_labels_and_their_absence_do_not_matter() -> None:
    student, teacher = case().tensors()
    batch = case().batch()
    bare = Batch.of(batch.inputs, torch.full((6,), -1))
    assert case().loss(KD(), student, teacher, batch) == case().loss(KD(), student, teacher, bare)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_half_precision_extremes(dtype: torch.dtype, temperature: float) -> None:
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [-1e4, 1e4, -1e4]], dtype=dtype)
    loss = kd(student, teacher, temperature=temperature)
    expected = oracle.kd(student.detach().double().numpy(), teacher.double().numpy(), temperature=temperature)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    grad = gradient(loss, student)
    assert grad.dtype == dtype
    assert grad.isfinite().all()


def test_autocast_does_not_reach_the_comparison() -> None:
    student, teacher = (part.detach().float() for part in pair(10))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = kd(student, teacher)
    assert inside == kd(student, teacher)


def test_a_sure_teacher_is_finite() -> None:
    student = torch.tensor([[0.0, 0.0]], dtype=torch.float64)
    teacher = torch.tensor([[2000.0, 0.0]], dtype=torch.float64)
    assert kd(student, teacher, temperature=1.0).item() == pytest.approx(np.log(2), rel=1e-12)


# errors


def test_logits_of_two_shapes() -> None:
    said = "kd compares logits of one shape: the student's are [2, 3], the teacher's [2, 4]"
    with pytest.raises(UserError, match=re.escape(said)):
        kd(torch.zeros(2, 3), torch.zeros(2, 4))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": 0}, "temperature must be > 0, not 0"),
        ({"temperature": -1.5}, "temperature must be > 0, not -1.5"),
        ({"form": "mse"}, "form 'mse' is not known; valid: cross_entropy, kl"),
    ],
)
def test_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        KD(**options)


def test_logits_of_texts_are_refused() -> None:
    said = "kd compares logits [B, K], not [2, 3, 5]: for texts take distillm, for maps cwd"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        kd(torch.zeros(2, 3, 5), torch.zeros(2, 3, 5))
