# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tutelage.functional.spatial import (
    attention,
    channelwise_divergence,
    class_maps,
    hierarchical_distance,
    match,
    match_kept,
    mean_square,
    pooled,
    small_labels,
    taking_part,
)

# match


@pytest.mark.parametrize(
    ("student", "teacher", "size"),
    [
        pytest.param((5, 7), (5, 7), (5, 7), id="equal"),
        pytest.param((8, 8), (4, 4), (4, 4), id="larger student"),
        pytest.param((3, 3), (6, 6), (3, 3), id="larger teacher"),
        pytest.param((8, 6), (4, 4), (4, 4), id="more rows"),
        pytest.param((4, 6), (4, 4), (4, 4), id="more columns"),
        pytest.param((5, 4), (3, 6), (3, 6), id="lower, not narrower"),
    ],
)
def test_both_take_the_size_of_the_lower_map(
    student: tuple[int, int], teacher: tuple[int, int], size: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    given = torch.randn(2, 3, *student), torch.randn(2, 5, *teacher)
    found = match(*given)
    for before, after in zip(given, found, strict=True):
        assert after.shape == (*before.shape[:2], *size)
        if before.shape == after.shape:
            assert after is before
        elif all(a % b == 0 for a, b in zip(before.shape[2:], size, strict=True)):
            torch.testing.assert_close(after.mean((2, 3)), before.mean((2, 3)))


# attention


@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
def test_attention_by_hand(power: float) -> None:
    torch.manual_seed(1)
    values = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    energy = (np.abs(values.numpy()) ** power).mean(1).reshape(2, 4)
    expected = energy / np.linalg.norm(energy, axis=1, keepdims=True)
    np.testing.assert_allclose(attention(values, power).numpy(), expected, rtol=1e-12)


def test_attention_forgets_scale_sign_and_channel_order() -> None:
    torch.manual_seed(2)
    values = torch.randn(2, 3, 2, 2)
    torch.testing.assert_close(attention(-7 * values[:, [2, 0, 1]]), attention(values))


def test_a_dead_map_has_no_attention_and_a_finite_gradient() -> None:
    dead = torch.zeros(1, 3, 2, 2, requires_grad=True)
    found = attention(dead)
    assert not found.any()
    assert torch.autograd.grad(found.sum(), dead)[0].isfinite().all()


# channel-wise divergence


def test_the_channelwise_divergence_is_a_divergence_of_positions() -> None:
    torch.manual_seed(3)
    student, teacher = torch.randn(2, 2, 3, 2, 2, dtype=torch.float64).unbind()
    expected = torch.stack(
        [
            4 * F.kl_div((s / 2).log_softmax(0), (t / 2).softmax(0), reduction="sum")
            for s, t in zip(student.flatten(2).flatten(0, 1), teacher.flatten(2).flatten(0, 1), strict=True)
        ]
    )
    torch.testing.assert_close(channelwise_divergence(student, teacher, 2.0).flatten(), expected)
    shifted = teacher + torch.randn(2, 3, 1, 1, dtype=torch.float64)
    torch.testing.assert_close(channelwise_divergence(student, shifted), channelwise_divergence(student, teacher))


def test_one_position_says_nothing() -> None:
    assert not channelwise_divergence(torch.randn(2, 3, 1, 1), torch.randn(2, 3, 1, 1)).any()


# distances at several scales


def test_the_pooled_scales_weigh_a_half_a_quarter_and_an_eighth() -> None:
    student, teacher = torch.randn(2, 3, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    expected = sum(
        2.0**-turn * F.mse_loss(F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size))
        for turn, size in enumerate((8, 4, 2, 1))
    )
    torch.testing.assert_close(hierarchical_distance(student, teacher), torch.as_tensor(expected) / 1.875)


def test_a_map_of_one_position_has_no_pooled_scale() -> None:
    one = torch.full((2, 3, 1, 1), 2.0)
    assert hierarchical_distance(one, torch.zeros_like(one)) == 4


def test_the_mean_square_of_nothing_is_a_connected_zero() -> None:
    nothing = torch.zeros(0, 3, requires_grad=True)
    assert mean_square(nothing) == 0
    assert torch.autograd.grad(mean_square(nothing), nothing)[0].shape == (0, 3)


# places that are kept


def test_cells_are_the_means_of_their_kept_places() -> None:
    values = torch.randn(2, 3, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    keep = torch.rand(2, 5, 7, generator=torch.Generator().manual_seed(6)) < 0.4
    keep[1, :3, :4] = False
    found, cells = pooled(values, (2, 3), keep)
    assert cells is not None
    assert not cells.all()
    for b, i, j in np.ndindex(2, 2, 3):
        rows = slice(i * 5 // 2, -(-(i + 1) * 5 // 2))
        columns = slice(j * 7 // 3, -(-(j + 1) * 7 // 3))
        inside = values[b][:, rows, columns][:, keep[b][rows, columns]]
        assert cells[b, i, j] == (inside.shape[1] > 0)
        torch.testing.assert_close(found[b, :, i, j], inside.mean(1) if inside.shape[1] else torch.zeros(3).double())


def test_scales_of_kept_places_by_hand() -> None:
    student, teacher = torch.randn(2, 3, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    keep = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(8)) < 0.1
    keep[1] = True
    total = 0.0
    for turn, side in enumerate((8, 4, 2, 1)):
        step, images = 8 // side, []
        for b in range(3):
            squares = []
            for i, j in np.ndindex(side, side):
                spot = (slice(i * step, (i + 1) * step), slice(j * step, (j + 1) * step))
                inside = keep[b][spot]
                if inside.any():
                    apart = (student - teacher)[b][:, *spot][:, inside].mean(1)
                    squares.append(float(apart.square().mean()))
            images.append(np.mean(squares))
        total += 2.0**-turn * float(np.mean(images))
    found = hierarchical_distance(student, teacher, keep)
    assert found.item() == pytest.approx(total / 1.875, rel=1e-12)


def test_only_kept_places_of_the_larger_map_are_averaged_and_compared() -> None:
    large, small = torch.arange(8.0).view(1, 1, 2, 4), torch.zeros(1, 1, 1, 2)
    keep = torch.tensor([[[True, False, False, False], [True, False, False, False]]])
    every = torch.ones(1, 1, 2, dtype=torch.bool)
    for swapped in (False, True):
        sides = (small, large, every, keep) if swapped else (large, small, keep, every)
        one, other, places = match_kept(*sides)
        mean = other if swapped else one
        assert mean.flatten()[0] == 2
        assert places is not None
        assert places.tolist() == [[[True, False]]]


# labels at the size of a map


@pytest.mark.parametrize("grid", [(5, 7), (3, 4), (1, 2), (16, 16)])
def test_labels_are_made_small_as_by_the_library(grid: tuple[int, int]) -> None:
    labels = torch.arange(70).view(2, 5, 7)
    expected = F.interpolate(labels[:, None].float(), grid, mode="nearest")[:, 0].long()
    assert torch.equal(small_labels(labels, *grid), expected)


def test_pixels_without_a_label_are_unknown() -> None:
    target = torch.tensor([[[0, 1], [2, -1]], [[1, 9], [0, 2]]])
    rows, pixels = torch.tensor([True, False]), torch.ones(2, 2, 2, dtype=torch.bool)
    pixels[1, 1, 0] = False
    assert class_maps(target, rows, 3, 2, 2).tolist() == [[[0, 1], [2, -1]], [[-1, -1], [-1, -1]]]
    assert class_maps(target, pixels, 3, 2, 2).tolist() == [[[0, 1], [2, -1]], [[1, -1], [-1, 2]]]
    assert class_maps(target, pixels, 3, 1, 1).tolist() == [[[0]], [[1]]]


# what takes part


def test_places_of_ignored_pixels_take_no_part() -> None:
    target = torch.tensor([[[0, 5, -1, -1], [0, 0, 2, 2]], [[-1, -1, -1, -1], [3, 3, 3, 3]]])
    found = taking_part(target, torch.tensor([True, True]), 2, 2)
    assert found is not None
    assert found.tolist() == [[[True, False], [True, True]], [[False, False], [True, True]]]
    pixels = torch.ones_like(target, dtype=torch.bool)
    pixels[0, 1] = False
    found = taking_part(target, pixels, 2, 2)
    assert found is not None
    assert found[0].tolist() == [[True, False], [False, False]]


def test_an_image_of_which_nothing_is_known_takes_part_as_a_whole() -> None:
    target = torch.tensor([[[-1, 3], [-1, 3]], [[4, 4], [4, 4]]])
    found = taking_part(target, torch.tensor([True, False]), 2, 1)
    assert found is not None
    assert found.all()


def test_without_class_maps_there_is_nothing_to_ignore() -> None:
    labelled = torch.tensor([True])
    others: tuple[object, ...] = (torch.tensor([1]), torch.rand(1, 2, 2), [], None)
    for target in others:
        assert taking_part(target, labelled, 2, 2) is None
