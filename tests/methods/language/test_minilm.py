# SPDX-License-Identifier: Apache-2.0
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from method_case import ROWS, MethodCase, gaussian, labelled_batch
from oracles import minilm as oracle
from tutelage.core import Batch, Facts, Signals
from tutelage.core.error import UserError
from tutelage.methods.language.minilm import RELATIONS, MiniLM, minilm

LENGTH, WIDTH, HEADS = 4, 6, 2
KINDS = ("q", "k", "v")


def batch() -> Batch:
    """Texts of four, three, two, one, no and four tokens."""
    lengths = torch.tensor([4, 3, 2, 1, 0, 4])
    return labelled_batch(extra={"attention_mask": torch.arange(LENGTH) < lengths[:, None]})


def case() -> MethodCase:
    shapes = {f"{kind}[-1]": (ROWS, LENGTH, WIDTH) for kind in KINDS}
    return MethodCase(
        term=lambda: MiniLM(relation_heads=HEADS),
        student=lambda seed: gaussian(seed, shapes),
        teacher=lambda seed: gaussian(seed + 1000, shapes, 2.0),
        batch=batch,
    )


def drawn(
    seed: int = 0, rows: int = 3, length: int = 4, student: int = 6, teacher: int = 8, scale: float = 1.0
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    one = gaussian(seed, dict.fromkeys(KINDS, (rows, length, student)), scale)
    other = gaussian(seed + 1, dict.fromkeys(KINDS, (rows, length, teacher)), scale)
    lengths = 1 + torch.arange(rows) % length
    free = {kind: tensor.double().requires_grad_() for kind, tensor in one.items()}
    return free, {kind: tensor.double() for kind, tensor in other.items()}, torch.arange(length) < lengths[:, None]


def slopes(loss: Tensor, student: dict[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, [*student.values()], allow_unused=True)
    return {
        kind: torch.zeros_like(tensor) if slope is None else slope
        for (kind, tensor), slope in zip(student.items(), found, strict=True)
    }


# the authors' numbers


def golden(claim: str, arrays: dict[str, NDArray[Any]], meta: dict[str, Any]) -> dict[str, Any]:
    names = {"1": "q", "2": "k", "3": "v"}
    relations = {
        ",".join(names[number] for number in pair.split(",")): weight for pair, weight in meta["relations"].items()
    }
    mask = torch.tensor(arrays["attention_mask"]).bool()
    answer: dict[str, Any] = {}
    for suffix, dtype in (("", torch.float64), ("_f32", torch.float32)):
        student = {k: torch.tensor(arrays[f"s_{k}"], dtype=dtype, requires_grad=True) for k in KINDS}
        teacher = {k: torch.tensor(arrays[f"t_{k}"], dtype=dtype) for k in KINDS}
        loss = minilm(student, teacher, mask, relation_heads=meta["relation_heads"], relations=relations)
        answer[f"loss{suffix}"] = loss
        if not suffix:
            answer |= {f"grad_s_{kind}": slope for kind, slope in slopes(loss, student).items()}
    return {name: value for name, value in answer.items() if name in arrays}


# the equation, worked out by loops


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 4),
    length=st.integers(1, 5),
    heads=st.sampled_from([1, 2]),
    scale=st.floats(0, 4),
)
@pytest.mark.parametrize("form", ["self", "attention"])
def test_equals_the_loops(form: Any, seed: int, rows: int, length: int, heads: int, scale: float) -> None:
    student, teacher, mask = drawn(seed, rows, length, scale=scale)
    expected = oracle.minilm(
        {kind: tensor.detach().numpy() for kind, tensor in student.items()},
        {kind: tensor.numpy() for kind, tensor in teacher.items()},
        mask.numpy(),
        heads,
        {"self": oracle.VERSION_2, "attention": oracle.VERSION_1}[form],
    )
    found = minilm(student, teacher, mask, relation_heads=heads, relations=RELATIONS[form])
    assert found.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_gradcheck() -> None:
    student, teacher, mask = drawn(1, 2, 3, 4, 4)

    def loss(*vectors: Tensor) -> Tensor:
        return minilm(dict(zip(KINDS, vectors, strict=True)), teacher, mask, relation_heads=2)

    assert torch.autograd.gradcheck(loss, tuple(student.values()))


# limits and identities


def test_nothing_to_learn_from_oneself_or_a_rotation() -> None:
    student, _, mask = drawn(2)
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    for teacher in (
        {kind: tensor.detach() for kind, tensor in student.items()},
        {kind: tensor.detach() @ turn for kind, tensor in student.items()},
    ):
        loss = minilm(student, teacher, mask, relation_heads=1)
        assert loss.item() == pytest.approx(0, abs=1e-12)
        assert all(slope.abs().max() < 1e-12 for slope in slopes(loss, student).values())


def test_a_text_of_one_token_has_no_relation() -> None:
    student, teacher, _ = drawn(3)
    mask = torch.arange(4) < torch.tensor([1, 1, 1])[:, None]
    assert minilm(student, teacher, mask, relation_heads=2).item() == pytest.approx(0, abs=1e-14)


def test_relations_that_are_not_asked_for_have_no_gradient() -> None:
    student, teacher, mask = drawn(4)
    found = slopes(minilm(student, teacher, mask, relation_heads=2, relations={"v,v": 1.0}), student)
    assert not found["q"].any()
    assert not found["k"].any()
    assert found["v"].any()


def test_options_of_layers_and_form_choose_the_taps() -> None:
    term = MiniLM(form="attention", student_layer=3, teacher_layer=20)
    assert [tap.name for tap in term.reads.student] == ["q[3]", "k[3]", "v[3]"]
    assert [tap.name for tap in term.reads.teacher] == ["q[20]", "k[20]", "v[20]"]


# padding


def test_padding_reaches_neither_value_nor_gradient() -> None:
    student, teacher, mask = drawn(5)
    clean = minilm(student, teacher, mask, relation_heads=2)
    spoiled = {kind: tensor.detach().clone() for kind, tensor in student.items()}
    other = {kind: tensor.clone() for kind, tensor in teacher.items()}
    for tensor in (*spoiled.values(), *other.values()):
        tensor[~mask] = torch.nan
    free = {kind: tensor.requires_grad_() for kind, tensor in spoiled.items()}
    dirty = minilm(free, other, mask, relation_heads=2)
    assert torch.equal(clean, dirty)
    expected = slopes(clean, student)
    for kind, slope in slopes(dirty, free).items():
        assert torch.equal(slope, expected[kind])
        assert not slope[~mask].any()


def test_more_padding_changes_nothing() -> None:
    student, teacher, mask = drawn(6)
    pad = torch.nn.functional.pad
    wide = [
        {kind: pad(tensor, (0, 0, 0, 3), value=5.0) for kind, tensor in side.items()} for side in (student, teacher)
    ]
    torch.testing.assert_close(
        minilm(wide[0], wide[1], pad(mask, (0, 3)), relation_heads=2),
        minilm(student, teacher, mask, relation_heads=2),
    )


def test_a_text_without_tokens_counts_nothing_and_is_finite() -> None:
    student, teacher, mask = drawn(7)
    mask[0] = False
    loss = minilm(student, teacher, mask, relation_heads=2)
    assert loss.isfinite()
    found = slopes(loss, student)
    assert all(slope.isfinite().all() and not slope[0].any() for slope in found.values())


# odd cases


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_extremes(dtype: torch.dtype) -> None:
    vectors = torch.tensor([[[1e4, -1e4], [-1e4, 1e4]]], dtype=dtype)
    student = {kind: vectors.clone().requires_grad_() for kind in KINDS}
    loss = minilm(
        student, {kind: -vectors.flip(1) for kind in KINDS}, torch.ones(1, 2, dtype=torch.bool), relation_heads=1
    )
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert all(slope.isfinite().all() for slope in slopes(loss, student).values())


# errors


@pytest.mark.parametrize(
    ("widths", "heads", "relations", "said"),
    [
        (
            (6, 8),
            4,
            "self",
            "minilm: the student's q, 6 wide, has no 4 equal parts: give relation_heads a divisor of both widths",
        ),
        (
            (8, 6),
            4,
            "self",
            "minilm: the teacher's q, 6 wide, has no 4 equal parts: give relation_heads a divisor of both widths",
        ),
    ],
)
def test_widths_that_cannot_be_cut(widths: tuple[int, int], heads: int, relations: Any, said: str) -> None:
    student, teacher, mask = drawn(0, student=widths[0], teacher=widths[1])
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        minilm(student, teacher, mask, relation_heads=heads, relations=RELATIONS[relations])


def test_grouped_heads() -> None:
    student, teacher, mask = drawn()
    teacher["k"] = teacher["k"][..., :4]
    said = "minilm: the teacher's q,k are 8 and 4 wide (grouped heads); relate only equals: form: self"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        minilm(student, teacher, mask, relation_heads=2, relations=RELATIONS["attention"])


def test_vectors_that_are_no_texts() -> None:
    signals = Signals(None, {f"{kind}[-1]": torch.zeros(2, 3, 4, 4) for kind in KINDS})
    with pytest.raises(UserError, match=re.escape("minilm relates vectors of tokens [B, L, D], not [2, 3, 4, 4]")):
        MiniLM().build(signals, signals, Facts())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"form": "slef"}, "form 'slef' is not known; did you mean self?"),
        ({"relation_heads": 0}, "relation_heads counts heads, at least 1, not 0"),
    ],
)
def test_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        MiniLM(**options)
