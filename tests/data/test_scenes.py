# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import Tensor

from tutelage.core.error import UserError
from tutelage.data.scenes import SIDES, boxes_of, scenes


def by_hand(mask: Tensor) -> list[int]:
    rows = [y for y in range(mask.shape[0]) for x in range(mask.shape[1]) if mask[y, x]]
    columns = [x for y in range(mask.shape[0]) for x in range(mask.shape[1]) if mask[y, x]]
    return [min(columns), min(rows), max(columns) + 1, max(rows) + 1]


def test_boxes_masks_and_class_maps_agree() -> None:
    for scene in scenes(12, (48, 64), seed=3):
        assert scene.image.shape == (3, 48, 64)
        assert scene.image.dtype == torch.uint8
        assert len(scene.boxes) == len(scene.labels) == len(scene.masks)
        assert int(scene.masks.sum(0).amax()) <= 1
        assert torch.equal(scene.class_map > 0, scene.masks.any(0))
        for box, label, mask in zip(scene.boxes, scene.labels, scene.masks, strict=True):
            assert box.tolist() == by_hand(mask)
            assert scene.class_map[mask].unique().tolist() == [int(label) + 1]


def test_a_scene_is_a_function_of_seed_and_place() -> None:
    few, many = scenes(3, 64, seed=5), scenes(6, 64, seed=5)
    assert all(torch.equal(a.image, b.image) and torch.equal(a.boxes, b.boxes) for a, b in zip(few, many, strict=False))
    assert not torch.equal(few[0].image, few[1].image)
    assert not torch.equal(few[0].image, scenes(1, 64, seed=6)[0].image)
    assert not torch.equal(few[0].image, scenes(1, 64, seed=5, held_out=True)[0].image)


def test_scenes_overlap_vary_in_scale_and_may_be_empty() -> None:
    found = scenes(150, 64, seed=0)
    counts = [len(scene.labels) for scene in found]
    assert min(counts) == 0
    assert max(counts) == 5
    assert set(torch.cat([scene.labels for scene in found]).tolist()) == set(range(10))
    sides = torch.cat([scene.boxes[:, 3] - scene.boxes[:, 1] for scene in found])
    assert sides.max() > 3 * sides.min()
    assert sides.max() <= 64 * SIDES[1]
    meet = 0
    for scene in found:
        for i, one in enumerate(scene.boxes.tolist()):
            for other in scene.boxes.tolist()[:i]:
                meet += one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
    assert meet > 20


def test_digits_stand_out_from_their_ground() -> None:
    gaps = []
    for scene in scenes(20, 64, seed=1):
        grey = scene.image.float().mean(0)
        for box, mask in zip(scene.boxes.long().tolist(), scene.masks, strict=True):
            inside = torch.zeros_like(mask)
            inside[box[1] : box[3], box[0] : box[2]] = True
            around = inside & (scene.class_map == 0)
            gaps.append(float((grey[mask].mean() - grey[around].mean()).abs()) / 255)
    assert torch.tensor(gaps).median() > 0.15


def test_an_empty_mask_has_an_empty_box() -> None:
    assert boxes_of(torch.zeros(1, 4, 4, dtype=torch.bool)).tolist() == [[0, 0, 0, 0]]
    assert boxes_of(torch.zeros(0, 4, 4, dtype=torch.bool)).shape == (0, 4)


@pytest.mark.parametrize(("number", "size", "said"), [(0, 64, "number counts scenes"), (2, 8, "size 8 x 8")])
def test_bad_numbers_are_named(number: int, size: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        scenes(number, size)
