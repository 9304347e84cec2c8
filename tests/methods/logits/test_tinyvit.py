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
from oracles import tinyvit as oracle
from tutelage.core import Batch
from tutelage.core.error import UserError
from tutelage.methods.logits.fkd import fkd
from tutelage.methods.logits.kd import kd
from tutelage.methods.logits.tinyvit import Form, TinyViT, pack, recover, store, tinyvit, unpack

Arrays = dict[str, NDArray[Any]]
SHAPE = {"logits": (6, 5)}
FORMS: tuple[Form, ...] = ("clamped", "released")


def case() -> MethodCase:
    return MethodCase(
        term=lambda: TinyViT(k=2),
        student=lambda seed: gaussian(seed, SHAPE),
        teacher=lambda seed: gaussian(seed + 1000, SHAPE, 2.0),
    )


def pair(seed: int = 0, rows: int = 6, classes: int = 5, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    drawn = gaussian(seed, {"student": (rows, classes), "teacher": (rows, classes)}, scale)
    return drawn["student"].double().requires_grad_(), drawn["teacher"].double()


def excess() -> Tensor:
    """Teacher logits whose two largest probabilities round up to more than 1 together."""
    probs = torch.tensor([[0.9998, 0.00018, 1e-5, 1e-5]], dtype=torch.float64)
    logits = probs.log()
    assert store(logits, k=2)[1].double().sum() > 1
    return logits


# the authors' numbers


def golden(claim: str, arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    student = torch.tensor(arrays["s_logits"], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor(arrays["t_logits"], dtype=torch.float64)
    term = TinyViT(k=meta["topk"], form="released")
    loss = case().loss(term, {"logits": student}, {"logits": teacher}, case().batch())
    index, value = store(teacher, k=meta["topk"])
    return {
        "loss": loss,
        "grad_s_logits": gradient(loss, student),
        "out_stored_index": index,
        "out_stored_value": value,
        "out_record_bytes": pack(torch.tensor(arrays["rand_seed"]), index, value),
        "out_recovered_target": recover(index, value.double(), meta["num_classes"], form="released"),
    }


# the equation, worked out by loops


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 6),
    classes=st.integers(2, 10),
    k=st.integers(1, 9),
    scale=st.floats(0, 30),
)
def test_equals_the_loops(seed: int, rows: int, classes: int, k: int, scale: float) -> None:
    student, teacher = pair(seed, rows, classes, scale)
    k = min(k, classes - 1)  # the loops divide by what is left
    index, value = oracle.store(teacher.numpy(), k)
    found = store(teacher, k=k)
    np.testing.assert_array_equal(found[0].numpy(), index)
    np.testing.assert_array_equal(found[1].double().numpy(), value)
    dense = recover(found[0], found[1].double(), classes, form="released")
    np.testing.assert_allclose(dense.numpy(), oracle.recover(index, value, classes), rtol=1e-9, atol=1e-15)
    expected = oracle.tinyvit(student.detach().numpy(), teacher.numpy(), k)
    assert tinyvit(student, teacher, k=k, form="released").item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    if (value.sum(1) <= 1).all():
        assert tinyvit(student, teacher, k=k) == tinyvit(student, teacher, k=k, form="released")


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(-(2**31), 2**31 - 1), k=st.integers(1, 20), draw=st.integers(0, 1000))
def test_records_equal_the_loops_and_come_back(seed: int, k: int, draw: int) -> None:
    teacher = gaussian(draw, {"logits": (3, 300)}, 3.0)["logits"]
    index, value = store(teacher, k=k)
    seeds = torch.tensor([seed, 0, -1], dtype=torch.int32)
    found = pack(seeds, index, value)
    assert found.shape == (3, 4 + 4 * k)
    for n in range(3):
        expected = oracle.record(int(seeds[n]), index[n].numpy(), value[n].double().numpy())
        assert bytes(found[n].tolist()) == expected
    back = unpack(found)
    for one, other in zip(back, (seeds, index, value), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: Form) -> None:
    student, teacher = pair(1, rows=3, classes=4)
    assert torch.autograd.gradcheck(lambda s: tinyvit(s, teacher, k=2, form=form), student)


# limits and identities


def test_up_to_rounding_it_is_fkd() -> None:
    student, teacher = pair(2)
    torch.testing.assert_close(tinyvit(student, teacher, k=2), fkd(student, teacher, k=2), rtol=1e-3, atol=0)


def test_with_every_class_kept_it_is_kd_up_to_rounding() -> None:
    student, teacher = pair(3)
    whole = kd(student, teacher, temperature=1.0, form="cross_entropy")
    for k in (5, 100):
        torch.testing.assert_close(tinyvit(student, teacher, k=k), whole, rtol=1e-3, atol=0)


def test_values_that_round_up_leave_a_debt_in_the_released_form_only() -> None:
    teacher = excess()
    index, value = store(teacher, k=2)
    dense = [recover(index, value, 4, form=form) for form in FORMS]
    assert (dense[0] >= 0).all()
    assert dense[1].min() < 0
    assert dense[1].sum().item() == pytest.approx(1)
    student = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    losses = [tinyvit(student, teacher, k=2, form=form).item() for form in FORMS]
    assert losses[0] > losses[1]


def test_masked_classes_count_nothing() -> None:
    student, teacher = pair(4, classes=4)
    gap = torch.full((6, 1), -torch.inf, dtype=torch.float64)
    loss = tinyvit(torch.cat([student, gap], dim=1), torch.cat([teacher, gap], dim=1), k=5)
    torch.testing.assert_close(loss, tinyvit(student, teacher, k=4))
    assert gradient(loss, student).isfinite().all()


# odd cases


@pytest.mark.parametrize("form", FORMS)
def test_no_rows_give_a_connected_zero(form: Form) -> None:
    student = torch.zeros(0, 5, requires_grad=True)
    loss = tinyvit(student, torch.zeros(0, 5), form=form)
    assert loss.item() == 0
    assert gradient(loss, student).shape == (0, 5)


def test_one_row_is_its_own_mean() -> None:
    student, teacher = pair(5)
    each = [tinyvit(student[n : n + 1], teacher[n : n + 1], k=2) for n in range(6)]
    torch.testing.assert_close(torch.stack(each).mean(), tinyvit(student, teacher, k=2))


def test_labels_and_their_absence_do_not_matter() -> None:
    student, teacher = case().tensors()
    bare, term = Batch.of(torch.zeros(6, 1)), TinyViT(k=2)
    assert case().loss(term, student, teacher, case().batch()) == case().loss(term, student, teacher, bare)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_extremes(dtype: torch.dtype) -> None:
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [0, 0, 0]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [-1e4, 1e4, -1e4], [0, 0, 0]], dtype=dtype)
    loss = tinyvit(student, teacher, k=2, form="released")
    expected = oracle.tinyvit(student.detach().double().numpy(), teacher.double().numpy(), 2)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert gradient(loss, student).isfinite().all()


def test_autocast_does_not_reach_the_comparison() -> None:
    student, teacher = (part.detach().float() for part in pair(6))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = tinyvit(student, teacher, k=2)
    assert inside == tinyvit(student, teacher, k=2)


# errors


def test_logits_of_two_shapes() -> None:
    said = "tinyvit takes two [B, K] tensors of logits: the student's are [2, 3], the teacher's [2, 4]"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        tinyvit(torch.zeros(2, 3), torch.zeros(2, 4))


def test_more_classes_than_an_int16_can_name() -> None:
    said = "tinyvit stores classes as int16, up to 32767; the teacher has 40000"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        store(torch.zeros(1, 40_000))


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (torch.zeros(1, 9, dtype=torch.uint8), "a record is 4 + 4 k bytes; got torch.uint8 of length 9"),
        (torch.zeros(1, 4, dtype=torch.uint8), "a record is 4 + 4 k bytes; got torch.uint8 of length 4"),
        (torch.zeros(1, 8), "a record is 4 + 4 k bytes; got torch.float32 of length 8"),
    ],
)
def test_what_is_no_record(record: Tensor, said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        unpack(record)


def test_options_that_are_none() -> None:
    with pytest.raises(UserError, match=r"^k is the number of classes kept, at least 1, not 0$"):
        TinyViT(k=0)
    with pytest.raises(UserError, match=r"^form 'signed' is not known; valid: clamped, released$"):
        TinyViT(form="signed")  # type: ignore[arg-type]
