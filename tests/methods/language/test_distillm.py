# SPDX-License-Identifier: Apache-2.0
import re
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from method_case import ROWS, MethodCase, gaussian, gradient, labelled_batch
from oracles import token_kl as oracle
from tutelage.core import Batch
from tutelage.core.error import UserError
from tutelage.functional.divergence import kl_divergence
from tutelage.methods.language.distillm import DistiLLM, Divergence, distillm

LENGTH, WORDS = 4, 7
SHAPE = {"logits": (ROWS, LENGTH, WORDS)}
DIVERGENCES = get_args(Divergence)

#: The released names, and what they are called here; the forward parts keep the teacher's entropy.
RELEASED: dict[str, dict[str, Any]] = {
    "loss": {"divergence": "forward_kl", "form": "cross_entropy"},
    "loss_reverse_kl": {"divergence": "reverse_kl"},
    "loss_symmetric_kl": {"divergence": "symmetric_kl", "form": "cross_entropy"},
    "loss_tv": {"divergence": "total_variation"},
    "loss_js": {"divergence": "js"},
    "loss_skewed_forward_kl": {"divergence": "skewed_kl", "form": "cross_entropy"},
    "loss_skewed_reverse_kl": {"divergence": "skewed_reverse_kl"},
}


def batch() -> Batch:
    """Rows of four, three, two, one, no and four tokens."""
    lengths = torch.tensor([4, 3, 2, 1, 0, 4])
    return labelled_batch(extra={"token_mask": torch.arange(LENGTH) < lengths[:, None]})


def case() -> MethodCase:
    return MethodCase(
        term=DistiLLM,
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
    teacher = torch.tensor(arrays["t_logits"], dtype=torch.float64)
    mask = torch.tensor(arrays["labels"] != meta["ignore_index"])
    answer: dict[str, Any] = {}
    for name, options in RELEASED.items():
        options = {**options, "skew": meta["skew_lam"], "share": meta["js_lam"]}
        student = torch.tensor(arrays["s_logits"], dtype=torch.float64, requires_grad=True)
        loss = distillm(student, teacher, mask, **options)
        single = distillm(student.detach().float(), teacher.float(), mask, **options)
        slope = "grad_s_logits" + ("" if name == "loss" else f"__{name}")
        found = {name: loss, slope: gradient(loss, student), f"{name}_f32": single}
        answer |= {key: value for key, value in found.items() if key in arrays}
    return answer


# the equations, worked out by loops


def expected(student: Tensor, teacher: Tensor, mask: Tensor, divergence: str, **options: Any) -> float:
    given = (student.detach().numpy(), teacher.numpy(), np.where(mask.numpy(), 0, -100))
    form, skew, share = (options[word] for word in ("form", "skew", "share"))
    found: dict[str, Any] = {
        "skewed_reverse_kl": lambda: oracle.skewed_reverse_kl(*given, skew=skew),
        "skewed_kl": lambda: oracle.skewed_forward_kl(*given, skew=skew, form=form),
        "forward_kl": lambda: oracle.forward_kl(*given, form=form),
        "reverse_kl": lambda: oracle.reverse_kl(*given),
        "symmetric_kl": lambda: oracle.symmetric_kl(*given, a=share, form=form),
        "js": lambda: oracle.js(*given, a=share),
        "total_variation": lambda: oracle.total_variation(*given),
    }
    return float(found[divergence]())


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 4),
    length=st.integers(1, 5),
    words=st.integers(1, 9),
    skew=st.floats(0, 0.95),
    share=st.floats(0.05, 0.95),
    scale=st.floats(0, 20),
    chunk=st.sampled_from([None, 1, 3]),
)
@pytest.mark.parametrize("form", ["kl", "cross_entropy"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equals_the_loops(
    divergence: Any,
    form: Any,
    seed: int,
    rows: int,
    length: int,
    words: int,
    skew: float,
    share: float,
    scale: float,
    chunk: int | None,
) -> None:
    student, teacher, mask = drawn(seed, (rows, length, words), scale)
    options = {"skew": skew, "share": share, "form": form}
    found = distillm(student, teacher, mask, divergence=divergence, chunk=chunk, **options)
    assert found.item() == pytest.approx(expected(student, teacher, mask, divergence, **options), rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("divergence", [d for d in DIVERGENCES if d != "total_variation"])
def test_gradcheck(divergence: Any) -> None:
    student, teacher, mask = drawn(2, (2, 2, 4))
    assert torch.autograd.gradcheck(lambda s: distillm(s, teacher, mask, divergence=divergence), student)
    assert torch.autograd.gradcheck(lambda s: distillm(s, teacher, mask, divergence=divergence, chunk=1), student)


# limits and identities


def test_without_skew_it_is_the_plain_divergence() -> None:
    given = drawn(3)
    for skewed, plain in (("skewed_kl", "forward_kl"), ("skewed_reverse_kl", "reverse_kl")):
        torch.testing.assert_close(
            distillm(*given, divergence=skewed, skew=0.0),  # type: ignore[arg-type]
            distillm(*given, divergence=plain),  # type: ignore[arg-type]
        )


def test_the_forward_divergence_is_kd_at_temperature_one_over_tokens() -> None:
    student, teacher, mask = drawn(4)
    plain = kl_divergence(student, teacher)[mask].mean()
    torch.testing.assert_close(distillm(student, teacher, mask, divergence="forward_kl"), plain)


def test_half_and_half_is_jensen_shannon() -> None:
    student, teacher, mask = drawn(5)
    middle = ((student.softmax(-1) + teacher.softmax(-1)) / 2).log()
    expected = (kl_divergence(middle, student) + kl_divergence(middle, teacher)) / 2
    torch.testing.assert_close(distillm(student, teacher, mask, divergence="js", share=0.5), expected[mask].mean())


def test_pinsker() -> None:
    given = drawn(6)
    assert distillm(*given, divergence="total_variation") <= (distillm(*given, divergence="forward_kl") / 2).sqrt()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_nothing_to_learn_from_oneself(divergence: Any) -> None:
    student, _, mask = drawn(7)
    loss = distillm(student, student.detach(), mask, divergence=divergence)
    assert loss.item() == pytest.approx(0, abs=1e-14)
    assert gradient(loss, student).abs().max() < 1e-14


def test_the_forms_differ_by_the_teachers_entropy() -> None:
    student, teacher, mask = drawn(8)
    for divergence in ("forward_kl", "skewed_kl"):
        kl, ce = (
            distillm(student, teacher, mask, divergence=divergence, form=form) for form in ("kl", "cross_entropy")
        )
        entropy = torch.distributions.Categorical(logits=teacher).entropy()[mask].mean()
        torch.testing.assert_close(ce - kl, entropy)
        torch.testing.assert_close(gradient(kl, student), gradient(ce, student))


def test_skew_bounds_the_divergence() -> None:
    student = torch.tensor([[[0.0, 1e4]]], dtype=torch.float64)
    teacher = -student
    mask = torch.tensor([[True]])
    bounded = distillm(student, teacher, mask, skew=0.1)
    assert bounded.item() == pytest.approx(np.log(10))
    assert distillm(student, teacher, mask, divergence="reverse_kl").item() == pytest.approx(1e4)


# padding


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_padding_reaches_neither_value_nor_gradient(divergence: Any) -> None:
    student, teacher, mask = drawn(9)
    clean = distillm(student, teacher, mask, divergence=divergence)
    other, taught = student.detach().clone(), teacher.clone()
    other[~mask], taught[~mask] = torch.nan, torch.inf
    dirty = distillm(other.requires_grad_(), taught, mask, divergence=divergence)
    assert torch.equal(clean, dirty)
    slope = gradient(dirty, other)
    assert torch.equal(slope, gradient(clean, student))
    assert not slope[~mask].any()


def test_no_token_is_a_connected_zero() -> None:
    student, teacher, mask = drawn(10)
    loss = distillm(student, teacher, torch.zeros_like(mask))
    assert loss.item() == 0
    assert not gradient(loss, student).any()


# odd cases


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_half_precision_extremes(dtype: torch.dtype, divergence: Any) -> None:
    student = torch.tensor([[[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[[-1e4, 1e4, 0.0], [-1e4, 1e4, -1e4]]], dtype=dtype)
    mask = torch.ones(1, 2, dtype=torch.bool)
    loss = distillm(student, teacher, mask, divergence=divergence)
    options = {"skew": 0.1, "share": 0.9, "form": "kl"}
    worked_out = expected(student.double(), teacher.double(), mask, divergence, **options)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(worked_out, rel=1e-5)
    grad = gradient(loss, student)
    assert grad.dtype == dtype
    assert grad.isfinite().all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_masked_word_counts_nothing(divergence: Any) -> None:
    student, teacher, mask = drawn(11)
    gap = torch.full((3, 4, 1), -torch.inf, dtype=torch.float64)
    loss = distillm(torch.cat([student, gap], -1), torch.cat([teacher, gap], -1), mask, divergence=divergence)
    torch.testing.assert_close(loss, distillm(student, teacher, mask, divergence=divergence))
    assert gradient(loss, student).isfinite().all()


# errors


def test_two_vocabularies() -> None:
    said = (
        "distillm compares models of one vocabulary and length: the student's logits are [1, 2, 3], "
        "the teacher's [1, 2, 4]"
    )
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        distillm(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4), torch.ones(1, 2, dtype=torch.bool))


def test_a_batch_that_is_no_text() -> None:
    student, teacher = case().tensors()
    with pytest.raises(UserError, match="the batch does not say which tokens count"):
        case().loss(DistiLLM(), student, teacher, labelled_batch())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"divergence": "skewd_kl"}, "divergence 'skewd_kl' is not known; did you mean skewed_kl?"),
        ({"form": "mse"}, "form 'mse' is not known; valid: cross_entropy, kl"),
        ({"skew": 1.0}, "skew is a share in [0, 1), not 1.0"),
        ({"share": 0}, "share is a share in (0, 1), not 0"),
        ({"chunk": 0}, "chunk counts tokens, at least 1, not 0"),
    ],
)
def test_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        DistiLLM(**options)
