# SPDX-License-Identifier: Apache-2.0
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from method_case import MethodCase, gaussian
from oracles import mgd as oracle
from tutelage.core import Batch, Draw, Facts, Signals
from tutelage.core.error import UserError
from tutelage.core.ignored import known
from tutelage.methods.features.mgd import MGD, keep_mask, mgd

Arrays = dict[str, NDArray[Any]]
MASKS = {"channel": "channel", "spatial": "pixel"}  # the golden files' word, ours


def case(width: int = 6, **options: Any) -> MethodCase:
    return MethodCase(
        term=lambda: MGD(**options),
        student=lambda seed: gaussian(seed, {"map": (6, 4, 3, 5)}),
        teacher=lambda seed: gaussian(seed + 1000, {"map": (6, width, 3, 5)}),
    )


def run(term: MGD, student: Tensor, teacher: Tensor, weights: dict[str, Tensor], noise: Tensor) -> tuple[Tensor, MGD]:
    """The term with these weights, in the tensors' type: built as in a run, then loaded."""
    sides = (Signals(None, {"map": student}), Signals(None, {"map": teacher}))
    term.build(sides[0].detach(), sides[1], Facts())
    term.to(student.dtype).load_state_dict(weights)
    batch = case().batch()
    return term(*sides, batch, noise), term


# the authors' numbers


def golden(claim: str, arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    mask: Any = MASKS[meta["mask_style"]]
    for suffix, dtype in (("", torch.float64), ("_f32", torch.float32)):
        given = {name: torch.tensor(array, dtype=dtype) for name, array in arrays.items() if array.dtype == "f4"}
        weights = {name: given[name] for name in given if name.startswith(("align.", "generation."))}
        student = given["student_features"].requires_grad_()
        term = MGD(mask=mask, mask_ratio=meta["lambda_mgd"])
        loss, term = run(term, student, given["teacher_features"], weights, given["mask_noise"])
        (meta["alpha_mgd"] * loss).backward()
        answer |= {f"loss{suffix}": meta["alpha_mgd"] * loss, f"grad_student_features{suffix}": student.grad}
        answer |= {f"grad_{name}{suffix}": weight.grad for name, weight in term.named_parameters()}
    noise = torch.tensor(arrays["mask_noise"], dtype=torch.float64)
    return answer | {"keep_mask": keep_mask(noise, mask, meta["lambda_mgd"])}


# the equation, worked out by loops


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 3),
    widths=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    ratio=st.floats(0, 1),
)
@pytest.mark.parametrize("style", ["channel", "spatial"])
def test_equals_the_loops(
    style: str, seed: int, rows: int, widths: tuple[int, int], grid: tuple[int, int], ratio: float
) -> None:
    torch.manual_seed(seed)
    student, teacher = (torch.randn(rows, width, *grid, dtype=torch.float64) for width in widths)
    shape = (rows, widths[1], 1, 1) if style == "channel" else (rows, 1, *grid)
    noise = torch.rand(shape, dtype=torch.float64)
    term = MGD(mask=MASKS[style], mask_ratio=ratio)  # type: ignore[arg-type]
    term.build(Signals(None, {"map": student}), Signals(None, {"map": teacher}), Facts())
    weights = term.double().state_dict()
    loss = term(Signals(None, {"map": student}), Signals(None, {"map": teacher}), case().batch(), noise)
    arrays = {name: weight.numpy() for name, weight in weights.items()}
    expected = oracle.mgd(student.numpy(), teacher.numpy(), arrays, noise.numpy(), 1.0, ratio, style)
    assert loss.item() == pytest.approx(expected, rel=1e-10)


def test_gradcheck() -> None:
    rebuilt, teacher = torch.randn(2, 2, 3, 2, 2, dtype=torch.float64).unbind()
    assert torch.autograd.gradcheck(lambda r: mgd(r, teacher), rebuilt.requires_grad_())


def test_gradcheck_through_the_layers() -> None:
    here = case(mask_ratio=0.3)
    term, batch = here.built(dtype=torch.float64), here.batch()
    student, teacher = here.tensors(dtype=torch.float64)
    noise = here.draws(term, student, teacher, batch)
    names = [name for name, _ in term.named_parameters()]

    def loss(free: Tensor, *weights: Tensor) -> Tensor:
        sides = (here.signals({"map": free}), here.teach(teacher), batch, noise)
        found: Tensor = torch.func.functional_call(term, dict(zip(names, weights, strict=True)), sides)
        return found

    assert torch.autograd.gradcheck(loss, (student["map"], *term.parameters()), fast_mode=True)


# limits and identities


def test_a_sum_over_places_and_a_mean_over_rows() -> None:
    rebuilt, teacher = gaussian(0, {"r": (4, 3, 2, 2)})["r"], gaussian(1, {"t": (4, 3, 2, 2)})["t"]
    wider = mgd(torch.cat([rebuilt, rebuilt], dim=3), torch.cat([teacher, teacher], dim=3))
    torch.testing.assert_close(wider, 2 * mgd(rebuilt, teacher))
    torch.testing.assert_close(mgd(rebuilt.repeat(2, 1, 1, 1), teacher.repeat(2, 1, 1, 1)), mgd(rebuilt, teacher))
    assert mgd(teacher, teacher) == 0


@pytest.mark.parametrize("mask", ["channel", "pixel"])
def test_ratio_0_keeps_everything_and_ratio_1_nothing(mask: Any) -> None:
    noise = torch.rand(200, generator=torch.Generator().manual_seed(0)).clamp(min=2**-24)
    assert keep_mask(noise, mask, 0.0).all()
    assert not keep_mask(noise, mask, 1.0).any()


@pytest.mark.parametrize("mask", ["channel", "pixel"])
def test_a_wholly_masked_student_learns_nothing(mask: Any) -> None:
    here = case(mask=mask, mask_ratio=1.0)
    term = here.built()
    student, teacher = here.tensors()
    noise = torch.full((6, 6, 1, 1) if mask == "channel" else (6, 1, 3, 5), 0.5)
    here.loss(term, student, teacher, here.batch(), noise).backward()
    grad = student["map"].grad
    assert grad is not None
    assert not grad.any()
    assert all(weight.grad is not None for weight in term.parameters())


def test_masked_positions_count_in_the_loss() -> None:
    here = case(mask_ratio=0.5)
    term = here.built()
    student, teacher = here.tensors()
    assert teacher is not None
    noise = torch.ones(6, 1, 3, 5)  # every position is masked
    before = here.loss(term, student, teacher, here.batch(), noise)
    teacher["map"] = teacher["map"] + 1.0
    assert here.loss(term, student, teacher, here.batch(), noise) != before


def test_the_papers_inequality_is_the_mirrored_one() -> None:
    noise = torch.rand(2, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = oracle.keep_mask((1 - noise).numpy(), 0.65, "spatial_paper")
    np.testing.assert_array_equal(keep_mask(noise, "pixel", 0.65).numpy(), expected)


@pytest.mark.parametrize(("mask", "ratio"), [("channel", 0.15), ("pixel", 0.65)])
def test_the_drawn_fraction_is_dropped(mask: Any, ratio: float) -> None:
    here = MethodCase(
        term=lambda: MGD(mask=mask, mask_ratio=ratio),
        student=lambda seed: gaussian(seed, {"map": (6, 400, 20, 20)}),
        teacher=lambda seed: gaussian(seed, {"map": (6, 400, 20, 20)}),
    )
    student, teacher = here.tensors()
    noise = here.draws(here.term(), student, teacher, here.batch())
    assert noise.shape == ((6, 400, 1, 1) if mask == "channel" else (6, 1, 20, 20))
    dropped = 1 - keep_mask(noise, mask, ratio).mean().item()
    assert dropped == pytest.approx(ratio, abs=4 * (ratio * (1 - ratio) / 2400) ** 0.5)


def test_a_samples_mask_depends_on_its_id_and_the_step_alone() -> None:
    here = case()
    student, teacher = here.tensors()
    term = here.term()
    whole = here.draws(term, student, teacher, here.batch())
    some, _ = here.rows(torch.tensor([4, 1]))
    assert torch.equal(here.draws(term, student, teacher, some), whole[[4, 1]])
    assert not torch.equal(here.draws(term, student, teacher, here.batch(), step=1), whole)
    other = term.draw(here.signals(student), here.teach(teacher), here.batch(), Draw(0, 0, "mgd_2"))
    assert not torch.equal(other, whole)


def test_equal_widths_need_no_alignment() -> None:
    assert set(case(width=4).built().state_dict()) == {
        *("generation.0.weight", "generation.0.bias", "generation.2.weight", "generation.2.bias")
    }
    assert case(width=6).built().state_dict()["align.weight"].shape == (6, 4, 1, 1)


def pyramid(seed: int, width: int) -> dict[str, Tensor]:
    return gaussian(seed, {f"fpn[{n}]": (6, width, 4 - n, 6 - n) for n in range(3)})


def test_levels_of_a_pyramid_add_up_each_with_layers_and_a_mask_of_its_own() -> None:
    here = MethodCase(
        term=lambda: MGD(student_tap="fpn[*]", teacher_tap="fpn[*]"),
        student=lambda seed: pyramid(seed, 4),
        teacher=lambda seed: pyramid(seed + 1000, 5),
    )
    term, batch = here.built(), here.batch()
    weights = term.state_dict()
    assert [name for name in weights if "align" in name and "weight" in name] == [f"align.{n}.weight" for n in range(3)]
    student, teacher = here.tensors()
    noise = here.draws(term, student, teacher, batch)
    assert [drawn.shape for drawn in noise] == [(6, 1, 4 - n, 6 - n) for n in range(3)]
    assert not torch.equal(noise[0][:, :, :2, :4], noise[2])
    assert teacher is not None
    parts = []
    for n, name in enumerate(student):
        own = {key.replace(f".{n}.", ".", 1): value for key, value in weights.items() if key.split(".")[1] == str(n)}
        parts.append(run(MGD(), student[name], teacher[name], own, noise[n])[0])
    torch.testing.assert_close(here.loss(term, student, teacher, batch, noise), torch.stack(parts).sum())


def test_some_levels_of_a_pyramid() -> None:
    levels = ["fpn[0]", "fpn[1]"]
    term = MGD(student_tap=levels, teacher_tap=levels)
    term.build(Signals(None, pyramid(0, 4)), Signals(None, pyramid(1, 4)), Facts())
    assert isinstance(term.generation, nn.ModuleList)
    assert len(term.generation) == 2


def test_taps_of_ones_own() -> None:
    term = MGD(student_tap="layer4", teacher_tap={"where": "features.7", "layout": "nhwc"})
    assert [tap.where for tap in (*term.reads.student, *term.reads.teacher)] == ["layer4", "features.7"]
    assert term.reads.teacher[0].layout == "nhwc"


# what is ignored


def test_ignored_positions_are_masked_and_not_compared() -> None:
    student, teacher = case().tensors(4)
    assert teacher is not None
    ignored = torch.zeros(6, 8, 8, dtype=torch.bool)
    ignored[:, :, 4:] = True
    ignored[2] = False
    target = torch.zeros(6, 8, 8, dtype=torch.int64)
    batch = Batch.of(torch.zeros(6, 1), target, labelled=~ignored, index=case().batch().index)
    places = known(batch, teacher["map"])
    assert places is not None
    left = places[:, None]
    whole, noise = case(mask_ratio=0.0), torch.full((6, 1, *student["map"].shape[2:]), 0.5)
    term = whole.built()
    aligned = term.align(student["map"])  # type: ignore[operator]
    rebuilt = term.generation(aligned * left)  # type: ignore[operator]
    expected = ((rebuilt - teacher["map"]) * left).square().sum() / 6
    torch.testing.assert_close(whole.loss(term, student, teacher, batch, noise), expected)


# odd cases


def test_no_rows_give_a_connected_zero() -> None:
    rebuilt = torch.zeros(0, 2, 3, 3, requires_grad=True)
    loss = mgd(rebuilt, torch.zeros(0, 2, 3, 3))
    assert loss.item() == 0
    assert torch.autograd.grad(loss, rebuilt)[0].shape == (0, 2, 3, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_extremes(dtype: torch.dtype) -> None:
    rebuilt = torch.full((2, 3, 4, 4), 1e4, dtype=dtype, requires_grad=True)
    teacher = torch.full((2, 3, 4, 4), -1e4, dtype=dtype)
    loss = mgd(rebuilt, teacher)
    assert loss.dtype == torch.float32
    side = (rebuilt.double() - teacher.double()).detach()
    assert loss.item() == pytest.approx(side.square().sum().item() / 2, rel=1e-5)
    assert torch.autograd.grad(loss, rebuilt)[0].isfinite().all()


def test_its_layers_run_under_autocast_and_the_comparison_does_not() -> None:
    here = case(mask_ratio=0.3)
    term = here.built()
    student, teacher = here.tensors()
    exact = here.loss(term, student, teacher, here.batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = here.loss(term, student, teacher, here.batch())
    assert loss.dtype == torch.float32
    assert loss.item() != exact.item()
    assert loss.item() == pytest.approx(exact.item(), rel=3e-2)


# errors


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mask": "spatial"}, "mask 'spatial' is not known; valid: channel, pixel"),
        ({"mask_ratio": 65}, "mask_ratio is a fraction in [0, 1], not 65"),
        ({"mask_ratio": -0.1}, "mask_ratio is a fraction in [0, 1], not -0.1"),
        ({"student_tap": {"wher": "map"}}, "unknown word 'wher' in a tap; did you mean where?"),
    ],
)
def test_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        MGD(**options)


REBUILDS = "mgd rebuilds maps [B, C, H, W], or tokens [B, L, D] on their grid, not"
NAME_IT = "name the tap with `layout: grid` and `grid: [height, width]`"


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        pytest.param((2, 4, 6, 6), (2, 5, 3, 3), id="another grid"),
        pytest.param((2, 4, 3, 4), (2, 48, 5), id="map to tokens"),
        pytest.param((2, 48, 5), (2, 4, 3, 4), id="tokens to map"),
    ],
)
def test_the_student_is_brought_to_the_teachers_grid(student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    signals = [Signals(None, {"map": torch.randn(size, requires_grad=True)}) for size in (student, teacher)]
    one, other = signals[0], signals[1].detach()
    term = MGD()
    term.build(one.detach(), other, Facts())
    rows = Batch.of(torch.zeros(2, 1), torch.tensor([0, 1]))
    noise = term.draw(one, other, rows, Draw(0, 0, "mgd"))
    assert isinstance(noise, Tensor)
    goal = other["map"] if other["map"].ndim == 4 else other["map"].transpose(1, 2).unflatten(2, (6, 8))
    assert noise.shape == (2, 1, *goal.shape[2:])
    loss = term(one, other, rows, noise)
    kept = keep_mask(noise, "pixel", 0.65)
    rebuilt = term.generation(term.align(one["map"]) * kept)
    assert loss.item() == pytest.approx(mgd(rebuilt, goal).item(), rel=1e-6)
    loss.backward()
    assert one["map"].grad is not None
    assert one["map"].grad.any()


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        pytest.param((2, 4), f"{REBUILDS} [2, 4] and [2, 4, 3, 3]", id="vector"),
        pytest.param((2, 7, 4), f"7 tokens fill no grid of the proportions 3x3: {NAME_IT}", id="tokens"),
    ],
)
def test_maps_that_do_not_fit(shape: tuple[int, ...], said: str) -> None:
    student, teacher = (Signals(None, {"map": torch.zeros(size)}) for size in (shape, (2, 4, 3, 3)))
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        MGD().build(student, teacher, Facts())


def test_the_teachers_grid_may_change_with_the_images() -> None:
    def signals(height: int, width: int) -> tuple[Signals, Signals]:
        maps = (torch.randn(2, 3, height, width), torch.randn(2, 5, 2 * height - 1, 2 * width))
        return Signals(None, {"map": maps[0]}), Signals(None, {"map": maps[1]})

    term = MGD()
    student, teacher = signals(8, 8)
    term.build(student, teacher, Facts())
    rows = Batch.of(torch.zeros(2, 1), torch.tensor([0, 1]))
    one, other = signals(7, 12)
    noise = term.draw(one, other, rows, Draw(0, 0, "mgd"))
    assert term(one, other, rows, noise).isfinite()
