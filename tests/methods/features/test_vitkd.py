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

from method_case import MethodCase, Tensors, gaussian
from oracles import vitkd as oracle
from tutelage.core import Facts, Signals
from tutelage.core.error import UserError
from tutelage.methods.features.vitkd import ViTKD, removed_mask, vitkd

Arrays = dict[str, NDArray[Any]]
NAMES = ("blocks[0]", "blocks[1]", "tokens")


def case(width: int = 6, rows: int = 6, tokens: int = 4, **options: Any) -> MethodCase:
    options = {"alpha": 1.0, "beta": 1.0, **options}
    return MethodCase(
        term=lambda: ViTKD(**options),
        student=lambda seed: gaussian(seed, dict.fromkeys(NAMES, (rows, tokens, 4))),
        teacher=lambda seed: gaussian(seed + 1000, dict.fromkeys(NAMES, (rows, tokens, width))),
    )


def run(
    student: Tensors, teacher: Tensors, weights: Tensors, noise: Tensor, **options: Any
) -> tuple[dict[str, Tensor], ViTKD]:
    """The term with these weights, in the tensors' type: built as in a run, then loaded."""
    sides = (Signals(None, student), Signals(None, teacher))
    term = ViTKD(**options)
    term.build(sides[0].detach(), sides[1], Facts())
    term.to(noise.dtype).load_state_dict(weights)
    return term(*sides, case().batch(), noise), term


# the authors' numbers


def golden(claim: str, arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    options = {"alpha": meta["alpha_vitkd"], "beta": meta["beta_vitkd"], "mask_ratio": meta["lambda_vitkd"]}
    own = ("align_", "generation.", "mask_token")  # what a term trains
    for suffix, dtype in (("", torch.float64), ("_f32", torch.float32)):
        held = {name: torch.tensor(array, dtype=dtype) for name, array in arrays.items()}
        weights = {name: held[name] for name in held if name.startswith(own)}
        low, high = (held[f"student_{part}"].requires_grad_() for part in ("low", "high"))
        student = dict(zip(NAMES, (*low.unbind(1), high), strict=True))
        teacher = dict(zip(NAMES, (*held["teacher_low"].unbind(1), held["teacher_high"]), strict=True))
        parts, term = run(student, teacher, weights, held["mask_noise"], **options)
        loss = parts["mimic"] + parts["generation"]
        loss.backward()
        found: dict[str, Any] = {"loss": loss, "loss_mimic": parts["mimic"], "loss_generation": parts["generation"]}
        found |= {"grad_student_low": low.grad, "grad_student_high": high.grad}
        found |= {f"grad_{name}": weight.grad for name, weight in term.named_parameters()}
        answer |= {f"{name}{suffix}": value for name, value in found.items()}
    noise = torch.tensor(arrays["mask_noise"], dtype=torch.float64)
    removed = removed_mask(noise, meta["lambda_vitkd"])
    return answer | {"removed_mask": removed, "num_kept": (removed[0] == 0).sum()}


# the equation, worked out by loops


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 3),
    widths=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    side=st.integers(1, 3),
    ratio=st.floats(0.05, 1),
)
def test_equals_the_loops(seed: int, rows: int, widths: tuple[int, int], side: int, ratio: float) -> None:
    torch.manual_seed(seed)
    student, teacher = (
        {name: torch.randn(rows, side**2, width, dtype=torch.float64) for name in NAMES} for width in widths
    )
    noise = torch.rand(rows, side**2, dtype=torch.float64)
    sides = (Signals(None, student), Signals(None, teacher))
    term = ViTKD(alpha=0.3, beta=0.7, mask_ratio=ratio)
    term.build(*sides, Facts())
    term.double()
    torch.nn.init.normal_(term.mask_token)
    parts = term(*sides, case().batch(), noise)
    low, high = (
        [np.stack([tensors[name].numpy() for name in NAMES[:2]], 1), tensors["tokens"].numpy()]
        for tensors in (student, teacher)
    )
    weights = {name: weight.numpy() for name, weight in term.state_dict().items()}
    expected = oracle.vitkd(low[0], high[0], low[1], high[1], weights, noise.numpy(), 0.3, 0.7, ratio)
    assert parts["mimic"].item() == pytest.approx(expected["mimic"], rel=1e-10)
    assert parts["generation"].item() == pytest.approx(expected["generation"], rel=1e-10, abs=1e-14)


def test_gradcheck_through_the_layers() -> None:
    here = case(mask_ratio=0.5)
    term, batch = here.built(dtype=torch.float64), here.batch()
    student, teacher = here.tensors(dtype=torch.float64)
    noise = here.draws(term, student, teacher, batch)
    names = [name for name, _ in term.named_parameters()]

    def loss(one: Tensor, two: Tensor, three: Tensor, *weights: Tensor) -> Tensor:
        sides = (here.signals(dict(zip(NAMES, (one, two, three), strict=True))), here.teach(teacher))
        named = dict(zip(names, weights, strict=True))
        parts = torch.func.functional_call(term, named, (*sides, batch, noise))
        total: Tensor = parts["mimic"] + parts["generation"]
        return total

    free = (*(student[name] for name in NAMES), *term.parameters())
    assert torch.autograd.gradcheck(loss, free, fast_mode=True)


# limits and identities


@pytest.mark.parametrize(
    ("tokens", "ratio", "kept"),
    [(36, 0.4, 21), (16, 0.5, 8), (9, 0.5, 4), (4, 1.0, 0), (196, 0.5, 98), (4, 0.1, 3)],
)
def test_the_number_of_kept_tokens_is_rounded_down(tokens: int, ratio: float, kept: int) -> None:
    noise = torch.rand(3, tokens, generator=torch.Generator().manual_seed(0))
    removed = removed_mask(noise, ratio)
    assert ((removed == 0).sum(1) == kept).all()
    np.testing.assert_array_equal(removed.numpy(), oracle.removed_mask(noise.double().numpy(), ratio))


def test_equal_noise_is_settled_by_place() -> None:
    assert removed_mask(torch.zeros(1, 4), 0.5).tolist() == [[0.0, 0.0, 1.0, 1.0]]


def test_only_removed_tokens_count_in_the_generation() -> None:
    generated, teacher = gaussian(0, {"g": (2, 4, 3)})["g"], gaussian(1, {"t": (2, 4, 3)})["t"]
    removed = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    before = vitkd([generated], [teacher], generated, teacher, removed, beta=1.0)["generation"]
    moved = teacher + (1 - removed)[:, :, None]
    assert vitkd([generated], [teacher], generated, moved, removed, beta=1.0)["generation"] == before
    expected = (generated[0, [0, 3]] - teacher[0, [0, 3]]).square().sum() / (0.5 * 2)
    torch.testing.assert_close(before, expected)


def test_a_removed_token_of_the_student_does_not_reach_the_generator() -> None:
    here = case(mask_ratio=0.5)
    term = here.built()
    student, teacher = here.tensors()
    noise = torch.tensor([[0.1, 0.2, 0.8, 0.9]]).expand(6, -1)
    parts = here.outcome(term, student, teacher, here.batch(), noise).parts
    grad = torch.autograd.grad(parts["generation"], student["tokens"])[0]
    assert grad[:, :2].any()
    assert not grad[:, 2:].any()


def test_a_wholly_masked_student_learns_nothing_of_the_last_layer() -> None:
    here = case(mask_ratio=1.0)
    student, teacher = here.tensors()
    parts = here.outcome(here.built(), student, teacher, here.batch()).parts
    assert not torch.autograd.grad(parts["generation"], student["tokens"])[0].any()


def test_the_mimicking_is_zero_at_the_teacher() -> None:
    here = case(width=4)
    student, teacher = here.matched()
    parts = here.outcome(here.built(), student, teacher, here.batch()).parts
    assert parts["mimic"] == 0
    assert parts["generation"] > 0


def test_alpha_and_beta_weigh_the_parts() -> None:
    student, teacher = case().tensors()
    unit = case().outcome(case().built(), student, teacher, case().batch()).parts
    here = case(alpha=3.0, beta=0.5)
    parts = here.outcome(here.built(), student, teacher, here.batch()).parts
    torch.testing.assert_close(parts["mimic"], 3 * unit["mimic"])
    torch.testing.assert_close(parts["generation"], 0.5 * unit["generation"])


def test_alignments_are_there_between_other_widths_only() -> None:
    generator = {f"generation.{n}.{part}" for n in (0, 2) for part in ("weight", "bias")}
    assert set(case(width=4).built().state_dict()) == {"mask_token", *generator}
    weights = case(width=6).built().state_dict()
    assert weights["align_low.1.weight"].shape == weights["align_high.weight"].shape == (6, 4)
    assert not weights["mask_token"].any()


def test_a_samples_mask_depends_on_its_id_and_the_step_alone() -> None:
    here = case()
    student, teacher = here.tensors()
    whole = here.draws(here.built(), student, teacher, here.batch())
    assert whole.shape == (6, 4)
    some, _ = here.rows(torch.tensor([4, 1]))
    assert torch.equal(here.draws(here.built(), student, teacher, some), whole[[4, 1]])
    assert not torch.equal(here.draws(here.built(), student, teacher, here.batch(), step=1), whole)


def test_other_layers() -> None:
    term = ViTKD(student_taps=["blocks[0]"], teacher_taps=["blocks[3]"], student_tap="blocks[5]")
    assert [tap.where for tap in term.reads.student] == ["blocks[0]", "blocks[5]"]
    assert [tap.where for tap in term.reads.teacher] == ["blocks[3]", "tokens"]


# odd cases


def test_no_rows_give_connected_zeros() -> None:
    here = case(rows=0)
    student, teacher = here.tensors()
    term = case().built()
    parts = here.outcome(term, student, teacher, here.batch(), torch.zeros(0, 4)).parts
    assert sum(parts.values()) == 0
    (parts["mimic"] + parts["generation"]).backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in term.parameters())


def test_one_row_is_its_own_mean() -> None:
    here = case()
    term = here.built(dtype=torch.float64)
    student, teacher = here.tensors(dtype=torch.float64)
    each = []
    for row in range(6):
        batch, (one, other) = here.rows(torch.tensor([row]), student, teacher)
        assert one is not None
        each.append(here.loss(term, one, other, batch))
    torch.testing.assert_close(torch.stack(each).mean(), here.loss(term, student, teacher, here.batch()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_extremes(dtype: torch.dtype) -> None:
    student = torch.full((2, 4, 3), 1e4, dtype=dtype, requires_grad=True)
    teacher = torch.full((2, 4, 3), -1e4, dtype=dtype)
    parts = vitkd([student], [teacher], student, teacher, torch.ones(2, 4))
    apart = (student.double() - teacher.double()).detach().square().sum().item() / 2
    assert parts["mimic"].dtype == torch.float32
    assert parts["mimic"].item() == pytest.approx(3e-5 * apart, rel=1e-5)
    assert parts["generation"].item() == pytest.approx(6e-6 * apart, rel=1e-5)
    assert torch.autograd.grad(sum(parts.values()), student)[0].isfinite().all()  # type: ignore[arg-type]


def test_its_layers_run_under_autocast_and_the_comparison_does_not() -> None:
    here = case()
    term = here.built()
    student, teacher = here.tensors()
    exact = here.loss(term, student, teacher, here.batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = here.loss(term, student, teacher, here.batch())
    assert loss.dtype == torch.float32
    assert loss.item() != exact.item()
    assert loss.item() == pytest.approx(exact.item(), rel=3e-2)


# errors


@pytest.mark.parametrize("ratio", [0, 1.5, -0.1])
def test_ratios(ratio: float) -> None:
    with pytest.raises(UserError, match=re.escape(f"mask_ratio is a fraction in (0, 1], not {ratio}")):
        ViTKD(mask_ratio=ratio)


@pytest.mark.parametrize(
    ("student", "teacher", "said"),
    [
        pytest.param(
            (2, 4, 3, 3),
            (2, 4, 6),
            "vitkd compares patch tokens [B, L, D], not [2, 4, 3, 3] and [2, 4, 6]",
            id="a map",
        ),
        pytest.param(
            (2, 16, 4),
            (2, 49, 6),
            "vitkd compares tokens of one grid: the student has 16, the teacher 49; choose models of equal "
            "patch and image size",
            id="another grid",
        ),
        pytest.param((2, 12, 4), (2, 12, 6), "vitkd needs a square grid of patch tokens, not 12", id="no square"),
    ],
)
def test_tokens_that_do_not_fit(student: tuple[int, ...], teacher: tuple[int, ...], said: str) -> None:
    sides = [Signals(None, {name: torch.zeros(shape) for name in NAMES}) for shape in (student, teacher)]
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        ViTKD().build(sides[0], sides[1], Facts())
