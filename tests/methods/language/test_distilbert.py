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

from method_case import ROWS, MethodCase, gaussian, labelled_batch
from oracles import distilbert as oracle
from tiny_text import causal, masked, text_batch
from tutelage.core import Batch, Facts, Model
from tutelage.core.error import UserError
from tutelage.methods.language.distilbert import DistilBERT, EveryOther, distilbert
from tutelage.methods.language.distillm import distillm
from tutelage.tasks.language import Language

LENGTH, WORDS, WIDTH = 4, 7, 5
SHAPES = {"logits": (ROWS, LENGTH, WORDS), "hidden[-1]": (ROWS, LENGTH, WIDTH)}


def batch() -> Batch:
    """Rows of four, three, two, one, no and four tokens."""
    lengths = torch.tensor([4, 3, 2, 1, 0, 4])
    return labelled_batch(extra={"token_mask": torch.arange(LENGTH) < lengths[:, None]})


def case() -> MethodCase:
    return MethodCase(
        term=DistilBERT,
        student=lambda seed: gaussian(seed, SHAPES),
        teacher=lambda seed: gaussian(seed + 1000, SHAPES, 2.0),
        batch=batch,
    )


def drawn(seed: int = 0, shape: tuple[int, int] = (3, 4), words: int = WORDS) -> tuple[Tensor, ...]:
    shapes = {"s": (*shape, words), "t": (*shape, words), "hs": (*shape, WIDTH), "ht": (*shape, WIDTH), "mask": shape}
    found = gaussian(seed, shapes, 2.0)
    mask = found["mask"] < 1
    mask[0, 0] = True
    free = (found["s"].double().requires_grad_(), found["t"].double())
    return (*free, found["hs"].double().requires_grad_(), found["ht"].double(), mask)


# the authors' numbers


def golden(claim: str, arrays: dict[str, NDArray[Any]], meta: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    for suffix, dtype in (("", torch.float64), ("_f32", torch.float32)):
        logits, hidden = (
            torch.tensor(arrays[name], dtype=dtype, requires_grad=True) for name in ("s_logits", "s_hidden")
        )
        taught, held = (torch.tensor(arrays[name], dtype=dtype) for name in ("t_logits", "t_hidden"))
        mask = torch.tensor(arrays["attention_mask"]).bool()
        options = {word: meta[word] for word in ("temperature", "alpha_ce", "alpha_mse", "alpha_cos")}
        parts = distilbert(logits, taught, hidden, held, mask, **options)
        hard = F.cross_entropy(logits.transpose(1, 2), torch.tensor(arrays["labels"]))
        loss = torch.stack([*parts.values()]).sum() + meta["alpha_mlm"] * hard
        answer[f"loss{suffix}"] = loss
        if not suffix:
            slopes = torch.autograd.grad(loss, (logits, hidden), allow_unused=True)
            for name, tensor, slope in zip(("s_logits", "s_hidden"), (logits, hidden), slopes, strict=True):
                answer[f"grad_{name}"] = torch.zeros_like(tensor) if slope is None else slope
            whole = {"alpha_ce": 1.0, "alpha_mse": 1.0, "alpha_cos": 1.0}
            plain = {**distilbert(logits, taught, hidden, held, mask, **{**options, **whole}), "mlm": hard}
            for name, part in plain.items():  # the released code works out what has a coefficient
                answer[f"out_{name}"] = part if meta[f"alpha_{name}"] else 0.0
    return {name: value for name, value in answer.items() if name in arrays}


# the equations, worked out by loops


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 3),
    length=st.integers(1, 4),
    words=st.integers(2, 8),
    temperature=st.floats(0.5, 5),
    coefficients=st.tuples(st.floats(0.1, 5), st.floats(0.1, 2), st.floats(0.1, 2)),
    chunk=st.sampled_from([None, 2]),
)
def test_equals_the_loops(
    seed: int,
    rows: int,
    length: int,
    words: int,
    temperature: float,
    coefficients: tuple[float, float, float],
    chunk: int | None,
) -> None:
    ce, mse, cos = coefficients
    labels = np.full((rows, length), -100)
    labels[0, 0] = 1
    logits, taught, hidden, held, mask = drawn(seed, (rows, length), words)
    expected = oracle.distilbert(
        logits.detach().numpy(),
        taught.numpy(),
        hidden.detach().numpy(),
        held.numpy(),
        mask.numpy(),
        labels,
        temperature=temperature,
    )
    options = {"alpha_ce": ce, "alpha_mse": mse, "alpha_cos": cos, "temperature": temperature}
    found = distilbert(logits, taught, hidden, held, mask, **options, chunk=chunk)
    for name, weight in (("ce", ce), ("mse", mse), ("cos", cos)):
        assert found[name].item() == pytest.approx(weight * expected[name], rel=1e-9, abs=1e-12), name


def test_gradcheck() -> None:
    student, teacher, hidden, held, mask = drawn(1, (2, 2), 4)

    def loss(logits: Tensor, states: Tensor) -> Tensor:
        return torch.stack([*distilbert(logits, teacher, states, held, mask, alpha_mse=0.5).values()]).sum()

    assert torch.autograd.gradcheck(loss, (student, hidden))


# limits and identities


def test_at_temperature_one_the_divergence_is_the_forward_one() -> None:
    student, teacher, _, _, mask = drawn(2)
    found = distilbert(student, teacher, None, None, mask, temperature=1.0, alpha_ce=3.0)
    torch.testing.assert_close(found["ce"], 3 * distillm(student, teacher, mask, divergence="forward_kl"))
    assert "cos" not in found


def test_the_cosine_forgives_length() -> None:
    student, teacher, hidden, _, mask = drawn(3)
    found = distilbert(student, teacher, hidden, 7 * hidden.detach(), mask)
    assert found["cos"].item() == pytest.approx(0, abs=1e-12)


def test_coefficients_of_zero_leave_parts_and_taps_out() -> None:
    term = DistilBERT(alpha_cos=0.0)
    assert [tap.name for tap in term.reads.student] == ["logits"]
    tensors, teacher = case().tensors()
    assert list(case().outcome(term, tensors, teacher, batch()).parts) == ["ce"]


# padding


def test_padding_reaches_neither_value_nor_gradient() -> None:
    student, teacher, hidden, held, mask = drawn(4)

    def total(logits: Tensor, taught: Tensor, states: Tensor, held: Tensor) -> Tensor:
        return torch.stack([*distilbert(logits, taught, states, held, mask, alpha_mse=0.5).values()]).sum()

    clean = total(student, teacher, hidden, held)
    spoiled = [part.detach().clone() for part in (student, teacher, hidden, held)]
    for part in spoiled:
        part[~mask] = torch.nan
    free = (spoiled[0].requires_grad_(), spoiled[2].requires_grad_())
    dirty = total(spoiled[0], spoiled[1], spoiled[2], spoiled[3])
    assert torch.equal(clean, dirty)
    found = torch.autograd.grad(dirty, free)
    for slope, expected in zip(found, torch.autograd.grad(clean, (student, hidden)), strict=True):
        assert torch.equal(slope, expected)
        assert not slope[~mask].any()


# odd cases


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_extremes(dtype: torch.dtype) -> None:
    student = torch.tensor([[[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[[-1e4, 1e4, 0.0], [-1e4, 1e4, -1e4]]], dtype=dtype)
    mask = torch.ones(1, 2, dtype=torch.bool)
    parts = distilbert(student, teacher, student, teacher, mask, alpha_mse=1.0)
    loss = torch.stack([*parts.values()]).sum()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert torch.autograd.grad(loss, student)[0].isfinite().all()


def test_constant_states_have_a_finite_gradient() -> None:
    student, teacher, _, _, mask = drawn(5)
    still = torch.zeros(3, 4, WIDTH, dtype=torch.float64, requires_grad=True)
    found = distilbert(student, teacher, still, torch.zeros_like(still), mask)["cos"]
    assert torch.autograd.grad(found, still)[0].isfinite().all()


# the first weights


def begin(student: Model, teacher: Model | None, **options: Any) -> EveryOther:
    rebuild = EveryOther(**options)
    assert rebuild.begin(student, teacher, Language(), Facts(), text_batch()) is student
    return rebuild


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_the_student_begins_with_every_other_layer(kind: str) -> None:
    if kind == "bert":
        student, teacher, home = masked(seed=1), masked(seed=2, num_hidden_layers=4), "bert.encoder.layer"
    else:
        student, teacher, home = causal(seed=1), causal(seed=2, n_layer=4), "transformer.h"
    said = begin(student, teacher).report()
    own, lent = student.module.state_dict(), teacher.module.state_dict()
    for name, tensor in own.items():
        source = name.replace(f"{home}.1.", f"{home}.2.")
        assert torch.equal(tensor, lent[source]), name
        assert tensor.data_ptr() != lent[source].data_ptr()
    assert said == "the student begins with layers 0, 2 of the teacher"


def test_equal_depth_begins_as_the_teacher() -> None:
    student, teacher = causal(seed=1), causal(seed=2)
    begin(student, teacher)
    inputs = text_batch().inputs
    assert torch.equal(student(inputs), teacher(inputs))


def test_the_students_own_weights_stay_if_asked() -> None:
    student = causal(seed=1)
    before = {name: tensor.clone() for name, tensor in student.module.state_dict().items()}
    begin(student, causal(seed=2), initialise=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.module.state_dict().items())
    assert EveryOther.restore(student, EveryOther().shape()) is student


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"n_layer": 3}, "distilbert begins with every k-th layer: the teacher's 3 are no multiple of the student's 2"),
        (
            {"n_embd": 12},
            "distilbert begins with the teacher's weights: transformer.wte.weight is [11, 8] in the student",
        ),
    ],
)
def test_a_teacher_that_does_not_fit(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}.*initialise: false"):
        begin(causal(seed=1), causal(seed=2, **options))


def test_no_teacher_to_begin_with() -> None:
    with pytest.raises(UserError, match=r"^distilbert begins with the weights of a live teacher"):
        begin(causal(), None)


# errors


def test_two_shapes() -> None:
    mask = torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(UserError, match=r"^distilbert compares models of one vocabulary and length"):
        distilbert(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4), None, None, mask)
    said = (
        "distilbert compares hidden states of one width: the student's are 5 wide, the teacher's 6; give the student "
        "the teacher's width, or alpha_cos: 0"
    )
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        distilbert(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), torch.zeros(1, 2, 5), torch.zeros(1, 2, 6), mask)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": 0}, "temperature must be > 0, not 0"),
        ({"alpha_mse": -1.0}, "alpha_mse must not be negative, as -1.0 is"),
        (
            {"alpha_ce": 0, "alpha_cos": 0},
            "distilbert: alpha_ce, alpha_mse and alpha_cos are all 0; leave the term out",
        ),
        ({"chunk": 0}, "chunk counts tokens, at least 1, not 0"),
    ],
)
def test_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        DistilBERT(**options)
