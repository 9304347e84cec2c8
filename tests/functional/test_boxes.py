# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou

from oracles import fgd as oracle
from tutelage.functional.boxes import coverage, iou_of

SIZES = torch.tensor([[48, 64], [40, 64], [48, 51]])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(0, 6),
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    whole=st.booleans(),
)
def test_equals_the_loops(seed: int, count: int, grid: tuple[int, int], whole: bool) -> None:
    drawn = torch.rand(count, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    low = drawn[:, :2] * torch.tensor([64.0, 48.0]) - 4  # some leave the image
    boxes = torch.cat([low, low + 40 * drawn[:, 2:]], dim=1)
    boxes = boxes.round() if whole else boxes
    image = torch.arange(count) % 2  # the third image shows nothing
    expected, _ = oracle.masks(boxes.numpy(), image.numpy(), SIZES.double().numpy(), *grid)
    np.testing.assert_allclose(coverage(boxes, image, SIZES, [grid])[0].numpy(), expected, rtol=1e-12)


def test_of_two_boxes_the_smaller_counts() -> None:
    boxes = torch.tensor([[0.0, 0.0, 64.0, 48.0], [10.0, 10.0, 12.0, 12.0]])
    found = coverage(boxes, torch.tensor([0, 0]), SIZES[:1], [(6, 8)])[0][0]
    assert found[1, 1] == 1 / 4  # its cells are 1 and 2, both ways
    assert found[0, 0] == 1 / 63  # 7 x 9 cells: the last row and column lie beyond the map
    assert torch.equal(found, coverage(boxes.flip(0), torch.tensor([0, 0]), SIZES[:1], [(6, 8)])[0][0])


def test_an_edge_on_a_border_of_cells_is_found_there() -> None:
    """A coordinate times cells is a whole number of pixels here: dividing first would be off by one cell."""
    for size in range(1, 400):
        box = torch.tensor([[0.0, 0.0, float(size), float(size)]])
        found = coverage(box, torch.tensor([0]), torch.tensor([[size * 3, size * 3]]), [(3, 3)])[0][0]
        assert (found > 0).tolist() == [[True, True, False]] * 2 + [[False] * 3], size


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types(dtype: torch.dtype) -> None:
    found = coverage(torch.tensor([[8.0, 8.0, 16.0, 16.0]], dtype=dtype), torch.tensor([0]), SIZES[:1], [(6, 8)])[0]
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_it_compiles_whole() -> None:
    boxes, image = torch.tensor([[3.0, 5.0, 21.0, 30.0], [1.0, 2.0, 60.0, 40.0]]), torch.tensor([1, 1])
    torch._dynamo.reset()
    fast = torch.compile(coverage, fullgraph=True, backend="aot_eager")
    grids = [(6, 8), (3, 4)]
    for one, other in zip(fast(boxes, image, SIZES, grids), coverage(boxes, image, SIZES, grids), strict=True):
        assert torch.equal(one, other)


def test_overlaps_place_by_place_and_pair_by_pair() -> None:
    low = torch.rand(2, 4, 2, generator=torch.Generator().manual_seed(0)).double()
    one, other = torch.cat([low, low + 0.5], dim=2)
    pairs = iou_of(one[:, None], other[None])
    torch.testing.assert_close(pairs, box_iou(one, other))
    torch.testing.assert_close(iou_of(one, other), pairs.diagonal())
    assert iou_of(torch.zeros(1, 4), torch.zeros(1, 4)) == 0
