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
from torch import Tensor, nn

from method_case import MethodCase, gaussian
from oracles import tf_nkd as oracle
from tutelage.core import Batch, Distiller, Objective, ranks
from tutelage.core.error import UserError
from tutelage.methods.online.tf_nkd import TfNKD, tf_nkd
from tutelage.tasks.classification import Classification

Arrays = dict[str, NDArray[Any]]


def case() -> MethodCase:
    return MethodCase(term=TfNKD, student=lambda seed: gaussian(seed, {"logits": (6, 5)}), teacher=None)


def drawn(seed: int = 0, rows: int = 6, classes: int = 5, scale: float = 2.0) -> Tensor:
    return gaussian(seed, {"logits": (rows, classes)}, scale)["logits"].double().requires_grad_()


def labels_for(seed: int, rows: int, classes: int, soft: bool) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if not soft:
        return torch.randint(classes, (rows,), generator=generator)
    return torch.rand(rows, classes, generator=generator, dtype=torch.float64).softmax(1)


def total(parts: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(parts.values())).sum()


# the authors' numbers


def golden(claim: str, arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    for suffix, dtype in (("", torch.float64), ("_f32", torch.float32)):
        logits = torch.tensor(arrays["student_logits"], dtype=dtype, requires_grad=True)
        if "labels" in arrays:
            batch = Batch.of(torch.zeros(len(logits), 1), torch.tensor(arrays["labels"]))
            parts = dict(case().outcome(TfNKD(), {"logits": logits}, None, batch).parts)
        else:  # the case says which classes its sort took where labels are equal
            top = torch.tensor(arrays["top2_index"]), torch.tensor(arrays["top2_value"], dtype=dtype)
            parts = tf_nkd(logits, torch.tensor(arrays["soft_labels"]), top=top)
        loss = total(parts)
        found = {"loss": loss, "grad_student_logits": torch.autograd.grad(loss, logits)[0]}
        found |= {f"loss_{name}": part for name, part in parts.items()}
        answer |= {f"{name}{suffix}": value for name, value in found.items()}
    return answer


# the equation, worked out by loops


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 6), classes=st.integers(2, 9), scale=st.floats(0, 30))
@pytest.mark.parametrize("soft", [False, True])
def test_equals_the_loops(soft: bool, seed: int, rows: int, classes: int, scale: float) -> None:
    logits, target = drawn(seed, rows, classes, scale), labels_for(seed, rows, classes, soft)
    if soft:
        order = np.argsort(-target.numpy(), axis=1, kind="stable")[:, :2]
        value = np.take_along_axis(target.numpy(), order, axis=1)
    else:
        order, value = target[:, None].numpy(), np.ones((rows, 1))
    expected = oracle.tf_nkd(logits.detach().numpy(), order, value)
    parts = tf_nkd(logits, target)
    assert len(parts) == order.shape[1]
    for name, part in parts.items():
        assert part.item() == pytest.approx(expected[name], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("soft", [False, True])
def test_the_gradient_holds_the_smoothed_labels_constant(soft: bool) -> None:
    logits, target = drawn(1), labels_for(1, 6, 5, soft)
    found = torch.autograd.grad(total(tf_nkd(logits, target)), logits)[0].numpy()
    probs = logits.detach().softmax(1).numpy()
    if soft:
        order = np.argsort(-target.numpy(), axis=1, kind="stable")[:, :2]
        value = np.take_along_axis(target.numpy(), order, axis=1)
    else:
        order, value = target[:, None].numpy(), np.ones((6, 1))
    picked = np.take_along_axis(probs, order, axis=1)
    expected = np.zeros((6, 5))
    for n in range(6):
        for j in range(order.shape[1]):
            smooth = picked[n, j] + value[n, j] - picked[:, j].mean()
            for i in range(5):
                expected[n, i] -= smooth * (float(i == order[n, j]) - probs[n, i]) / 6
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-15)


# limits and identities


def test_one_row_is_cross_entropy_with_its_own_label() -> None:
    logits = drawn(2, rows=1)
    found = total(tf_nkd(logits, torch.tensor([3])))
    torch.testing.assert_close(found, -logits.log_softmax(1)[0, 3])


def test_equal_confidence_is_cross_entropy() -> None:
    row = drawn(3, rows=1).detach()
    logits = torch.cat([row, row.roll(1, 1), row.roll(2, 1)])
    target = torch.tensor([0, 1, 2])
    expected = torch.nn.functional.cross_entropy(logits, target)
    torch.testing.assert_close(total(tf_nkd(logits, target)), expected)


def test_a_class_as_a_soft_label_has_an_empty_second_target() -> None:
    logits, hard = drawn(4), labels_for(4, 6, 5, soft=False)
    found = tf_nkd(logits, torch.eye(5, dtype=torch.float64)[hard])
    torch.testing.assert_close(found["target_0"], tf_nkd(logits, hard)["target_0"])
    assert found["target_1"].item() == 0


def test_ties_take_the_lower_class_unless_told() -> None:
    logits = drawn(5, rows=2)
    soft = torch.tensor([[0.0, 0.5, 0.5, 0.0, 0.0]] * 2)
    lower = torch.tensor([[1, 2]] * 2), torch.full((2, 2), 0.5)
    other = torch.tensor([[2, 1]] * 2), torch.full((2, 2), 0.5)
    torch.testing.assert_close(tf_nkd(logits, soft), tf_nkd(logits, soft, top=lower), rtol=0, atol=0)
    assert tf_nkd(logits, soft)["target_0"] != tf_nkd(logits, soft, top=other)["target_0"]


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), shift=st.floats(-100, 100), soft=st.booleans())
def test_order_and_a_constant_change_nothing(seed: int, shift: float, soft: bool) -> None:
    logits, target = drawn(seed), labels_for(seed, 6, 5, soft)
    generator = torch.Generator().manual_seed(seed)
    rows, classes = torch.randperm(6, generator=generator), torch.randperm(5, generator=generator)
    moved = target[rows][:, classes] if soft else classes.argsort()[target[rows]]
    found = tf_nkd(logits[rows][:, classes] + shift, moved)
    torch.testing.assert_close(found, tf_nkd(logits, target), rtol=1e-8, atol=1e-10)


# unlabelled rows


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), kept=st.lists(st.booleans(), min_size=6, max_size=6), soft=st.booleans())
def test_unlabelled_rows_are_as_if_absent(seed: int, kept: list[bool], soft: bool) -> None:
    logits, target, labelled = drawn(seed), labels_for(seed, 6, 5, soft), torch.tensor(kept)
    marked = target.where(labelled[:, None], 0) if soft else target.where(labelled, -1)
    found, some = tf_nkd(logits, marked, labelled), torch.nonzero(labelled)[:, 0]
    expected = tf_nkd(logits[some], target[some])
    torch.testing.assert_close(found, expected)
    grad = torch.autograd.grad(total(found), logits)[0]
    torch.testing.assert_close(grad, torch.autograd.grad(total(expected), logits)[0])
    assert not grad[~labelled].any()


@pytest.mark.parametrize("soft", [False, True])
def test_no_rows_give_a_connected_zero(soft: bool) -> None:
    logits = drawn(0, rows=0)
    loss = total(tf_nkd(logits, torch.zeros(0, 5) if soft else torch.zeros(0, dtype=torch.long)))
    assert loss.item() == 0
    assert torch.autograd.grad(loss, logits)[0].shape == (0, 5)


# over ranks


def test_with_gather_the_parts_of_two_ranks_make_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, target = drawn(6), labels_for(6, 6, 5, soft=False)
    labelled = torch.tensor([True, True, True, False, True, True])
    spans = [slice(0, 2), slice(2, 6)]
    counts = [labelled[span].sum() for span in spans]

    def joined(**options: Any) -> Tensor:
        parts = [total(tf_nkd(logits[s], target[s], labelled[s], **options)) for s in spans]
        return torch.stack([p * c for p, c in zip(parts, counts, strict=True)]).sum() / sum(counts)

    whole = total(tf_nkd(logits, target, labelled))
    seen: list[Tensor] = []

    def alone(value: Tensor) -> Tensor:
        seen.append(value)
        return value

    monkeypatch.setattr(ranks, "mean", alone)
    assert not torch.allclose(joined(gather=True), whole)  # each rank knows only its own
    average = torch.stack(seen).mean(0)
    monkeypatch.setattr(ranks, "mean", lambda value: average)
    torch.testing.assert_close(joined(gather=True), whole)
    assert not torch.allclose(joined(), whole)


# a step


def test_a_step_without_a_teacher() -> None:
    torch.manual_seed(0)
    batch = Batch.of(torch.rand(4, 3), torch.tensor([0, 2, -1, 4]))
    machine = Distiller(nn.Linear(3, 5), Objective(tf_nkd=TfNKD()), task=Classification(5), sample=batch)
    losses = machine(batch)
    assert list(losses.parts) == ["task", "tf_nkd.target_0"]
    losses.total.backward()
    assert all(p.grad is not None and p.grad.any() for p in machine.parameters())
    machine.close()


# precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("soft", [False, True])
def test_half_precision_extremes(soft: bool, dtype: torch.dtype) -> None:
    rows = [[1e4, -1e4, 0.0, 1e4], [-1e4, -1e4, 1e4, 0.0], [0.0, 0.0, 0.0, 0.0]]
    logits = torch.tensor(rows, dtype=dtype, requires_grad=True)
    target = torch.tensor([[0.0, 0.7, 0.3, 0.0]] * 3, dtype=dtype) if soft else torch.tensor([1, 2, 0])
    parts = tf_nkd(logits, target)
    assert all(part.dtype == torch.float32 and part.isfinite() for part in parts.values())
    assert torch.autograd.grad(total(parts), logits)[0].isfinite().all()


# errors


def test_logits_that_do_not_fit() -> None:
    with pytest.raises(UserError, match=re.escape("tf_nkd takes logits [B, K], not [2, 5, 8, 8]")):
        tf_nkd(torch.zeros(2, 5, 8, 8), torch.zeros(2, dtype=torch.long))


def test_a_target_that_does_not_fit() -> None:
    said = "tf_nkd takes [B] classes or [B, K] soft labels for logits [2, 5], not a target of shape [2, 4]"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        tf_nkd(torch.zeros(2, 5), torch.zeros(2, 4))


def test_targets_that_are_no_classes() -> None:
    here = case()
    said = "tf_nkd needs class labels, and this data has list for a target"
    with pytest.raises(UserError, match=f"^{said}$"):
        here.loss(TfNKD(), here.tensors()[0], None, replace(here.batch(), target=[{}] * 6))
