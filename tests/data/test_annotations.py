# SPDX-License-Identifier: Apache-2.0
import logging

import pytest
import torch

from tutelage.core.error import UserError
from tutelage.data.annotations import Annotated, Troubles, decoded, encoded, sound


def test_codes_of_polygons_masks_and_counts_are_one() -> None:
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[1:3, 2:5] = True
    polygon = [[2, 1, 5, 1, 5, 3, 2, 3]]
    loose = {"size": [4, 6], "counts": [9, 2, 2, 2, 2, 2, 5]}  # column by column
    for shape in (polygon, mask, loose, encoded(mask, (4, 6))):
        assert torch.equal(decoded(encoded(shape, (4, 6))), mask)
    two = [[0, 0, 1, 0, 1, 1, 0, 1], [4, 2, 6, 2, 6, 4, 4, 4]]
    assert decoded(encoded(two, (4, 6))).sum() == 5


def test_a_box_without_shape_is_its_own_mask() -> None:
    box = torch.tensor([[1.0, 0.0, 3.0, 2.0]])
    found = Annotated(torch.zeros(3, 4, 4), (4, 4), box, torch.tensor([0]), torch.tensor([False]), torch.tensor([4.0]))
    assert found.masks.nonzero().tolist() == [[0, 0, 1], [0, 0, 2], [0, 1, 1], [0, 1, 2]]


def test_every_kind_of_bad_box_is_counted_and_cut() -> None:
    boxes = torch.tensor(
        [[-5.0, 0, 4, 4], [0, 0, 4, 4], [9, 0, 12, 4], [3, 3, 3, 5], [0, 0, float("nan"), 2], [0, -0.5, 4, 4]]
    )
    troubles = Troubles("set")
    cut, good = sound(boxes, (8, 8), list("abcdef"), troubles)
    assert good.tolist() == [True, True, False, False, False, True]
    assert cut[0].tolist() == cut[5].tolist() == [0, 0, 4, 4]
    assert troubles.kinds == {
        "boxes that are no numbers": (1, "e"),
        "boxes without area": (1, "d"),
        "boxes outside their image": (1, "c"),
        "boxes over an edge": (1, "a"),
    }


def test_troubles_are_told_once_or_fatal(caplog: pytest.LogCaptureFixture) -> None:
    Troubles("set").settle("raise")
    troubles = Troubles("set")
    for place in ("a", "b"):
        troubles.note("boxes without area", place)
    with pytest.raises(UserError, match=r"set: 2 boxes without area \(first a\); data.on_error: skip"):
        troubles.settle("raise")
    with caplog.at_level(logging.WARNING):
        troubles.settle("skip")
    assert caplog.messages == ["set: 2 boxes without area (first a): left out"]
