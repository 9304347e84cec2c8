# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oracles import ld as oracle
from tutelage.functional.anchors import by_image, grid_anchors, nearest, on_boxes, overlaps, threshold

SIZES, IMAGE = [(6, 8), (3, 4)], (48, 64)


def boxes(seed: int, count: int) -> torch.Tensor:
    drawn = torch.rand(count, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    low = drawn[:, :2] * torch.tensor([44.0, 28.0])
    return torch.cat([low, low + 4 + 16 * drawn[:, 2:]], dim=1)


def test_anchors_lie_row_by_row_around_multiples_of_the_stride() -> None:
    found = grid_anchors(SIZES, IMAGE, torch.zeros(0, dtype=torch.float64), scale=2.0)
    assert found.shape == (60, 4)
    centre = (found[:, :2] + found[:, 2:]) / 2
    assert centre[:3].tolist() == [[0, 0], [8, 0], [16, 0]]
    assert centre[48:50].tolist() == [[0, 0], [16, 0]]
    assert (found[:48, 2:] - found[:48, :2] == 16).all()
    assert (found[48:, 2:] - found[48:, :2] == 32).all()


@pytest.mark.parametrize(("share", "form"), [("union", "paper"), ("anchor", "code")])
def test_overlaps_equal_the_loops(share: str, form: str) -> None:
    given_ = boxes(0, 4)
    anchors = grid_anchors(SIZES, IMAGE, given_, scale=2.0)
    iou, diou = overlaps(given_, anchors, share)  # type: ignore[arg-type]
    for m, box in enumerate(given_.numpy()):
        for a, anchor in enumerate(anchors.numpy()):
            expected = oracle.overlaps(anchor, box, form)
            assert (iou[m, a].item(), diou[m, a].item()) == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_boxes_without_area_share_nothing() -> None:
    empty = torch.tensor([[3.0, 3.0, 3.0, 3.0]])
    iou, diou = overlaps(empty, empty)
    assert iou == diou == 0


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), count=st.integers(0, 4), near=st.integers(1, 50))
def test_anchors_on_a_box_are_those_of_the_rule(seed: int, count: int, near: int) -> None:
    given_ = boxes(seed, count)
    anchors = grid_anchors(SIZES, IMAGE, given_, scale=2.0) + 0.3  # no two centres equally far
    found = on_boxes(given_, anchors, [48, 12], near)
    assert found.shape == (count, 60)
    for m, box in enumerate(given_.tolist()):
        middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        candidates: list[int] = []
        for start, size in ((0, 48), (48, 12)):
            apart = []
            for a in range(start, start + size):
                x, y = ((anchors[a, 0] + anchors[a, 2]) / 2).item(), ((anchors[a, 1] + anchors[a, 3]) / 2).item()
                apart.append(((x - middle[0]) ** 2 + (y - middle[1]) ** 2, a))
            candidates += [a for _, a in sorted(apart)[:near]]
        shares = [oracle.overlaps(anchors[a].numpy(), given_[m].numpy())[0] for a in candidates]
        mean = sum(shares) / len(shares)
        deviation = (sum((s - mean) ** 2 for s in shares) / max(len(shares) - 1, 1)) ** 0.5
        expected = set()
        for a, share in zip(candidates, shares, strict=True):
            x, y = ((anchors[a, 0] + anchors[a, 2]) / 2).item(), ((anchors[a, 1] + anchors[a, 3]) / 2).item()
            within = min(x - box[0], y - box[1], box[2] - x, box[3] - y) > 0.01
            if within and share >= mean + deviation - 1e-12:
                expected.add(a)
        assert set(found[m].nonzero().flatten().tolist()) == expected


def test_a_level_with_few_anchors_gives_all_it_has() -> None:
    given_ = boxes(1, 2)
    anchors = grid_anchors([(6, 8), (1, 1)], IMAGE, given_)
    found = nearest(given_, anchors, [48, 1], 9)
    assert found.shape == (2, 10)
    assert (found[:, -1] == 48).all()


def test_a_single_candidate_has_no_deviation() -> None:
    iou = torch.tensor([[0.25, 0.5]])
    assert threshold(iou, torch.tensor([[1]])).tolist() == [0.5]


def test_boxes_of_one_image_share_its_anchors() -> None:
    values = torch.tensor([[0.2, 0.0], [0.1, 0.7], [0.5, 0.5]])
    assert by_image(values, torch.tensor([2, 2, 0]), 3).tolist() == [
        [0.5, 0.5],
        [0.0, 0.0],
        [pytest.approx(0.2), pytest.approx(0.7)],
    ]
    assert not by_image(values[:0], torch.zeros(0, dtype=torch.int64), 2).any()
