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
from oracles import nkd as oracle
from tutelage.core import Batch, Facts
from tutelage.core.error import UserError
from tutelage.methods.logits.kd import kd
from tutelage.methods.logits.nkd import NKD, nkd

Arrays = dict[str, NDArray[Any]]
SHAPE = {"logits": (6, 5)}


def case() -> MethodCase:
    return MethodCase(
        term=NKD,
        student=lambda seed: gaussian(seed, SHAPE),
        teacher=lambda seed: gaussian(seed + 1000, SHAPE, 2.0),
    )


def drawn(seed: int = 0, rows: int = 6, classes: int = 5, scale: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """Free student logits, teacher logits, classes."""
    found = gaussian(seed, {"student": (rows, classes), "teacher": (rows, classes)}, scale)
    target = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(seed))
    return found["student"].double().requires_grad_(), found["teacher"].double(), target


def total(parts: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(parts.values())).sum()


# the authors' numbers


def golden(claim: str, arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    # a soft label's largest class is decided by a tie in some cases: the case says how
    target = torch.tensor(arrays["labels"] if "labels" in arrays else arrays["target_index"])
    for suffix, dtype in (("", torch.float64), ("_f32", torch.float32)):
        student = torch.tensor(arrays["student_logits"], dtype=dtype, requires_grad=True)
        teacher = torch.tensor(arrays["teacher_logits"], dtype=dtype)
        batch = Batch.of(torch.zeros(len(student), 1), target)
        term = NKD(gamma=meta["gamma"], temperature=meta["temp"])
        parts = case().outcome(term, {"logits": student}, {"logits": teacher}, batch).parts
        loss = total(dict(parts))
        found = {
            "loss": loss,
            "loss_target": parts["target"],
            "grad_student_logits": gradient(loss, student),
        }
        answer |= {f"{name}{suffix}": value for name, value in found.items() if f"{name}{suffix}" in arrays}
    return answer


# the equation, worked out by loops


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 6),
    classes=st.integers(2, 10),
    temperature=st.floats(0.25, 20),
    gamma=st.floats(0, 4),
    scale=st.floats(0, 30),
)
def test_equals_the_loops(seed: int, rows: int, classes: int, temperature: float, gamma: float, scale: float) -> None:
    student, teacher, target = drawn(seed, rows, classes, scale)
    expected = oracle.nkd(
        student.detach().numpy(), teacher.numpy(), target.numpy(), temperature=temperature, gamma=gamma
    )
    parts = nkd(student, teacher, target, temperature=temperature, gamma=gamma)
    assert parts["target"].item() == pytest.approx(expected["target"], rel=1e-9, abs=1e-12)
    assert parts["nontarget"].item() == pytest.approx(expected["nontarget"], rel=1e-9, abs=1e-12)


def test_soft_labels_count_as_their_largest_class() -> None:
    student, teacher, _ = drawn(1)
    soft = torch.rand(6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).softmax(1)
    soft[0] = torch.tensor([0.1, 0.4, 0.0, 0.4, 0.1])  # a tie: the lower class
    hard = torch.tensor(oracle.hard_targets(soft.numpy()))
    assert hard[0] == 1
    torch.testing.assert_close(nkd(student, teacher, soft), nkd(student, teacher, hard), rtol=0, atol=0)


@pytest.mark.parametrize("part", ["target", "nontarget"])
def test_gradcheck(part: str) -> None:
    student, teacher, target = drawn(2, rows=3, classes=4)
    assert torch.autograd.gradcheck(lambda s: nkd(s, teacher, target, temperature=2.0)[part], student)


# limits and identities


def test_at_temperature_1_it_splits_the_cross_entropy_of_probabilities() -> None:
    # with gamma the teacher's mass off the target, sample by sample, the parts differ from KD's cross-entropy
    # by the student's own mass off the target
    student, teacher, target = drawn(3)
    rows = []
    for n in range(6):
        here = slice(n, n + 1)
        right, off = teacher[here].softmax(1)[0, target[n]], student[here].softmax(1)[0, target[n]]
        parts = nkd(student[here], teacher[here], target[here], gamma=1 - right.item())
        rows.append(total(parts) - (1 - right) * (1 - off).log())
    whole = kd(student, teacher, temperature=1.0, form="cross_entropy")
    torch.testing.assert_close(torch.stack(rows).mean(), whole)


def test_the_gradient_of_the_wrong_classes_is_the_difference_of_their_probabilities() -> None:
    student, teacher, target = drawn(4)
    found = gradient(nkd(student, teacher, target, gamma=2.0, temperature=3.0)["nontarget"], student)
    expected = np.zeros((6, 5))
    for n in range(6):
        others = [c for c in range(5) if c != target[n]]
        s, t = ((side.detach()[n, others] / 3).softmax(0).numpy() for side in (student, teacher))
        expected[n, others] = 2 * 3 * (s - t) / 6
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_of_two_classes_none_is_left_to_compare(temperature: float) -> None:
    student, teacher, target = drawn(5, classes=2)
    part = nkd(student, teacher, target, temperature=temperature)["nontarget"]
    assert part.item() == 0
    assert not gradient(part, student).any()


def test_gamma_and_temperature_leave_the_target_part_alone() -> None:
    student, teacher, target = drawn(6)
    one, other = nkd(student, teacher, target), nkd(student, teacher, target, gamma=3.0, temperature=4.0)
    assert one["target"] == other["target"]
    torch.testing.assert_close(nkd(student, teacher, target, gamma=3.0)["nontarget"], 2 * one["nontarget"])


@settings(max_examples=20, deadline=None, derandomize=True)
@given(shift=st.floats(-1e3, 1e3), seed=st.integers(0, 1000))
def test_a_constant_and_the_order_of_classes_change_nothing(shift: float, seed: int) -> None:
    student, teacher, target = drawn(seed)
    classes = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    moved = classes.argsort()[target]
    found = nkd(student[:, classes] + shift, teacher[:, classes] - shift, moved)
    torch.testing.assert_close(found, nkd(student, teacher, target), rtol=1e-8, atol=1e-9)


# labels that are not there


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), kept=st.lists(st.booleans(), min_size=6, max_size=6), soft=st.booleans())
def test_without_a_label_the_teachers_class_counts(seed: int, kept: list[bool], soft: bool) -> None:
    student, teacher, target = drawn(seed)
    labelled = torch.tensor(kept)
    full = target.where(labelled, teacher.argmax(1))
    given = torch.eye(5)[target] * labelled[:, None] if soft else target.where(labelled, -1)
    torch.testing.assert_close(nkd(student, teacher, given, labelled), nkd(student, teacher, full))


def test_a_batch_without_labels() -> None:
    here = case()
    student, teacher = here.tensors()
    assert teacher is not None
    bare = Batch.of(torch.zeros(6, 1))
    expected = nkd(student["logits"], teacher["logits"], teacher["logits"].argmax(1))
    torch.testing.assert_close(here.loss(NKD(), student, teacher, bare), total(expected))


# odd cases


def test_no_rows_give_a_connected_zero() -> None:
    student = torch.zeros(0, 5, requires_grad=True)
    loss = total(nkd(student, torch.zeros(0, 5), torch.zeros(0, dtype=torch.long)))
    assert loss.item() == 0
    assert gradient(loss, student).shape == (0, 5)


def test_one_row_is_its_own_mean() -> None:
    student, teacher, target = drawn(7)
    each = [total(nkd(student[n : n + 1], teacher[n : n + 1], target[n : n + 1])) for n in range(6)]
    torch.testing.assert_close(torch.stack(each).mean(), total(nkd(student, teacher, target)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_half_precision_extremes(dtype: torch.dtype, temperature: float) -> None:
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [0, 0, 0]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [-1e4, 1e4, -1e4], [0, 0, 0]], dtype=dtype)
    target = torch.tensor([0, 1, 2])
    parts = nkd(student, teacher, target, temperature=temperature)
    expected = oracle.nkd(
        student.detach().double().numpy(), teacher.double().numpy(), target.numpy(), temperature=temperature
    )
    assert all(part.dtype == torch.float32 for part in parts.values())
    assert total(parts).item() == pytest.approx(expected["loss"], rel=1e-5)
    grad = gradient(total(parts), student)
    assert grad.dtype == dtype
    assert grad.isfinite().all()


def test_autocast_does_not_reach_the_comparison() -> None:
    student, teacher, target = drawn(8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = nkd(student.float(), teacher.float(), target)
    torch.testing.assert_close(inside, nkd(student.float(), teacher.float(), target), rtol=0, atol=0)


def test_constant_logits_are_finite() -> None:
    student = torch.zeros(3, 4, requires_grad=True)
    loss = total(nkd(student, torch.zeros(3, 4), torch.tensor([0, 1, 2])))
    assert loss.item() == pytest.approx(np.log(4) / 4 + 1.5 * np.log(3), rel=1e-6)
    assert gradient(loss, student).isfinite().all()


# errors

LOGITS = "nkd takes two [B, K] tensors of logits of two classes or more: the student's are {}, the teacher's {}"


@pytest.mark.parametrize(("student", "teacher"), [((2, 3), (2, 4)), ((2, 1), (2, 1)), ((2, 3, 4, 4), (2, 3, 4, 4))])
def test_logits_that_do_not_fit(student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    said = LOGITS.format(list(student), list(teacher))
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        nkd(torch.zeros(student), torch.zeros(teacher), torch.tensor([0, 0]))


def test_a_target_that_does_not_fit() -> None:
    said = "nkd takes [B] classes or [B, K] soft labels for logits [2, 3], not a target of shape [2, 4]"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        nkd(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 4))


def test_targets_that_are_no_classes() -> None:
    here = case()
    student, teacher = here.tensors()
    said = "nkd needs class labels, and this data has list for a target"
    with pytest.raises(UserError, match=f"^{said}$"):
        here.loss(NKD(), student, teacher, replace(here.batch(), target=[{}] * 6))


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_that_is_none(temperature: float) -> None:
    with pytest.raises(UserError, match=f"^temperature must be > 0, not {temperature}$"):
        NKD(temperature=temperature)


def test_two_classes_deserve_a_look() -> None:
    (said,) = NKD().caveats(Facts(num_classes=2))
    assert said.startswith("with two classes there is one wrong class")
    assert NKD().caveats(Facts(num_classes=3)) == ()
