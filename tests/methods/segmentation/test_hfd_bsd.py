# SPDX-License-Identifier: Apache-2.0
import copy
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from method_case import MethodCase, gaussian, labelled_batch
from oracles import hfd_bsd as oracle
from tutelage.core import Facts, Signals
from tutelage.core.error import UserError
from tutelage.core.model import Lent
from tutelage.functional.spatial import taking_part
from tutelage.methods.segmentation.hfd_bsd import HFDBSD, Pair, Regions, hfd_bsd

UNIT: dict[str, Any] = {"lambda_low": 1.0, "lambda_region": 1.0, "lambda_pixel": 1.0}
LABELS = torch.randint(-1, 3, (6, 8, 8), generator=torch.Generator().manual_seed(5))


def case(**options: Any) -> MethodCase:
    shapes = {"logits": (6, 3, 4, 4), "stages[0]": (6, 4, 4, 4), "map": (6, 5, 4, 4)}
    peer = {"logits": (6, 3, 8, 8), "stages[0]": (6, 3, 8, 8), "map": (6, 4, 2, 2)}
    return MethodCase(
        term=lambda: HFDBSD(**{**UNIT, **options}),
        student=lambda seed: gaussian(seed, shapes),
        teacher=lambda seed: gaussian(seed + 1000, peer, 2.0),
        batch=lambda: labelled_batch(LABELS),
    )


def made(
    seed: int = 0,
    rows: int = 2,
    classes: int = 3,
    grid: tuple[int, int] = (4, 3),
    low: tuple[tuple[int, int], tuple[int, int]] = ((4, 4), (2, 2)),
    high: tuple[tuple[int, int], tuple[int, int]] = ((3, 3), (2, 4)),
    width: int = 3,
) -> tuple[Pair, Pair, Pair, Tensor]:
    """Score maps, early and late features of a student and its peer, and labels of twice the score maps' size."""
    torch.manual_seed(seed)

    def pair(*sizes: tuple[int, int], channels: int) -> Pair:
        one, other = (torch.randn(rows, channels, *size, dtype=torch.float64) for size in sizes)
        return one, 2 * other

    labels = torch.randint(-1, classes, (rows, 2 * grid[0], 2 * grid[1]))
    scores = pair(grid, grid, channels=classes)
    return scores, pair(*low, channels=width), pair(*high, channels=width), labels


# the equation, worked out by loops


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 3),
    classes=st.integers(1, 4),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    high=st.tuples(*[st.tuples(st.integers(1, 4), st.integers(1, 4))] * 2),
    cells=st.integers(1, 3),
    temperature=st.floats(0.5, 4),
)
@pytest.mark.parametrize("regions", ["class", "grid"])
def test_equals_the_loops(
    regions: Regions,
    seed: int,
    rows: int,
    classes: int,
    grid: tuple[int, int],
    high: tuple[tuple[int, int], tuple[int, int]],
    cells: int,
    temperature: float,
) -> None:
    scores, early, late, labels = made(seed, rows, classes, grid, high=high)
    parts = hfd_bsd(scores, early, late, labels, regions=regions, cells=cells, temperature=temperature)
    own, peer = (side.numpy() for side in scores)
    low = oracle.low(early[0].numpy(), early[1].numpy(), labels.numpy())
    where = cells if regions == "grid" else None
    by_region = oracle.regions(late[0].numpy(), late[1].numpy(), own, peer, labels.numpy(), where)
    assert parts["low"].item() == pytest.approx(0.1 * low, rel=1e-10)
    assert parts["region"].item() == pytest.approx(0.1 * by_region, rel=1e-9, abs=1e-12)
    by_pixel = oracle.pixels(own, peer, labels.numpy(), temperature)
    assert parts["pixel"].item() == pytest.approx(by_pixel, rel=1e-9, abs=1e-12)


def test_smaller_scores_are_enlarged() -> None:
    scores, early, late, labels = made(3)
    large = F.interpolate(scores[0], (8, 6), mode="bilinear", align_corners=False)
    peer = torch.randn(2, 3, 8, 6, dtype=torch.float64)
    for small, whole in (((scores[0], peer), (large, peer)), ((peer, scores[0]), (peer, large))):
        found, expected = (hfd_bsd(one, early, late, labels)["pixel"] for one in (small, whole))
        torch.testing.assert_close(found, expected)
        assert expected > 0


@pytest.mark.parametrize("regions", ["class", "grid"])
def test_gradcheck(regions: Regions) -> None:
    scores, early, late, labels = made(1)

    def loss(own: Tensor, low: Tensor, high: Tensor) -> Tensor:
        parts = hfd_bsd((own, scores[1]), (low, early[1]), (high, late[1]), labels, regions=regions, cells=2, **UNIT)
        return torch.stack(list(parts.values())).sum()

    assert torch.autograd.gradcheck(loss, [pair[0].requires_grad_() for pair in (scores, early, late)])


# who teaches whom


def test_a_pixel_is_taught_by_the_surer_side_only() -> None:
    scores, early, late, labels = made(2, rows=1)
    own, peer = (side.requires_grad_() for side in scores)
    forth = torch.autograd.grad(hfd_bsd((own, peer.detach()), early, late, labels)["pixel"], own)[0]
    back = torch.autograd.grad(hfd_bsd((peer, own.detach()), early, late, labels)["pixel"], peer)[0]
    taught, teaching = (grad.abs().sum(1) > 0 for grad in (forth, back))
    assert taught.any()
    assert teaching.any()
    assert not (taught & teaching).any()
    known = labels[:, ::2, ::2]
    assert not (taught | teaching)[known < 0].any()


def test_a_wrong_peer_teaches_no_pixel() -> None:
    scores, early, late, labels = made(4, classes=2)
    wrong = F.one_hot(1 - labels[:, ::2, ::2].clamp(min=0), 2).movedim(-1, 1).double() * 9
    assert hfd_bsd((scores[0], wrong), early, late, labels)["pixel"] == 0


def test_every_region_is_taught_in_one_direction() -> None:
    scores, early, late, labels = made(5, rows=1, high=((4, 3), (4, 3)))
    forth = hfd_bsd(scores, early, late, labels, **UNIT)["region"]
    back = hfd_bsd(scores[::-1], early, late[::-1], labels, **UNIT)["region"]
    inside = [(labels[:, ::2, ::2] == k)[0] for k in range(3)]
    assert all(mask.any() for mask in inside)
    means = [[side[0][:, mask].mean(1) for side in late] for mask in inside]
    expected = torch.stack([1 - F.cosine_similarity(one, other, dim=0) for one, other in means])
    torch.testing.assert_close(forth + back, expected.sum())
    assert forth > 0
    assert back > 0


def test_two_equal_students_have_nothing_to_say() -> None:
    scores, early, late, labels = made(6, low=((4, 4), (4, 4)), high=((3, 3), (3, 3)))
    parts = hfd_bsd((scores[0],) * 2, (early[0],) * 2, (late[0],) * 2, labels)
    assert all(part == 0 for part in parts.values())


@pytest.mark.parametrize("regions", ["class", "grid"])
def test_labels_of_ignored_pixels_do_not_matter(regions: Regions) -> None:
    here = case(regions=regions)
    term, (student, teacher) = here.built(), here.tensors()
    batch = here.batch()
    known = LABELS >= 0
    values = []
    for fill in (-1, 0, 2, 255):
        seen = replace(batch, target=LABELS.where(known, fill), labelled=known)
        parts = here.outcome(term, student, teacher, seen).parts
        values.append(torch.stack(list(parts.values())))
    for other in values[1:]:
        assert torch.equal(other, values[0])


@pytest.mark.parametrize("regions", ["class", "grid"])
def test_what_lies_at_ignored_places_does_not_matter(regions: Regions) -> None:
    scores, early, late, labels = made(10, grid=(4, 4), low=((4, 4), (4, 4)), high=((4, 4), (4, 4)))
    ignored = (labels[:, ::2, ::2] < 0)[:, None]
    assert ignored.any()
    before = hfd_bsd(scores, early, late, labels, regions=regions)

    def moved(pair: Pair) -> Pair:
        return pair[0] + 9 * ignored * torch.randn_like(pair[0]), pair[1] + 9 * ignored * torch.randn_like(pair[1])

    after = hfd_bsd(moved(scores), moved(early), moved(late), labels, regions=regions)
    for part, value in before.items():
        torch.testing.assert_close(after[part], value)
        assert value > 0


def test_an_unlabelled_image_teaches_early_features_alone() -> None:
    scores, early, late, labels = made(7)
    parts = hfd_bsd(scores, early, late, torch.full_like(labels, -1))
    assert parts["low"] > 0
    assert parts["region"] == 0
    assert parts["pixel"] == 0


def test_directions_do_not_depend_on_scale_of_features() -> None:
    scores, early, late, labels = made(8)
    before = hfd_bsd(scores, early, late, labels)["region"]
    after = hfd_bsd(scores, early, (7 * late[0], 0.1 * late[1]), labels)["region"]
    torch.testing.assert_close(after, before)
    assert before > 0


# through the peer's next block


def block(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 5, 3, 2, 1), nn.BatchNorm2d(5), nn.ReLU())


def behind(layer: nn.Module, **options: Any) -> tuple[HFDBSD, Signals, Signals]:
    """A term whose early features pass a block of the peer, and signals of both."""
    student, teacher = case().tensors()
    assert teacher is not None
    taps = {**teacher, "layer2": layer(teacher["stages[0]"]).detach()}
    sides = Signals(None, student), Signals(None, taps, {"layer2": Lent(layer)})
    term = HFDBSD(through="layer2", **{**UNIT, **options})
    torch.manual_seed(1)
    term.build(*sides, Facts(num_classes=3))
    return term, *sides


def test_early_features_pass_the_peers_next_block() -> None:
    layer = block()
    term, student, teacher = behind(layer)
    assert term.reads.calls == ("layer2",)
    assert term.reads.teacher[-1].name == "layer2"
    batch = case().batch()
    found = term(student, teacher, batch)["low"]
    labels = LABELS
    near = term.project_low(student["stages[0]"])
    near = near.where((labels[:, ::2, ::2] >= 0)[:, None], 0.0)
    there = F.interpolate(near, (8, 8), mode="bilinear", align_corners=False).where((labels >= 0)[:, None], 0.0)
    made, goal = (one.detach().double().numpy() for one in (copy.deepcopy(layer)(there), teacher["layer2"]))
    assert found.item() == pytest.approx(oracle.low(made, goal, labels.numpy()), rel=1e-5)


def test_a_finer_map_is_averaged_over_its_known_places_before_the_block() -> None:
    layer = block().eval()
    student, teacher = case().tensors()
    assert teacher is not None
    coarse = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    sides = (
        Signals(None, {**student, "stages[0]": torch.full((6, 3, 8, 8), 2.0)}),
        Signals(None, {**teacher, "stages[0]": coarse, "layer2": layer(coarse).detach()}, {"layer2": Lent(layer)}),
    )
    term = HFDBSD(through="layer2", **UNIT)
    term.build(*sides, Facts(num_classes=3))
    labels = torch.zeros(6, 8, 8, dtype=torch.long)
    labels[:, 1::2] = -1  # half of each cell, and not its corner
    made, _ = term.early(*sides, labels)
    torch.testing.assert_close(made, layer(torch.full((6, 3, 4, 4), 2.0)))


def test_the_block_is_a_constant_and_stays_as_it_is() -> None:
    layer = block()
    term, student, teacher = behind(layer)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    term(student, teacher, case().batch())["low"].backward()
    assert all(parameter.grad is None for parameter in layer.parameters())
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
    assert student["stages[0]"].grad is not None
    assert student["stages[0]"].grad.any()
    assert all(parameter.grad is not None for parameter in term.project_low.parameters())
    assert not [name for name in term.state_dict() if "layer" in name]


def test_ignored_places_reach_nothing_behind_the_block() -> None:
    layer, batch = block().eval(), case().batch()
    term, student, teacher = behind(layer)
    places = taking_part(LABELS, batch.labelled, 4, 4)
    assert places is not None
    other = {**student.taps, "stages[0]": student["stages[0]"].where(places[:, None], 9.0)}
    parts = [term(one, teacher, batch)["low"] for one in (student, Signals(None, other))]
    assert torch.equal(*parts)


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        pytest.param(nn.Conv2d(4, 5, 3, 2, 1), "through: 'layer2' takes no [6, 3, 8, 8] (", id="another width"),
        pytest.param(nn.Conv2d(3, 5, 3), "through: 'layer2' makes [6, 5, 6, 6] of the peer's early", id="another map"),
    ],
)
def test_a_block_that_does_not_stand_behind_the_early_features(layer: nn.Module, said: str) -> None:
    student, teacher = case().tensors()
    assert teacher is not None
    taps = {**teacher, "layer2": torch.zeros(6, 5, 4, 4)}
    sides = Signals(None, student), Signals(None, taps, {"layer2": Lent(layer)})
    with pytest.raises(UserError, match=f"^{re.escape(said)}"):
        HFDBSD(through="layer2").build(*sides, Facts(num_classes=3))


# odd cases


def test_no_rows_give_a_connected_zero() -> None:
    free = torch.zeros(0, 3, 4, 4, requires_grad=True)
    pair = free, free.detach()
    parts = hfd_bsd(pair, pair, pair, torch.zeros(0, 8, 8, dtype=torch.int64))
    total = torch.stack(list(parts.values())).sum()
    assert total == 0
    assert torch.autograd.grad(total, free)[0].shape == free.shape


def test_dead_features_have_a_finite_gradient() -> None:
    scores, early, late, labels = made(9)
    dead = torch.zeros_like(late[0]).requires_grad_()
    part = hfd_bsd(scores, early, (dead, late[1]), labels)["region"]
    assert part.isfinite()
    assert torch.autograd.grad(part, dead)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_extremes(dtype: torch.dtype) -> None:
    own = torch.full((2, 3, 4, 4), -1e4, dtype=dtype)
    own[:, 1] = 1e4
    own.requires_grad_()
    peer = torch.full((2, 3, 4, 4), -1e4, dtype=dtype)
    peer[:, 0] = 1e4
    pair = own, peer
    parts = hfd_bsd(pair, pair, pair, torch.zeros(2, 4, 4, dtype=torch.int64))
    total = torch.stack(list(parts.values())).sum()
    assert total.dtype == torch.float32
    assert total.isfinite()
    assert parts["pixel"] > 1e4
    assert torch.autograd.grad(total, own)[0].isfinite().all()


# errors


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"regions": "classes"}, "regions 'classes' is not known; did you mean class?"),
        ({"temperature": 0.0}, "temperature must be > 0, not 0.0"),
        ({"cells": 0}, "cells is at least 1, not 0"),
    ],
)
def test_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        HFDBSD(**options)


def test_signals_that_are_no_maps() -> None:
    student, teacher = case().tensors()
    assert teacher is not None
    for name, said in (("logits", "[6, 3] and [6, 3, 8, 8]"), ("map", "[6, 3] and [6, 4, 2, 2]")):
        flat = Signals(None, {**student, name: torch.zeros(6, 3)})
        with pytest.raises(UserError, match=f"^{re.escape(f'hfd_bsd compares maps [B, C, H, W], not {said}')}$"):
            HFDBSD().build(flat, Signals(None, teacher), Facts())


def test_data_without_class_maps_are_refused() -> None:
    here = case()
    term, (student, teacher) = here.built(), here.tensors()
    batch = labelled_batch()
    said = "hfd_bsd asks who is right at each pixel, and needs class maps [B, H, W], not [6]"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        here.loss(term, student, teacher, batch)


def test_other_classes_are_refused() -> None:
    scores, early, late, labels = made(0)
    said = "hfd_bsd compares score maps of the same classes: the student's is [2, 3, 4, 3], the peer's [2, 2, 4, 3]"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        hfd_bsd((scores[0], scores[1][:, :2]), early, late, labels)
