# SPDX-License-Identifier: Apache-2.0
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from method_case import ROWS, MethodCase, Tensors, gaussian, labelled_batch
from oracles import tinybert as oracle
from tiny_text import masked
from tutelage.core import Batch, Facts, Signals, Tap
from tutelage.core.error import UserError
from tutelage.core.reader import Reader
from tutelage.functional.attention import head_scores
from tutelage.methods.language.tinybert import TinyBERT, attention_distance, prediction_distance, tinybert
from tutelage.tasks.language import Language

LENGTH, STUDENT, TEACHER = 4, 4, 6
HEADS_DIFFER = (
    "tinybert: the teacher's queries and keys, 6 wide, have no 4 heads: set heads to the number both models have"
)


def batch() -> Batch:
    """Texts of four, three, two, one, no and four tokens."""
    lengths = torch.tensor([4, 3, 2, 1, 0, 4])
    return labelled_batch(extra={"attention_mask": torch.arange(LENGTH) < lengths[:, None]})


def layers(seed: int, count: int, width: int, scale: float = 1.0) -> Tensors:
    shapes = {f"hidden[{n}]": (ROWS, LENGTH, width) for n in range(count + 1)}
    shapes |= {f"{kind}[{n}]": (ROWS, LENGTH, width) for kind in "qk" for n in range(count)}
    return gaussian(seed, shapes, scale)


def case() -> MethodCase:
    return MethodCase(
        term=lambda: TinyBERT(heads=2),
        student=lambda seed: layers(seed, 2, STUDENT),
        teacher=lambda seed: layers(seed + 1000, 4, TEACHER, 2.0),
        batch=batch,
    )


# the authors' numbers


def golden(claim: str, arrays: dict[str, NDArray[Any]], meta: dict[str, Any]) -> dict[str, Any]:
    answer = {f"{name}_f32": value for name, value in readings(arrays, meta, torch.float32)[0].items()}
    losses, free = readings(arrays, meta, torch.float64)
    for name, loss in losses.items():
        answer[name] = loss
        found = torch.autograd.grad(loss, [*free.values()], retain_graph=True, allow_unused=True)
        for key, tensor, slope in zip(free, free.values(), found, strict=True):
            place = f"grad_{key}" + ("" if name == "loss" else f"__{name}")
            answer[place] = torch.zeros_like(tensor) if slope is None else slope
    return {name: value for name, value in answer.items() if name in arrays}


def readings(
    arrays: dict[str, NDArray[Any]], meta: dict[str, Any], dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    def read(name: str, free: bool = False) -> Tensor:
        return torch.tensor(arrays[name], dtype=dtype, requires_grad=free)

    m, n = meta["num_student_layers"], meta["num_teacher_layers"]
    names = [f"s_att{i}" for i in range(m)] + [f"s_hidden{i}" for i in range(m + 1)]
    free = {name: read(name, True) for name in (*names, "s_logits", "w_fit_dense.weight", "w_fit_dense.bias")}
    fit = (free["w_fit_dense.weight"], free["w_fit_dense.bias"])
    parts = tinybert(
        [free[f"s_att{i}"] for i in range(m)],
        [read(f"t_att{i}") for i in range(n)],
        [F.linear(free[f"s_hidden{i}"], *fit) for i in range(m + 1)],
        [read(f"t_hidden{i}") for i in range(n + 1)],
        threshold=meta["mask_threshold"],
    )
    prediction = prediction_distance(free["s_logits"], read("t_logits"), temperature=meta["temperature"])
    losses = {"loss_att": parts["attention"], "loss_hidden": parts["hidden"], "loss_pred": prediction}
    return {"loss": parts["attention"] + parts["hidden"], **losses}, free


# the equations, worked out by loops


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 3),
    length=st.integers(1, 4),
    depth=st.integers(1, 3),
    step=st.integers(1, 3),
    heads=st.integers(1, 3),
)
def test_equals_the_loops(seed: int, rows: int, length: int, depth: int, step: int, heads: int) -> None:
    shapes: dict[str, tuple[int, ...]] = {f"as{n}": (rows, heads, length, length) for n in range(depth)}
    shapes |= {f"at{n}": (rows, heads, length, length) for n in range(depth * step)}
    shapes |= {f"hs{n}": (rows, length, 3) for n in range(depth + 1)}
    shapes |= {f"ht{n}": (rows, length, 5) for n in range(depth * step + 1)}
    found = {name: tensor.double() for name, tensor in gaussian(seed, {**shapes, "w": (5, 3), "b": (5,)}).items()}
    found["as0"][0, 0, 0, -1] = found["at0"][0, 0, 0, -1] = -1e4
    sides = [[tensor for name, tensor in found.items() if name.startswith(side)] for side in ("as", "at", "hs", "ht")]
    arrays = [[tensor.numpy() for tensor in side] for side in sides]
    expected = oracle.tinybert(
        arrays[0], arrays[1], arrays[2], arrays[3], found["w"].numpy(), found["b"].numpy(), threshold=-100.0
    )
    fitted = [F.linear(state, found["w"], found["b"]) for state in sides[2]]
    parts = tinybert(sides[0], sides[1], fitted, sides[3], threshold=-100.0)
    for name, value in parts.items():
        assert value.item() == pytest.approx(expected[name], rel=1e-9, abs=1e-12), name


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_prediction_equals_the_loops(temperature: float) -> None:
    drawn = gaussian(1, {"s": (3, 5), "t": (3, 5)}, 2.0)
    student, teacher = drawn["s"].double(), drawn["t"].double()
    expected = oracle.prediction(student.numpy(), teacher.numpy(), temperature)
    assert prediction_distance(student, teacher, temperature=temperature).item() == pytest.approx(expected, rel=1e-10)


def test_gradcheck() -> None:
    drawn = gaussian(2, {"s": (2, 2, 3, 3), "t": (2, 2, 3, 3)})
    mask = torch.tensor([[True, True, False], [True, True, True]])
    student, teacher = drawn["s"].double().requires_grad_(), drawn["t"].double()
    assert torch.autograd.gradcheck(lambda s: attention_distance(s, teacher, mask).sum(), student)


# limits and identities


def test_the_scores_are_those_of_the_models_attention() -> None:
    """From queries and keys alone: their softmax is the attention that transformers gives."""
    model = masked(num_hidden_layers=1)
    network: Any = model.module
    network.set_attn_implementation("eager")
    ids = torch.arange(8)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    signals = Reader(model, [Tap("q[0]"), Tap("k[0]")], Language())(Batch.of(inputs))
    scores = head_scores(signals["q[0]"], signals["k[0]"], 2)
    attention = network(**inputs, output_attentions=True).attentions[0]
    torch.testing.assert_close(scores.softmax(-1), attention)


def test_without_padding_a_mask_changes_nothing() -> None:
    drawn = gaussian(3, {"s": (2, 2, 3, 3), "t": (2, 2, 3, 3)})
    every = torch.ones(2, 3, dtype=torch.bool)
    torch.testing.assert_close(
        attention_distance(drawn["s"], drawn["t"], every), attention_distance(drawn["s"], drawn["t"])
    )


def test_the_last_stage_is_the_mean_soft_cross_entropy() -> None:
    drawn = gaussian(4, {"s": (2, 3, 5), "t": (2, 3, 5)})
    mask = torch.tensor([[True, True, False], [True, False, False]])
    rows = -(drawn["t"].softmax(-1) * drawn["s"].log_softmax(-1)).mean(-1)
    expected = (rows[0, :2].mean() + rows[1, 0]) / 2
    torch.testing.assert_close(prediction_distance(drawn["s"], drawn["t"], mask), expected)
    term = TinyBERT(stage="prediction")
    assert [tap.name for tap in term.reads.student] == ["logits"]


# padding


def outcome(term: TinyBERT, student: Tensors, teacher: Tensors) -> Tensor:
    return case().loss(term, student, teacher, batch())


def test_padding_reaches_neither_value_nor_gradient() -> None:
    term = case().built(dtype=torch.float64)
    assert isinstance(term, TinyBERT)
    student, teacher = case().tensors(dtype=torch.float64)
    assert teacher is not None
    mask = batch().attention_mask
    clean = outcome(term, student, teacher)
    spoiled = {name: tensor.detach().clone() for name, tensor in student.items()}
    other = {name: tensor.clone() for name, tensor in teacher.items()}
    for tensor in (*spoiled.values(), *other.values()):
        tensor[~mask] = torch.nan
    free = {name: tensor.requires_grad_() for name, tensor in spoiled.items()}
    dirty = outcome(term, free, other)
    assert torch.equal(clean, dirty)
    weights = list(term.parameters())
    found = torch.autograd.grad(dirty, [*free.values(), *weights])
    expected = torch.autograd.grad(clean, [*student.values(), *weights])
    for slope, plain in zip(found, expected, strict=True):
        assert torch.equal(slope, plain)
    for slope in found[: len(free)]:
        assert not slope[~mask].any()


def test_more_padding_changes_nothing() -> None:
    drawn = gaussian(5, {"s": (2, 2, 3, 3), "t": (2, 2, 3, 3)})
    mask = torch.tensor([[True, True, False], [True, True, True]])
    wide = [F.pad(tensor, (0, 2, 0, 2), value=9.0) for tensor in drawn.values()]
    torch.testing.assert_close(
        attention_distance(wide[0], wide[1], F.pad(mask, (0, 2))), attention_distance(drawn["s"], drawn["t"], mask)
    )


# odd cases


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_extremes(dtype: torch.dtype) -> None:
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [-1e4, 1e4, -1e4]], dtype=dtype)
    loss = prediction_distance(student, teacher)
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert torch.autograd.grad(loss, student)[0].isfinite().all()
    scores = torch.full((1, 1, 2, 2), 6e4, dtype=torch.float16, requires_grad=True)
    distance = attention_distance(scores, -scores.detach()).sum()
    assert distance.isfinite()
    assert distance.dtype == torch.float32


# errors


def built(student: Tensors, teacher: Tensors, **options: Any) -> None:
    TinyBERT(**options).build(Signals(None, student), Signals(None, teacher), Facts())


@pytest.mark.parametrize(
    ("student", "teacher", "options", "said"),
    [
        (
            layers(0, 2, 4),
            layers(0, 3, 4),
            {"heads": 2},
            "tinybert compares every k-th layer: the teacher's 3 are no multiple of the student's 2",
        ),
        (
            layers(0, 2, 4),
            layers(0, 4, 6),
            {"heads": 4},
            HEADS_DIFFER,
        ),
    ],
)
def test_models_that_do_not_fit(student: Tensors, teacher: Tensors, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        built(student, teacher, **options)


def test_two_shapes() -> None:
    with pytest.raises(UserError, match=r"^tinybert: the student has 2 heads, the teacher 3$"):
        tinybert([torch.zeros(1, 2, 3, 3)], [torch.zeros(1, 3, 3, 3)], [], [])
    with pytest.raises(UserError, match=r"^tinybert compares logits of one shape"):
        prediction_distance(torch.zeros(1, 2), torch.zeros(1, 3))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"heads": 0}, "heads counts heads, at least 1, not 0"),
        ({"stage": "layer"}, "stage 'layer' is not known; did you mean layers?"),
        ({"temperature": -1}, "temperature must be > 0, not -1"),
    ],
)
def test_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        TinyBERT(**options)
