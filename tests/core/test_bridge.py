# SPDX-License-Identifier: Apache-2.0
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tutelage.core.bridge import (
    Across,
    across,
    bridge,
    check_grid,
    check_maps,
    check_statistics,
    fusion_layers,
    regressor,
)
from tutelage.core.error import UserError


@pytest.mark.parametrize(
    ("student", "teacher"),
    [((2, 3, 4, 4), (2, 5, 6, 6)), ((2, 7, 3), (2, 7, 5)), ((2, 3), (2, 5))],
)
def test_a_bridge_changes_the_width_alone(student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    layer = bridge(torch.zeros(student), torch.zeros(teacher))
    found = layer(torch.randn(student)).shape
    dim = 1 if len(student) == 4 else -1
    assert found[dim] == teacher[dim]
    assert found.numel() // found[dim] == torch.zeros(student).numel() // student[dim]


def test_equal_widths_need_none() -> None:
    assert isinstance(bridge(torch.zeros(2, 3), torch.zeros(2, 3)), nn.Identity)
    layer = bridge(torch.zeros(2, 3), torch.zeros(2, 3), always=True, bias=False)
    assert [tuple(p.shape) for p in layer.parameters()] == [(3, 3)]


def test_no_bridge_from_a_vector_to_a_map() -> None:
    said = "no bridge from [2, 3] to [2, 3, 4, 4]: name taps of one kind"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        bridge(torch.zeros(2, 3), torch.zeros(2, 3, 4, 4))


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        pytest.param((2, 3, 8, 8), (2, 5, 4, 4), id="map to a coarser map"),
        pytest.param((2, 3, 4, 6), (2, 3, 8, 12), id="map to a finer map, equal widths"),
        pytest.param((2, 3, 7, 7), (2, 196, 5), id="map to tokens"),
        pytest.param((2, 3, 4, 6), (2, 96, 5), id="map to tokens, no square"),
        pytest.param((2, 196, 5), (2, 3, 7, 7), id="tokens to a map"),
        pytest.param((2, 24, 5), (2, 3, 8, 12), id="tokens to a map, no square"),
        pytest.param((2, 49, 5), (2, 196, 3), id="tokens to finer tokens"),
        pytest.param((2, 24, 5), (2, 24, 3), id="tokens to tokens of one grid"),
        pytest.param((2, 3, 4, 4), (2, 5, 4, 4), id="map to a map of one grid"),
    ],
)
def test_across_gives_the_teachers_shape(student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    one, other = torch.randn(student), torch.randn(teacher)
    layer = across(one, other)
    assert layer(one).shape == other.shape
    assert layer(torch.cat([one, one])).shape[0] == 4


def test_across_interpolates_then_maps_the_channels() -> None:
    one, other = torch.randn(2, 3, 4, 6), torch.randn(2, 96, 5)
    layer = across(one, other)
    assert isinstance(layer, Across)
    resized = F.interpolate(one, (8, 12), mode="bilinear", align_corners=False)
    expected = torch.stack([layer.linear(resized)[:, :, row, column] for row in range(8) for column in range(12)], 1)
    assert torch.allclose(layer(one), expected, atol=1e-6)


def test_tokens_of_no_grid_are_refused() -> None:
    said = "7 tokens fill no grid of the proportions 2x2: name the tap with `layout: grid` and `grid: [height, width]`"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        across(torch.zeros(1, 7, 3), torch.zeros(1, 5, 2, 2))
    with pytest.raises(UserError, match=r"^no bridge from \[2, 3\] to \[2, 7, 3\]: name taps of one kind$"):
        across(torch.zeros(2, 3), torch.zeros(2, 7, 3))


@pytest.mark.parametrize(
    ("student", "teacher", "kernel", "transposed"),
    [
        pytest.param((4, 4), (4, 4), (1, 1), False, id="equal"),
        pytest.param((8, 8), (4, 4), (3, 3), False, id="half"),
        pytest.param((2, 2), (1, 1), (3, 3), False, id="half of two"),
        pytest.param((8, 7), (4, 4), (3, 3), False, id="half, odd"),
        pytest.param((4, 5), (8, 10), (4, 4), True, id="double"),
        pytest.param((7, 8), (5, 8), (3, 1), False, id="smaller"),
        pytest.param((8, 8), (3, 3), (6, 6), False, id="much smaller"),
    ],
)
def test_a_regressor_brings_a_map_to_the_others_grid(
    student: tuple[int, int], teacher: tuple[int, int], kernel: tuple[int, int], transposed: bool
) -> None:
    one, other = torch.randn(2, 3, *student), torch.randn(2, 5, *teacher)
    layer = regressor(one, other, "method")
    assert layer(one).shape == other.shape
    assert layer.kernel_size == kernel
    assert isinstance(layer, nn.ConvTranspose2d) == transposed
    assert layer.bias is not None


@pytest.mark.parametrize(("student", "teacher"), [((3, 3), (5, 5)), ((8, 4), (4, 8)), ((4, 4), (8, 7))])
def test_no_regressor(student: tuple[int, int], teacher: tuple[int, int]) -> None:
    said = (
        f"method: no convolution brings a map of {student[0]}x{student[1]} to {teacher[0]}x{teacher[1]}; tap "
        "layers of equal, double or half size, or a larger map of the student"
    )
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        regressor(torch.zeros(1, 3, *student), torch.zeros(1, 3, *teacher), "method")


def test_what_is_refused() -> None:
    with pytest.raises(UserError, match=r"^m compares maps of one grid: the student's is \(4, 4\)"):
        check_grid(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 2, 2), "m")
    said = "m compares maps [B, C, H, W], not [2, 3] and [2, 3, 1, 1]"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        check_maps(torch.zeros(2, 3), torch.zeros(2, 3, 1, 1), "m")
    with pytest.raises(UserError, match=r"^m: batch norm cannot train on one value a channel"):
        check_statistics(torch.zeros(1, 3, 1, 1), True, "m")
    check_statistics(torch.zeros(1, 3, 1, 1), False, "m")
    check_statistics(torch.zeros(1, 3, 1, 2), True, "m")


def test_layers_of_a_review_keep_the_place_and_have_no_bias() -> None:
    narrow, wide = fusion_layers(6, 4, 10)
    found = narrow(torch.zeros(2, 6, 5, 7))
    assert found.shape == (2, 4, 5, 7)
    assert wide(found).shape == (2, 10, 5, 7)
    assert [name for name, _ in narrow.named_parameters()] == ["0.weight", "1.weight", "1.bias"]
