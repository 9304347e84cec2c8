# SPDX-License-Identifier: Apache-2.0
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tutelage.core import Batch
from tutelage.core.error import UserError
from tutelage.data.annotations import Annotated
from tutelage.data.load import load
from tutelage.data.mosaic import GROUND, Mosaic, affine, blended, candidates, laid, warped
from tutelage.data.record import Record

Floats = NDArray[np.float64]


def record(size: tuple[int, int], boxes: Sequence[Sequence[float]], seed: int = 0, value: int | None = None) -> Record:
    """An image of noise, or of one value, whose things fill their boxes."""
    draw = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, *size), generator=draw, dtype=torch.uint8)
    if value is not None:
        image = torch.full_like(image, value)
    box = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    masks = torch.zeros(len(box), *size, dtype=torch.bool)
    for number, (left, top, right, bottom) in enumerate(box.int().tolist()):
        masks[number, top:bottom, left:right] = True
    labels = torch.arange(len(box)) + 10 * seed
    none = torch.zeros(0)
    truth = Annotated(Path("a.png"), size, none.view(0, 4), none.long(), none.bool(), none)
    return Record(image, box, labels, masks, truth)


# --- four around a point: pixel by pixel ------------------------------------------------------------------------


@pytest.mark.parametrize("centre", [(4, 5), (8, 8), (11, 6), (5, 11)])
def test_four_images_lie_around_a_point(centre: tuple[int, int]) -> None:
    # images whose longer side is the size's already: nothing is resized
    parts = [
        record((8, 6), [[1, 1, 5, 7]], 0),
        record((5, 8), [[0, 0, 3, 3], [4, 1, 8, 5]], 1),
        record((8, 8), [[2, 2, 6, 6]], 2),
        record((8, 3), [], 3),
    ]
    whole = laid(parts, centre, (8, 8))
    expected = np.full((3, 16, 16), GROUND, dtype=np.uint8)
    boxes: list[list[float]] = []
    masks: list[NDArray[np.bool_]] = []
    for number, part in enumerate(parts):
        tall, wide = part.size
        top = centre[0] - tall if number in (0, 1) else centre[0]
        left = centre[1] - wide if number in (0, 2) else centre[1]
        for y in range(tall):
            for x in range(wide):
                if 0 <= top + y < 16 and 0 <= left + x < 16:
                    expected[:, top + y, left + x] = part.image[:, y, x]
        assert part.masks is not None
        for box, mask in zip(part.boxes.tolist(), part.masks.numpy(), strict=True):
            moved = [box[0] + left, box[1] + top, box[2] + left, box[3] + top]
            moved = [min(max(edge, 0.0), 16.0) for edge in moved]
            if moved[2] > moved[0] and moved[3] > moved[1]:
                boxes.append(moved)
                drawn = np.zeros((16, 16), dtype=bool)
                for y, x in np.argwhere(mask):
                    if 0 <= top + y < 16 and 0 <= left + x < 16:
                        drawn[top + y, left + x] = True
                masks.append(drawn)
    assert np.array_equal(whole.image.numpy(), expected)
    assert whole.boxes.tolist() == boxes
    assert whole.masks is not None
    assert np.array_equal(whole.masks.numpy(), np.stack(masks))
    assert len(whole.labels) == len(boxes)


def test_images_are_made_to_fit_first() -> None:
    whole = laid([record((4, 2), [[0, 0, 2, 4]], value=9), *[record((16, 8), [], value=7)] * 3], (8, 8), (8, 8))
    assert (whole.image[0, :8, 4:8] == 9).all()  # 4 x 2 to 8 x 4, left of the point
    assert (whole.image[0, :8, :4] == GROUND).all()
    assert whole.boxes.tolist() == [[4, 0, 8, 8]]


# --- a matrix over an image -------------------------------------------------------------------------------------


def looked(image: Floats, x: float, y: float) -> float:
    """Return an image at a place, bilinear between the middles of its pixels, grey outside."""
    height, width = image.shape
    left, top = math.floor(x - 0.5), math.floor(y - 0.5)
    value = 0.0
    for row in (top, top + 1):
        for column in (left, left + 1):
            weight = (1 - abs(x - 0.5 - column)) * (1 - abs(y - 0.5 - row))
            inside = 0 <= row < height and 0 <= column < width
            value += weight * (image[row, column] if inside else GROUND)
    return value


@pytest.mark.parametrize(
    ("degrees", "factor", "shear", "place"),
    [(0.0, 1.0, (0.0, 0.0), (8.0, 8.0)), (0.0, 0.5, (0.0, 0.0), (4.0, 3.0)), (9.0, 1.3, (-2.0, 1.5), (5.0, 4.5))],
)
def test_a_matrix_moves_pixels_masks_and_boxes(
    degrees: float, factor: float, shear: tuple[float, float], place: tuple[float, float]
) -> None:
    given = record((16, 16), [[2, 3, 9, 12], [8, 6, 14, 13]])
    matrix = affine((8.0, 8.0), degrees, factor, shear, place)
    found = warped(given, matrix, (9, 10), factor)
    back = np.linalg.inv(matrix.numpy())
    assert given.masks is not None
    assert found.masks is not None
    for y in range(9):
        for x in range(10):
            there = back @ np.array([x + 0.5, y + 0.5, 1.0])
            for channel in range(3):
                expected = looked(given.image[channel].numpy().astype(float), there[0], there[1])
                assert abs(int(found.image[channel, y, x]) - expected) <= 0.51
            row, column = math.floor(there[1]), math.floor(there[0])
            if min(abs(there[0] - round(there[0])), abs(there[1] - round(there[1]))) < 1e-3:
                continue  # on the border of two pixels
            inside = 0 <= row < 16 and 0 <= column < 16
            own = given.masks[:, row, column] if inside else torch.zeros(2, dtype=torch.bool)
            assert torch.equal(found.masks[:, y, x], own[: len(found.masks)])
    for box, moved in zip(given.boxes.tolist(), found.boxes.tolist(), strict=False):
        corners = [matrix.numpy() @ np.array([box[i], box[j], 1.0]) for i in (0, 2) for j in (1, 3)]
        xs, ys = ([min(max(float(one[axis]), 0.0), side) for one in corners] for axis, side in ((0, 10.0), (1, 9.0)))
        assert moved == pytest.approx([min(xs), min(ys), max(xs), max(ys)], abs=1e-4)


def test_a_matrix_is_its_parts_one_after_the_other() -> None:
    matrix = affine((3.0, 2.0), 90.0, 2.0, (0.0, 0.0), (10.0, 20.0)).numpy()
    assert matrix @ np.array([3.0, 2.0, 1.0]) == pytest.approx([10, 20, 1])
    assert matrix @ np.array([4.0, 2.0, 1.0]) == pytest.approx([10, 22, 1])  # x turns to y, twice as far
    sheared = affine((0.0, 0.0), 0.0, 1.0, (45.0, 0.0), (0.0, 0.0)).numpy()
    assert sheared @ np.array([1.0, 2.0, 1.0]) == pytest.approx([3, 2, 1])


def test_of_a_thing_enough_must_be_left() -> None:
    was = torch.tensor([[0.0, 0, 40, 40]]).repeat(4, 1)
    after = torch.tensor([[0.0, 0, 20, 20], [0.0, 0, 40, 7], [0.0, 0, 40, 1.9], [0.0, 0, 17, 20]])
    assert candidates(was, after, 2).tolist() == [True, False, False, True]  # a quarter, 7/40, thin, 17/80
    line = torch.tensor([[0.0, 0, 100, 4]])
    assert candidates(line, line, 2).tolist() == [False]  # 25 times as wide as high


# --- two over each other ----------------------------------------------------------------------------------------


def test_two_images_are_meant_and_their_things_joined() -> None:
    one, other = record((8, 8), [[1, 1, 7, 7]], 1), record((8, 8), [[0, 0, 8, 8]], 2)
    found = blended(one, other, 1.0, True, (0.0, 0.0))
    expected = (one.image.numpy().astype(int) + other.image.numpy()[:, :, ::-1]) // 2
    assert np.array_equal(found.image.numpy(), expected)
    assert found.boxes.tolist() == [[1, 1, 7, 7], [0, 0, 8, 8]]
    assert found.labels.tolist() == [10, 20]
    assert found.masks is not None
    assert found.masks.flatten(1).sum(1).tolist() == [36, 64]


@pytest.mark.parametrize(("factor", "place", "box"), [(2.0, (0.5, 0.99), [0, 2, 6, 12]), (0.5, (0.9, 0.9), None)])
def test_the_other_is_scaled_mirrored_and_cut(
    factor: float, place: tuple[float, float], box: list[float] | None
) -> None:
    one, other = record((16, 16), [[1, 1, 7, 7]], value=0), record((16, 16), [[1, 5, 7, 10]], value=200)
    found = blended(one, other, factor, True, place)
    if box is None:  # 6 x 5 pixels by half: less than 5 are left
        assert found is one
        return
    # 32 x 32, the thing at [2, 14] x [10, 20]; mirrored [18, 30]; seen from y = int(0.5 * 17) = 8, x = 16
    assert found.boxes[1].tolist() == [2, 2, 14, 12]
    assert found.masks is not None
    assert found.masks[1, 2:12, 2:14].all()
    assert found.masks[1].sum() == 120
    assert (found.image == 100).all()


def test_ground_is_grey_beside_a_smaller_one() -> None:
    one, other = record((16, 16), [], value=0), record((16, 16), [[0, 0, 16, 16]], value=200)
    found = blended(one, other, 0.5, False, (0.9, 0.9))
    assert (found.image[:, :8, :8] == 100).all()
    assert (found.image[:, 8:] == GROUND // 2).all()
    assert found.boxes.tolist() == [[0, 0, 8, 8]]


# --- in a loader ------------------------------------------------------------------------------------------------


def scenes(augment: Any, **more: Any) -> Any:
    words = {"scenes": [8, 2], "side": 64, "masks": True, **more.pop("detection", {})}
    spec = {"source": "scenes", "batch_size": 4, "augment": augment, "detection": words, **more}
    return load(spec, task="detection", seed=1)


def first(data: Any, epoch: int = 0) -> Batch:
    batch: Batch = next(iter(data.train.epoch(epoch)))
    return batch


YOLOX = [{"mosaic": {"size": 96, "scale": [0.5, 1.5]}}, "mixup", "hsv", "flip"]


def test_a_batch_is_a_function_of_its_key_and_boxes_hold_their_masks() -> None:
    data = scenes(YOLOX)
    state = torch.random.get_rng_state()
    met = 0
    for epoch in range(2):
        for batch in data.train.epoch(epoch):
            assert batch.inputs.shape[-2:] == (96, 96)
            boxes, masks = batch.frame.boxes, batch.frame.masks
            y, x = (torch.arange(96) + 0.5 for _ in range(2))
            inside = (x > boxes[:, :1] - 1.5) & (x < boxes[:, 2:3] + 1.5)
            within = (y > boxes[:, 1:2] - 1.5) & (y < boxes[:, 3:] + 1.5)
            assert not (masks & ~(within[:, :, None] & inside[:, None])).any()
            met += len(boxes)
    assert met > 60
    assert torch.equal(state, torch.random.get_rng_state())
    one, two = first(data), first(scenes(YOLOX))
    assert torch.equal(one.inputs, two.inputs)
    assert torch.equal(first(scenes(YOLOX, workers=1)).inputs, one.inputs)
    assert not torch.equal(one.inputs, first(data, 1).inputs)
    still = next(iter(data.validation.epoch(0)))
    assert still.inputs.shape[-2:] == (64, 64)


def test_the_last_epochs_may_do_without() -> None:
    data = scenes(YOLOX, augment_late={"epochs": 1, "augment": ["flip"]})
    data.train.epochs = 3
    sizes = [tuple(first(data, epoch).inputs.shape[-2:]) for epoch in range(3)]
    assert sizes == [(96, 96), (96, 96), (64, 64)]


def test_images_without_boxes_are_mixed_among_themselves() -> None:
    data = scenes([{"mosaic": {"size": 64, "scale": [1.0, 1.0]}}, "mixup"], labels=3)
    for epoch in range(2):
        for batch in data.train.epoch(epoch):
            for known, one in zip(batch.labelled.tolist(), batch.target, strict=True):
                assert known or not len(one["labels"])


def test_a_file_that_cannot_be_read_is_named_in_its_own_turn(tmp_path: Path) -> None:
    from coco_folder import coco_folder

    coco_folder(tmp_path, images=3)
    (tmp_path / "train" / "1.png").write_bytes(b"no image")
    spec = {"source": f"coco:{tmp_path}", "batch_size": 3, "augment": ["mosaic"], "detection": {"shortest": 64}}
    with pytest.raises(UserError, match=r"1\.png"):
        next(iter(load(spec, task="detection").train.epoch()))
    skipping = load({**spec, "on_error": "skip"}, task="detection").train
    assert len(next(iter(skipping.epoch()))) == 2
    assert len(skipping.skipped) == 1


@pytest.mark.parametrize(
    ("augment", "said"),
    [
        ("mosaic", "data.augment.mosaic needs a size: give it, data.image_size or data.detection.shortest"),
        ([{"mosaic": {"sise": 3}}], "data.augment.mosaic.sise is not known; did you mean size?"),
        ([{"mosaic": 3}], "data.augment.mosaic takes options by name, not 3"),
        ([{"mosaic": {"size": "x"}}], "data.augment.mosaic.size counts pixels, or is [height, width], not ('x', 'x')"),
        ([{"mosaic": {"size": 64, "scale": [2, 1]}}], "data.augment.mosaic.scale is [least, largest]"),
        ([{"mosaic": {"size": 64, "shear": None}}], "data.augment.mosaic.shear is a number, not None"),
        ([{"mixup": {"scale": 3}}], "data.augment.mixup.scale is [least, largest], both > 0, not 3"),
        ([{"mixup": {"flip": 2}}], "data.augment.mixup.flip: a probability lies in [0, 1], not 2"),
        ([{"hsv": [1, 2]}], "data.augment.hsv is [hue, saturation, value]"),
        ([{"flip": 0.3}], "data.augment.flip takes no option"),
        ([{"mosiac": {}}], "did you mean mosaic?"),
        ([3], "data.augment: 3 is not known in detection"),
        ([["flip"]], "data.augment: ['flip'] is not known in detection"),
        ([{"mosaic": {"size": 64, "degrees": float("nan")}}], "data.augment.mosaic.degrees is a number, not nan"),
    ],
)
def test_what_makes_no_sense_is_named(augment: Any, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        scenes(augment)


def test_what_is_said_to_be_false_is_not_done() -> None:
    assert scenes([{"hsv": False}, {"flip": False}, {"mosaic": False}]).train.samples.augment == ()
    assert len(scenes([{"flip": True}, {"mixup": True}]).train.samples.augment) == 2


def test_probability_zero_changes_nothing() -> None:
    given = record((8, 8), [[1, 1, 5, 5]])
    assert Mosaic((8, 8), probability=0.0)(given, [given] * 3) is given
    assert replace(given).keep(torch.tensor([False])).labels.tolist() == []
