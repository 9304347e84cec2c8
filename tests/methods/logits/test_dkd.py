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
from oracles import dkd as oracle
from tutelage.core import Batch, Facts, Schedule
from tutelage.core.error import UserError
from tutelage.methods.logits.dkd import DKD, OBJECTIVE, dkd
from tutelage.methods.logits.kd import kd

Arrays = dict[str, NDArray[Any]]
SHAPE = {"logits": (6, 5)}


def case() -> MethodCase:
    return MethodCase(
        term=DKD,
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
    return core(arrays, meta) if claim == "core/dkd" else classic(arrays, meta)


def step(
    arrays: Arrays, names: tuple[str, str, str], dtype: torch.dtype, **options: float
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """The student, the parts, and the parts with unit weight."""
    student = torch.tensor(arrays[names[0]], dtype=dtype, requires_grad=True)
    teacher, target = torch.tensor(arrays[names[1]], dtype=dtype), torch.tensor(arrays[names[2]])
    batch = Batch.of(torch.zeros(len(student), 1), target)
    parts = case().outcome(DKD(**options), {"logits": student}, {"logits": teacher}, batch).parts
    unit = dkd(student, teacher, target, alpha=1.0, beta=1.0, temperature=options["temperature"])
    return student, dict(parts), unit


def core(arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    names = ("student_logits", "teacher_logits", "labels")
    for suffix, dtype in (("", torch.float64), ("_f32", torch.float32)):
        options = {"alpha": meta["alpha"], "beta": meta["beta"], "temperature": meta["temp"]}
        student, parts, unit = step(arrays, names, dtype, **options)
        answer |= {f"loss{suffix}": total(parts), f"loss_nckd{suffix}": unit["nontarget"]}
        answer |= {f"grad_student_logits{suffix}": gradient(total(parts), student)}
        if dtype == torch.float64:  # the authors' float32 target part loses its digits by cancellation
            answer["loss_tckd"] = unit["target"]
    return answer


def classic(arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    names = ("s_logits", "t_logits", "target")
    options = {name: meta[name] for name in ("alpha", "beta", "temperature")}
    student, parts, unit = step(arrays, names, torch.float64, **options)
    losses = {"loss": total(parts), "loss_tckd": unit["target"], "loss_nckd": unit["nontarget"]}
    losses |= {"alt_mmrazor": losses["loss"], "alt_ctkd": losses["loss"]}  # other codes, the same equation
    grads = {f"grad_s_logits__{name}": gradient(loss, student) for name, loss in losses.items()}
    grads["grad_s_logits"] = grads.pop("grad_s_logits__loss")
    _, single, _ = step(arrays, names, torch.float32, **options)
    return {**losses, **grads, "loss_f32": total(single)}


# the equation, worked out by loops


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 6),
    classes=st.integers(2, 10),
    temperature=st.floats(0.25, 20),
    alpha=st.floats(0, 3),
    beta=st.floats(0, 10),
    scale=st.floats(0, 30),
)
def test_equals_the_loops(
    seed: int, rows: int, classes: int, temperature: float, alpha: float, beta: float, scale: float
) -> None:
    student, teacher, target = drawn(seed, rows, classes, scale)
    expected = oracle.dkd(student.detach().numpy(), teacher.numpy(), target.numpy(), temperature, alpha, beta)
    parts = dkd(student, teacher, target, alpha=alpha, beta=beta, temperature=temperature)
    scale_of = max(1.0, expected["tckd"], expected["nckd"])
    assert parts["target"].item() == pytest.approx(alpha * expected["tckd"], rel=1e-9, abs=1e-12 * scale_of)
    assert parts["nontarget"].item() == pytest.approx(beta * expected["nckd"], rel=1e-9, abs=1e-11 * scale_of)


@pytest.mark.parametrize("part", ["target", "nontarget"])
def test_gradcheck(part: str) -> None:
    student, teacher, target = drawn(2, rows=3, classes=4)
    teacher.requires_grad_()
    assert torch.autograd.gradcheck(lambda s, t: dkd(s, t, target, temperature=2.0)[part], (student, teacher))


def test_the_schedule_is_the_warm_up() -> None:
    block: Any = OBJECTIVE["dkd"]
    schedule = Schedule.parse(block["weight"])
    found = [schedule.at(step, steps_per_epoch=3, total_steps=300) for step in range(0, 90, 3)]
    assert found == pytest.approx([oracle.warmup(epoch) for epoch in range(1, 31)])
    assert schedule.at(5, steps_per_epoch=3, total_steps=300) == pytest.approx(oracle.warmup(2))


# limits and identities


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_with_the_teachers_mass_off_the_target_for_beta_it_is_kd(temperature: float) -> None:
    student, teacher, target = drawn(3)
    rows = []
    for n in range(6):
        here = slice(n, n + 1)
        off = 1 - (teacher[n] / temperature).softmax(0)[target[n]].item()
        rows.append(total(dkd(student[here], teacher[here], target[here], beta=off, temperature=temperature)))
    torch.testing.assert_close(torch.stack(rows).mean(), kd(student, teacher, temperature=temperature))


def test_nothing_to_learn_from_oneself() -> None:
    student, _, target = drawn(4)
    loss = total(dkd(student, student.detach(), target))
    assert loss.item() == pytest.approx(0, abs=1e-13)
    assert gradient(loss, student).abs().max() < 1e-13


def test_of_two_classes_none_is_left_to_compare() -> None:
    student, teacher, target = drawn(5, classes=2)
    parts = dkd(student, teacher, target)
    assert parts["nontarget"].item() == 0
    assert not gradient(parts["nontarget"], student).any()
    torch.testing.assert_close(parts["target"], kd(student, teacher))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(shift=st.floats(-1e3, 1e3), seed=st.integers(0, 1000))
def test_a_constant_and_the_order_of_classes_change_nothing(shift: float, seed: int) -> None:
    student, teacher, target = drawn(seed)
    classes = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    found = dkd(student[:, classes] + shift, teacher[:, classes] - shift, classes.argsort()[target])
    torch.testing.assert_close(found, dkd(student, teacher, target), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_margin_that_underflows_every_probability(dtype: torch.dtype) -> None:
    # 1 - q_y and 1 - p_y are 0 as numbers; as log-probabilities they are the margins
    student = torch.tensor([[3000.0, 0.0, 1.0]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[0.0, 4000.0, 4000.0]], dtype=dtype)
    parts = dkd(student, teacher, torch.tensor([0]), alpha=1.0, beta=1.0, temperature=1.0)
    rest = np.log(1 + np.e)
    assert parts["target"].item() == pytest.approx(3000 - rest, rel=1e-6)
    assert parts["nontarget"].item() == pytest.approx(rest - 0.5 - np.log(2), rel=1e-5)
    assert gradient(total(parts), student).isfinite().all()


# labels that are not there


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), kept=st.lists(st.booleans(), min_size=6, max_size=6))
def test_without_a_label_the_teachers_class_counts(seed: int, kept: list[bool]) -> None:
    student, teacher, target = drawn(seed)
    labelled = torch.tensor(kept)
    found = dkd(student, teacher, target.where(labelled, -1), labelled)
    torch.testing.assert_close(found, dkd(student, teacher, target.where(labelled, teacher.argmax(1))))


# odd cases


def test_no_rows_give_a_connected_zero() -> None:
    student = torch.zeros(0, 5, requires_grad=True)
    loss = total(dkd(student, torch.zeros(0, 5), torch.zeros(0, dtype=torch.long)))
    assert loss.item() == 0
    assert gradient(loss, student).shape == (0, 5)


def test_one_row_is_its_own_mean() -> None:
    student, teacher, target = drawn(7)
    each = [total(dkd(student[n : n + 1], teacher[n : n + 1], target[n : n + 1])) for n in range(6)]
    torch.testing.assert_close(torch.stack(each).mean(), total(dkd(student, teacher, target)))


def test_constant_logits_are_finite() -> None:
    student = torch.zeros(3, 4, requires_grad=True)
    _, teacher, _ = drawn(8, rows=3, classes=4)
    loss = total(dkd(student, teacher.float(), torch.tensor([0, 1, 2])))
    assert loss.isfinite()
    assert gradient(loss, student).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_half_precision_extremes(dtype: torch.dtype, temperature: float) -> None:
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [0, 0, 0]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [-1e4, 1e4, -1e4], [0, 0, 0]], dtype=dtype)
    target = torch.tensor([0, 1, 2])
    parts = dkd(student, teacher, target, temperature=temperature)
    expected = oracle.dkd(student.detach().double().numpy(), teacher.double().numpy(), target.numpy(), temperature)
    assert all(part.dtype == torch.float32 for part in parts.values())
    assert total(parts).item() == pytest.approx(expected["loss"], rel=1e-5)
    grad = gradient(total(parts), student)
    assert grad.dtype == dtype
    assert grad.isfinite().all()


def test_autocast_does_not_reach_the_comparison() -> None:
    student, teacher, target = drawn(9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = dkd(student.float(), teacher.float(), target)
    torch.testing.assert_close(inside, dkd(student.float(), teacher.float(), target), rtol=0, atol=0)


# errors

LOGITS = "dkd takes two [B, K] tensors of logits of two classes or more: the student's are {}, the teacher's {}"


@pytest.mark.parametrize(("student", "teacher"), [((2, 3), (2, 4)), ((2, 1), (2, 1)), ((2, 3, 4, 4), (2, 3, 4, 4))])
def test_logits_that_do_not_fit(student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    said = LOGITS.format(list(student), list(teacher))
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        dkd(torch.zeros(student), torch.zeros(teacher), torch.tensor([0, 0]))


def test_soft_labels() -> None:
    said = "dkd takes one class a row, [2], not a target of shape [2, 3]; it cannot use soft labels"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        dkd(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3))


def test_targets_that_are_no_classes() -> None:
    here = case()
    student, teacher = here.tensors()
    said = "dkd needs class labels, and this data has list for a target"
    with pytest.raises(UserError, match=f"^{said}$"):
        here.loss(DKD(), student, teacher, replace(here.batch(), target=[{}] * 6))


def test_a_temperature_that_is_none() -> None:
    with pytest.raises(UserError, match=r"^temperature must be > 0, not 0$"):
        DKD(temperature=0)


def test_two_classes_deserve_a_look() -> None:
    (said,) = DKD().caveats(Facts(num_classes=2))
    assert said.startswith("with two classes there is one wrong class")
    assert DKD().caveats(Facts(num_classes=3)) == ()
