# SPDX-License-Identifier: Apache-2.0
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from method_case import MethodCase, Tensors, gaussian
from oracles import acam_kd as oracle
from tutelage.core import Facts, Signals
from tutelage.core.error import UserError
from tutelage.methods.features.acam_kd import ACAMKD, Form, Masking, acam_kd

FORMS: tuple[Form, ...] = ("normalized", "printed")


def case(**options: Any) -> MethodCase:
    return MethodCase(
        term=lambda: ACAMKD(**{"masks": 3, "cells": 3, **options}),
        student=lambda seed: gaussian(seed, {"fpn[0]": (6, 4, 4, 5), "fpn[1]": (6, 4, 2, 3)}),
        teacher=lambda seed: gaussian(seed + 1000, {"fpn[0]": (6, 6, 4, 5), "fpn[1]": (6, 6, 2, 3)}, 2.0),
    )


def made(seed: int, rows: int = 2, width: int = 3, grid: tuple[int, int] = (2, 3), masks: int = 3) -> list[Tensor]:
    """Maps of student and teacher, and masks over channels and positions."""
    torch.manual_seed(seed)
    maps = list(torch.randn(2, rows, width, *grid, dtype=torch.float64).unbind())
    channel, spatial = (torch.randn(rows, masks, *shape, dtype=torch.float64) for shape in ((width,), grid))
    return [*maps, channel.sigmoid(), spatial.sigmoid()]


def expected(given: list[Tensor], form: Form) -> tuple[float, float, float]:
    student, teacher, channel, spatial = (one.detach().numpy() for one in given)
    return oracle.parts(student, teacher, channel, spatial, form)


# the equation, worked out by loops


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 3),
    width=st.integers(1, 5),
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    masks=st.integers(1, 4),
)
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_loops(form: Form, seed: int, rows: int, width: int, grid: tuple[int, int], masks: int) -> None:
    given = made(seed, rows, width, grid, masks)
    found = acam_kd(*given, form=form, alpha=0.5, lambda_div=2.0)
    channel, spatial, diversity = expected(given, form)
    assert found["channel"].item() == pytest.approx(0.5 * channel, rel=1e-10)
    assert found["spatial"].item() == pytest.approx(0.5 * spatial, rel=1e-10)
    assert found["diversity"].item() == pytest.approx(2 * diversity, rel=1e-10, abs=1e-13)


@pytest.mark.parametrize("cells", [2, 32])
@pytest.mark.parametrize("width", [1, 4])
def test_the_masks_equal_the_loops(cells: int, width: int) -> None:
    torch.manual_seed(5)
    masking = Masking(width, 3, cells).double()
    student, teacher = torch.randn(2, 2, width, 3, 4, dtype=torch.float64)
    weights = {name: weight.numpy() for name, weight in masking.state_dict().items()}
    fused = oracle.fused(student.numpy(), teacher.numpy(), weights, cells)
    torch.testing.assert_close(masking.fuse(student, teacher), torch.tensor(fused))
    expected = oracle.masks(fused, weights["channel_units"], weights["spatial_units"])
    for found, mask in zip(masking(student, teacher), expected, strict=True):
        torch.testing.assert_close(found, torch.tensor(mask))


def test_levels_are_added() -> None:
    here = case()
    term = here.built(dtype=torch.float64)
    assert isinstance(term, ACAMKD)
    student, teacher = here.tensors(dtype=torch.float64)
    assert teacher is not None
    parts = here.outcome(term, student, teacher, here.batch()).parts
    total = torch.zeros(3, dtype=torch.float64)
    for level, (align, masking) in enumerate(zip(term.align, term.masking, strict=True)):
        ours = align(student[f"fpn[{level}]"])
        theirs = teacher[f"fpn[{level}]"]
        total += torch.tensor(expected([ours, theirs, *masking(ours, theirs)], "normalized"), dtype=torch.float64)
    torch.testing.assert_close(torch.stack([parts[part] for part in ("channel", "spatial", "diversity")]), total)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: Form) -> None:
    student, teacher, *masks = made(1)

    def loss(student: Tensor, channel: Tensor, spatial: Tensor) -> Tensor:
        return torch.stack(list(acam_kd(student, teacher, channel, spatial, form=form).values())).sum()

    assert torch.autograd.gradcheck(loss, [one.requires_grad_() for one in (student, *masks)])


def test_gradcheck_through_the_layers() -> None:
    here = case()
    term, batch = here.built(dtype=torch.float64), here.batch()
    student, teacher = here.tensors(dtype=torch.float64)

    def loss(*free: Tensor) -> Tensor:
        return here.loss(term, dict(zip(student, free, strict=True)), teacher, batch)

    assert torch.autograd.gradcheck(loss, list(student.values()), fast_mode=True)


# limits and identities


def test_even_masks_give_the_mean_squared_difference() -> None:
    student, teacher, channel, spatial = made(2)
    parts = acam_kd(student, teacher, torch.full_like(channel, 0.3), torch.full_like(spatial, 0.3))
    square = (student - teacher).square().mean()
    torch.testing.assert_close(parts["channel"], square)
    torch.testing.assert_close(parts["spatial"], square)
    torch.testing.assert_close(parts["diversity"], torch.tensor(4.0, dtype=torch.float64))  # 2 (M - 1)


def test_small_masks_escape_the_printed_loss_only() -> None:
    student, teacher, *masks = made(3)
    small = [mask * 1e-3 for mask in masks]
    before, after = acam_kd(student, teacher, *masks), acam_kd(student, teacher, *small)
    for part in before:
        torch.testing.assert_close(after[part], before[part])
    printed = acam_kd(student, teacher, *masks, form="printed"), acam_kd(student, teacher, *small, form="printed")
    torch.testing.assert_close(printed[1]["channel"], 1e-9 * printed[0]["channel"])


def test_a_channel_that_no_mask_shows_does_not_count() -> None:
    student, teacher, channel, spatial = made(4)
    channel[:, :, 0] = 0
    before = acam_kd(student, teacher, channel, spatial)["channel"]
    student[:, 0] += 10
    torch.testing.assert_close(acam_kd(student, teacher, channel, spatial)["channel"], before)


def test_masks_in_different_places_are_diverse() -> None:
    student, teacher, *_ = made(5, width=3)
    apart = torch.eye(3, dtype=torch.float64).expand(2, 3, 3)
    spatial = torch.nn.functional.one_hot(torch.arange(3), 6).double().view(1, 3, 2, 3).expand(2, -1, -1, -1)
    assert acam_kd(student, teacher, apart, spatial)["diversity"] == 0


def test_one_mask_cannot_be_diverse() -> None:
    parts = acam_kd(*made(6, masks=1))
    assert parts["diversity"].abs() < 1e-12


def test_the_masks_follow_the_student() -> None:
    masking = Masking(4, 3, 32)
    student, other, teacher = torch.randn(3, 2, 4, 3, 3)
    for one, two in zip(masking(student, teacher), masking(other, teacher), strict=True):
        assert (one - two).abs().max() > 1e-4


def test_training_changes_the_masks_and_does_not_let_them_collapse() -> None:
    here = case()
    term = here.built()
    assert isinstance(term, ACAMKD)
    student, teacher = here.tensors()
    assert teacher is not None

    def masks() -> list[Tensor]:
        with torch.no_grad():
            return list(term.masking[0](term.align[0](student["fpn[0]"]), teacher["fpn[0]"]))

    first = masks()
    optimizer = torch.optim.Adam([*student.values(), *term.parameters()], lr=0.02)
    for _ in range(50):
        optimizer.zero_grad()
        here.loss(term, student, teacher, here.batch()).backward()
        optimizer.step()
    for before, after in zip(first, masks(), strict=True):
        assert (before - after).abs().mean() > 1e-3
        assert 0.05 < after.mean() < 0.95


def test_equal_widths_need_no_alignment() -> None:
    names = set(case().built(matched=True).state_dict())
    assert not any(name.startswith("align") for name in names)
    assert {"masking.0.channel_units", "masking.1.spatial_units"} <= names
    assert case().built().state_dict()["align.1.weight"].shape == (6, 4, 1, 1)


def test_score_maps_of_a_segmenter() -> None:
    student, teacher = (Signals(None, {"logits": torch.randn(2, 19, 6, 8)}) for _ in range(2))
    term = ACAMKD(masks=19, student_taps=["logits"], teacher_taps=["logits"])
    assert term.reads.student[0].name == "logits"
    term.build(student, teacher, Facts())
    parts = term(student, teacher, case().batch())
    assert set(parts) == {"channel", "spatial", "diversity"}
    assert all(part.isfinite() for part in parts.values())


# what is ignored


@pytest.mark.parametrize("form", FORMS)
def test_ignored_places_leave_what_cut_maps_give(form: Form) -> None:
    student, teacher, channel, spatial = made(9, grid=(2, 6))
    keep = torch.ones(2, 2, 6, dtype=torch.bool)
    keep[:, :, 2:] = False
    found = acam_kd(student, teacher, channel, spatial, form=form, keep=keep)
    cut = acam_kd(student[..., :2], teacher[..., :2], channel, spatial[..., :2], form=form)
    for name, value in cut.items():
        torch.testing.assert_close(found[name], value)


@pytest.mark.parametrize("cells", [2, 8])
def test_ignored_places_make_no_masks(cells: int) -> None:
    torch.manual_seed(10)
    masking = Masking(3, 2, cells).double()
    student, teacher = torch.randn(2, 2, 3, 4, 8, dtype=torch.float64).unbind()
    keep = torch.ones(2, 4, 8, dtype=torch.bool)
    keep[:, :, 4:] = False
    channels, places = masking(student, teacher, keep)
    if cells == 2:  # the first column of cells is all that is left
        halves = F.adaptive_avg_pool2d(student[..., :4], (2, 1))
        query, key, value = (
            layer(given).flatten(2).mT
            for layer, given in ((masking.query, teacher[..., :4]), (masking.key, halves), (masking.value, halves))
        )
        fused = F.scaled_dot_product_attention(query, key, value).mT.unflatten(2, (4, 4))
        cut = (masking.channel_units * fused.mean((2, 3))[:, None]).sigmoid()
        cut_places = torch.einsum("mc,bchw->bmhw", masking.spatial_units, fused).sigmoid()
    else:
        cut, cut_places = masking(student[..., :4], teacher[..., :4])
    torch.testing.assert_close(channels, cut)
    torch.testing.assert_close(places[..., :4], cut_places)


# odd cases


def test_no_rows_give_a_connected_zero() -> None:
    free = torch.zeros(0, 2, 3, 3, requires_grad=True)
    parts = acam_kd(free, free.detach(), torch.zeros(0, 4, 2), torch.zeros(0, 4, 3, 3))
    total = torch.stack(list(parts.values())).sum()
    assert total == 0
    assert torch.autograd.grad(total, free)[0].shape == free.shape


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_extremes(dtype: torch.dtype, form: Form) -> None:
    student = torch.full((2, 3, 4, 4), 1e4, dtype=dtype, requires_grad=True)
    masks = torch.zeros(2, 2, 3, dtype=dtype, requires_grad=True), torch.ones(2, 2, 4, 4, dtype=dtype)
    total = torch.stack(list(acam_kd(student, -student.detach(), *masks, form=form).values())).sum()
    assert total.dtype == torch.float32
    assert total.isfinite()
    assert all(one.isfinite().all() for one in torch.autograd.grad(total, [student, masks[0]]))


# errors


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"form": "print"}, "form 'print' is not known; did you mean printed?"),
        ({"masks": 0}, "masks and cells are at least 1, not 0 and 32"),
        ({"cells": 0}, "masks and cells are at least 1, not 6 and 0"),
        ({"student_taps": "fpn"}, "student_taps: expected a list of roles or module paths, not 'fpn'"),
    ],
)
def test_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        ACAMKD(**options)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        pytest.param((2, 4), "acam_kd compares maps [B, C, H, W], not [2, 4] and [2, 4, 3, 3]", id="vector"),
        pytest.param(
            (2, 4, 6, 6),
            "acam_kd compares maps of one grid: the student's is (6, 6), the teacher's (3, 3); "
            "tap layers of equal stride",
            id="grid",
        ),
    ],
)
def test_maps_that_do_not_fit(shape: tuple[int, ...], said: str) -> None:
    sides: list[Tensors] = [{"fpn[0]": torch.zeros(size)} for size in (shape, (2, 4, 3, 3))]
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        ACAMKD().build(Signals(None, sides[0]), Signals(None, sides[1]), Facts())


def test_shapes_that_would_broadcast() -> None:
    one = torch.zeros(2, 3, 4, 4)
    said = "acam_kd compares maps of one shape: the student's is [2, 1, 4, 4], the teacher's [2, 3, 4, 4]"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        acam_kd(one[:, :1], one, torch.zeros(2, 1, 3), torch.zeros(2, 1, 4, 4))
