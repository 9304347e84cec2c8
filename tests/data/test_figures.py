# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from tutelage.core.error import UserError
from tutelage.data.figures import figures


def test_a_figure_is_a_function_of_its_number() -> None:
    whole, part = figures(6, (64, 48), seed=3), figures(2, (64, 48), seed=3, first=4)
    assert torch.equal(whole.images[4:], part.images)
    assert torch.equal(whole.points[4:], part.points)
    assert not torch.equal(whole.images, figures(6, (64, 48), seed=4).images)


def test_some_are_covered_and_some_are_cut() -> None:
    found = figures(96)
    visible = found.points[..., 2]
    assert found.points.shape == (96, 133, 3)
    assert set(visible.unique().tolist()) == {0.0, 1.0, 2.0}
    assert not (visible[:, 17:] == 1).any(), "what is covered is annotated for the body alone"
    whole = (visible == 2).all(1)
    assert 0.2 < whole.float().mean() < 0.95
    shown = found.points[visible > 0]
    assert (shown[:, 0] <= 71).all()
    assert (shown[:, 1] <= 95).all()
    assert (shown[:, :2] >= 0).all()


def test_boxes_hold_what_is_annotated() -> None:
    found = figures(48)
    for points, box, area in zip(found.points, found.boxes, found.area, strict=True):
        shown = points[points[:, 2] > 0, :2]
        if len(shown):
            assert (shown >= box[:2]).all()
            assert (shown <= box[2:]).all()
            assert 0 < area <= (box[2:] - box[:2]).prod()


def test_skin_is_where_the_hands_are() -> None:
    found = figures(64, (192, 128))
    clear = (found.points[..., 2] == 2).all(1)
    points = found.points[clear][:, [91, 112]].round().long()
    image = found.images[clear].float()
    row = torch.arange(len(image))[:, None]
    there = image[row, :, points[..., 1], points[..., 0]]
    apart = (there[:, 0] - there[:, 1]).abs().mean(1)  # both hands of a figure have one colour
    other = (there[:, 0] - there[:, 1].roll(1, 0)).abs().mean(1)
    assert apart.median() < 0.5 * other.median()


def test_what_cannot_be_drawn_is_named() -> None:
    with pytest.raises(UserError, match="size 40 x 64 is too small"):
        figures(1, (40, 64))
    with pytest.raises(UserError, match="number counts figures"):
        figures(0)
