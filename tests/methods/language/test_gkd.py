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

from method_case import ROWS, MethodCase, gaussian, gradient, labelled_batch
from oracles import gkd as oracle
from tiny_text import causal, text_batch
from tutelage.core import Batch, Distiller, Draw, Live, Objective
from tutelage.core.error import UserError
from tutelage.core.generation import write
from tutelage.functional.divergence import kl_divergence
from tutelage.methods.language.gkd import GKD, OnPolicy, gkd
from tutelage.tasks.language import Language

LENGTH, WORDS = 4, 7
SHAPE = {"logits": (ROWS, LENGTH, WORDS)}


def batch() -> Batch:
    """Rows of four, three, two, one, no and four tokens."""
    lengths = torch.tensor([4, 3, 2, 1, 0, 4])
    return labelled_batch(extra={"token_mask": torch.arange(LENGTH) < lengths[:, None]})


def case() -> MethodCase:
    return MethodCase(
        term=GKD,
        student=lambda seed: gaussian(seed, SHAPE),
        teacher=lambda seed: gaussian(seed + 1000, SHAPE, 2.0),
        batch=batch,
    )


def drawn(seed: int = 0, shape: tuple[int, int, int] = (3, 4, 7), scale: float = 2.0) -> tuple[Tensor, ...]:
    found = gaussian(seed, {"student": shape, "teacher": shape, "mask": shape[:2]}, scale)
    mask = found["mask"] < 1
    mask[0, 0] = True
    return found["student"].double().requires_grad_(), found["teacher"].double(), mask


# the authors' numbers


def golden(claim: str, arrays: dict[str, NDArray[Any]], meta: dict[str, Any]) -> dict[str, Any]:
    """The reductions of the public code are the mean over tokens times a count."""
    teacher = torch.tensor(arrays["t_logits"], dtype=torch.float64)
    mask = torch.tensor(arrays["labels"] != meta["ignore_index"])
    every, count, (_, length, words) = torch.ones_like(mask), mask.sum(), teacher.shape
    readings: dict[str, tuple[float, Tensor, Any]] = {
        "loss": (meta["beta"], mask, 1),
        "loss_beta0": (0.0, mask, 1),
        "loss_beta1": (1.0, mask, 1),
        "loss_sum": (meta["beta"], mask, count),
        "loss_mean_elements": (meta["beta"], mask, 1 / words),
        "loss_nolabels_batchmean": (meta["beta"], every, length),
    }
    answer: dict[str, Any] = {}
    for name, (beta, kept, factor) in readings.items():
        options = {"beta": beta, "temperature": meta["temperature"]}
        student = torch.tensor(arrays["s_logits"], dtype=torch.float64, requires_grad=True)
        loss = factor * gkd(student, teacher, kept, **options)
        single = factor * gkd(student.detach().float(), teacher.float(), kept, **options)
        slope = "grad_s_logits" + ("" if name == "loss" else f"__{name}")
        found = {name: loss, slope: gradient(loss, student), f"{name}_f32": single}
        answer |= {key: value for key, value in found.items() if key in arrays}
    return answer


# the equation, worked out by loops


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 4),
    length=st.integers(1, 5),
    words=st.integers(1, 9),
    beta=st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0.05, 0.95)),
    temperature=st.floats(0.25, 10),
    scale=st.floats(0, 20),
    chunk=st.sampled_from([None, 1, 3]),
)
def test_equals_the_loops(
    seed: int,
    rows: int,
    length: int,
    words: int,
    beta: float,
    temperature: float,
    scale: float,
    chunk: int | None,
) -> None:
    student, teacher, mask = drawn(seed, (rows, length, words), scale)
    labels = np.where(mask.numpy(), 0, -100)
    expected = oracle.gkd(student.detach().numpy(), teacher.numpy(), labels, beta, temperature)
    found = gkd(student, teacher, mask, beta=beta, temperature=temperature, chunk=chunk)
    assert found.item() == pytest.approx(expected, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chunk", [None, 1])
def test_gradcheck(beta: float, chunk: int | None) -> None:
    student, teacher, mask = drawn(2, (2, 2, 4))
    assert torch.autograd.gradcheck(lambda s: gkd(s, teacher, mask, beta=beta, temperature=2.0, chunk=chunk), student)


# limits and identities


def test_the_ends_are_the_plain_divergences() -> None:
    student, teacher, mask = drawn(3)
    torch.testing.assert_close(gkd(student, teacher, mask, beta=0.0), kl_divergence(student, teacher)[mask].mean())
    torch.testing.assert_close(gkd(student, teacher, mask, beta=1.0), kl_divergence(teacher, student)[mask].mean())


@pytest.mark.parametrize(("beta", "end"), [(1e-5, 0.0), (1 - 1e-5, 1.0)])
def test_near_an_end_it_is_the_plain_divergence_made_small(beta: float, end: float) -> None:
    student, teacher, mask = drawn(4)
    near, plain = gkd(student, teacher, mask, beta=beta), gkd(student, teacher, mask, beta=end)
    assert (near / (1 - abs(beta - 1) if beta < 0.5 else 1 - beta)).item() == pytest.approx(plain.item(), rel=1e-3)


def test_half_is_symmetric_and_bounded() -> None:
    student, teacher, mask = drawn(5, scale=30.0)
    loss = gkd(student, teacher, mask)
    torch.testing.assert_close(loss, gkd(teacher, student, mask))
    assert loss <= np.log(2)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_nothing_to_learn_from_oneself(beta: float) -> None:
    student, _, mask = drawn(6)
    loss = gkd(student, student.detach(), mask, beta=beta)
    assert loss.item() == pytest.approx(0, abs=1e-14)
    assert gradient(loss, student).abs().max() < 1e-14


# padding


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_padding_reaches_neither_value_nor_gradient(beta: float) -> None:
    student, teacher, mask = drawn(7)
    clean = gkd(student, teacher, mask, beta=beta)
    other, taught = student.detach().clone(), teacher.clone()
    other[~mask], taught[~mask] = torch.nan, torch.inf
    dirty = gkd(other.requires_grad_(), taught, mask, beta=beta)
    assert torch.equal(clean, dirty)
    slope = gradient(dirty, other)
    assert torch.equal(slope, gradient(clean, student))
    assert not slope[~mask].any()


def test_no_token_is_a_connected_zero() -> None:
    student, teacher, mask = drawn(8)
    loss = gkd(student, teacher, torch.zeros_like(mask))
    assert loss.item() == 0
    assert not gradient(loss, student).any()


# odd cases


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_half_precision_extremes(dtype: torch.dtype, beta: float) -> None:
    student = torch.tensor([[[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[[-1e4, 1e4, 0.0], [-1e4, 1e4, -1e4]]], dtype=dtype)
    loss = gkd(student, teacher, torch.ones(1, 2, dtype=torch.bool), beta=beta)
    expected = oracle.gkd(student.detach().double().numpy(), teacher.double().numpy(), None, beta)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    grad = gradient(loss, student)
    assert grad.dtype == dtype
    assert grad.isfinite().all()


# the feeder


def fed(feeder: OnPolicy, step: int, given: Batch) -> Batch:
    teacher = Live(causal(seed=2))
    (found,) = feeder.feed(given, {"student": causal(seed=1)}, {"teacher": teacher}, Draw(0, step, "feeder 0"))
    return found


def test_a_share_of_the_steps_learns_from_the_students_texts() -> None:
    given = text_batch()
    steps = [fed(OnPolicy(share=0.3, new_tokens=2), step, given) is not given for step in range(60)]
    assert 8 <= sum(steps) <= 28
    assert steps == [fed(OnPolicy(share=0.3, new_tokens=2), step, given) is not given for step in range(60)]


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_never_and_always(share: float) -> None:
    given = text_batch()
    assert all((fed(OnPolicy(share=share, new_tokens=2), step, given) is given) == (share == 0) for step in range(5))


def test_the_teacher_may_write_the_texts_of_the_other_steps() -> None:
    given = text_batch()
    found = fed(OnPolicy(share=0.0, temperature=1.0, seq_kd=True), 0, given)
    expected = write(causal(seed=2), given, Draw(0, 0, "feeder 0"))
    assert torch.equal(found.inputs["input_ids"], expected.inputs["input_ids"])
    other = write(causal(seed=1), given, Draw(0, 0, "feeder 0"))
    assert not torch.equal(found.inputs["input_ids"], other.inputs["input_ids"])


def test_a_step_on_written_texts() -> None:
    student, teacher, given = causal(seed=1), causal(seed=2), text_batch()
    objective = Objective(task=1.0, gkd=1.0 * GKD())
    feeders = [OnPolicy(share=1.0, new_tokens=4)]
    distiller = Distiller(student, objective, task=Language(), teacher=teacher, sample=given, feeders=feeders)
    (batch,) = distiller.feed(given)
    losses = distiller(batch, distiller.observe(batch))
    assert losses.parts["task"] == 0  # nobody labelled what the student wrote
    assert losses.parts["gkd"] > 0
    losses.total.backward()
    assert all(parameter.grad is not None for parameter in student.module.parameters())
    distiller.close()


# errors


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"share": 1.5}, "share is a share in [0, 1], not 1.5"),
        ({"temperature": 0.0}, "temperature must be > 0, not 0.0"),
    ],
)
def test_options_of_the_feeder(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        OnPolicy(**options)


def test_two_vocabularies() -> None:
    said = (
        "gkd compares models of one vocabulary and length: the student's logits are [1, 2, 3], the teacher's [1, 2, 4]"
    )
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        gkd(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4), torch.ones(1, 2, dtype=torch.bool))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"beta": 1.5}, "beta is a share in [0, 1], not 1.5"),
        ({"temperature": 0}, "temperature must be > 0, not 0"),
        ({"chunk": 0}, "chunk counts tokens, at least 1, not 0"),
    ],
)
def test_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        GKD(**options)
