# SPDX-License-Identifier: Apache-2.0
"""Images made of several: four around a point, or two over each other; boxes and masks go with them.

Everything is drawn from torch's generator, which is seeded by the key of the sample.

Reference: Ge et al., YOLOX: Exceeding YOLO Series in 2021, arXiv 2107.08430, and its released code.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.nn import functional as F

from tutelage.core.error import UserError
from tutelage.data.record import Record, resized

GROUND = 114  # grey where no image lies
AREA, ASPECT = 0.2, 20.0  # of a thing: the share that must be left, and how thin that may be
LEAST, LEAST_OVER = 2.0, 5.0  # pixels a side that must be left: of four images, of one over another


@final
@dataclass(frozen=True)
class Mosaic:
    """Lay four images around a point; turn, scale, shear and move them together; cut out the middle.

    Args:
        size: (height, width) of the result. Each image is brought to fit into it first.
        scale: least and largest factor.
        degrees: largest turn either way.
        translate: largest move either way, as a share of the side.
        shear: largest shear either way, in degrees.
        probability: of doing it.

    Raises:
        UserError: if an option makes no sense.
    """

    size: tuple[int, int]
    scale: tuple[float, float] = (0.1, 2.0)
    degrees: float = 10.0
    translate: float = 0.1
    shear: float = 2.0
    probability: float = 1.0

    others: ClassVar[int] = 3
    things: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if len(self.size) != 2 or not all(isinstance(side, int) and side > 1 for side in self.size):
            raise UserError(f"data.augment.mosaic.size counts pixels, or is [height, width], not {self.size}")
        _require_range(self.scale, "mosaic.scale")
        for name in ("degrees", "translate", "shear"):
            if not _number(getattr(self, name)):
                raise UserError(f"data.augment.mosaic.{name} is a number, not {getattr(self, name)!r}")
        _require_probability(self.probability, "mosaic")

    def __call__(self, record: Record, others: Sequence[Record]) -> Record:
        """Return one image of four, in the size of the option."""
        if torch.rand(()) >= self.probability:
            return record
        height, width = self.size
        centre = (torch.tensor([height, width]) * (0.5 + torch.rand(2))).long()
        turn, wide, high, over, up = (2 * torch.rand(5) - 1).tolist()
        low, span = self.scale[0], self.scale[1] - self.scale[0]
        factor = low + span * float(torch.rand(()))
        place = (width * (0.5 + over * self.translate), height * (0.5 + up * self.translate))
        matrix = affine((width, height), turn * self.degrees, factor, (wide * self.shear, high * self.shear), place)
        whole = laid([record, *others], (int(centre[0]), int(centre[1])), self.size)
        return warped(whole, matrix, self.size, factor)


@final
@dataclass(frozen=True)
class MixUp:
    """Lay another image, scaled, perhaps mirrored and cut, over one: pixels are their mean, things are of both.

    Args:
        scale: least and largest factor on an image that fits into the other.
        flip: probability of mirroring it.
        probability: of doing it.

    Raises:
        UserError: if an option makes no sense.
    """

    scale: tuple[float, float] = (0.8, 1.6)
    flip: float = 0.5
    probability: float = 1.0

    others: ClassVar[int] = 1
    things: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _require_range(self.scale, "mixup.scale")
        _require_probability(self.flip, "mixup.flip")
        _require_probability(self.probability, "mixup")

    def __call__(self, record: Record, others: Sequence[Record]) -> Record:
        """Return one image of two, in the size of the first; itself if no thing of the other is left."""
        if torch.rand(()) >= self.probability:
            return record
        factor = self.scale[0] + (self.scale[1] - self.scale[0]) * float(torch.rand(()))
        mirrored, place = bool(torch.rand(()) < self.flip), torch.rand(2)
        return blended(record, others[0], factor, mirrored, (float(place[0]), float(place[1])))


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _require_range(scale: tuple[float, float], option: str) -> None:
    pair = isinstance(scale, tuple) and len(scale) == 2 and all(map(_number, scale))
    if not pair or not 0 < scale[0] <= scale[1]:
        raise UserError(f"data.augment.{option} is [least, largest], both > 0, not {scale!r}")


def _require_probability(value: float, option: str) -> None:
    if not _number(value) or not 0 <= value <= 1:
        raise UserError(f"data.augment.{option}: a probability lies in [0, 1], not {value}")


def laid(records: Sequence[Record], centre: tuple[int, int], size: tuple[int, int]) -> Record:
    """Return four images around a point: above left and right, below left and right.

    Args:
        records: four; each is brought to fit into `size` first.
        centre: y and x of the point.
        size: half of (height, width) of the whole.
    """
    height, width = 2 * size[0], 2 * size[1]
    image = records[0].image.new_full((3, height, width), GROUND)
    boxes, masks = [], []
    for number, one in enumerate(records):
        part = fitted(one, size)
        tall, wide = part.size
        top = centre[0] - tall if number < 2 else centre[0]
        left = centre[1] - wide if number % 2 == 0 else centre[1]
        rows, columns = slice(max(top, 0), min(top + tall, height)), slice(max(left, 0), min(left + wide, width))
        inner = slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left)
        image[:, rows, columns] = part.image[:, inner[0], inner[1]]
        boxes.append(_inside(part.boxes + torch.tensor([left, top, left, top]), (height, width)))
        if part.masks is not None:
            whole = part.masks.new_zeros(len(part.masks), height, width)
            whole[:, rows, columns] = part.masks[:, inner[0], inner[1]]
            masks.append(whole)
    found = replace(
        records[0],
        image=image,
        boxes=torch.cat(boxes),
        labels=torch.cat([one.labels for one in records]),
        masks=torch.cat(masks) if masks else None,
    )
    return found.keep((found.boxes[:, 2:] > found.boxes[:, :2]).all(dim=1))


def fitted(record: Record, size: tuple[int, int]) -> Record:
    """Return an image as large as fits into (height, width), its sides in their ratio."""
    ratio = min(size[0] / record.size[0], size[1] / record.size[1])
    return resized(record, (max(1, int(record.size[0] * ratio)), max(1, int(record.size[1] * ratio))))


def affine(
    middle: tuple[float, float], degrees: float, factor: float, shear: tuple[float, float], place: tuple[float, float]
) -> Tensor:
    """Return the matrix `[3, 3]`, in float64, that brings a point to a place and scales, turns and shears around it.

        M = move(place) shear turn scale move(-middle)

    Args:
        middle: x and y of the point.
        degrees: of the turn.
        factor: of the scale.
        shear: along x and along y, in degrees.
        place: x and y where the point goes.

    Example:
        >>> affine((4.0, 4.0), 0.0, 2.0, (0.0, 0.0), (1.0, 2.0)).tolist()
        [[2.0, 0.0, -7.0], [0.0, 2.0, -6.0], [0.0, 0.0, 1.0]]
    """
    turn = math.radians(degrees)
    across, down = (math.tan(math.radians(one)) for one in shear)
    rows: tuple[list[list[float]], ...] = (
        [[1, 0, place[0]], [0, 1, place[1]], [0, 0, 1]],
        [[1, across, 0], [down, 1, 0], [0, 0, 1]],
        [[math.cos(turn), -math.sin(turn), 0], [math.sin(turn), math.cos(turn), 0], [0, 0, 1]],
        [[factor, 0, 0], [0, factor, 0], [0, 0, 1]],
        [[1, 0, -middle[0]], [0, 1, -middle[1]], [0, 0, 1]],
    )
    matrix: Tensor = torch.linalg.multi_dot([torch.tensor(one, dtype=torch.float64) for one in rows])
    return matrix


def warped(record: Record, matrix: Tensor, size: tuple[int, int], factor: float = 1.0) -> Record:
    """Return what a matrix makes of an image: pixels bilinear, masks by the nearest pixel, boxes around their corners.

    Things of which too little is left are left out: see `candidates`.

    Args:
        record: the image.
        matrix: `[3, 3]`, from places of the image to places of the result; pixel i reaches from i to i + 1.
        size: (height, width) of the result.
        factor: by which the matrix scales, for what is left of a thing.
    """
    y, x = (torch.arange(side, dtype=torch.float64) + 0.5 for side in size)
    places = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=2)
    back = torch.linalg.inv(matrix)
    sides = torch.tensor([record.size[1], record.size[0]])
    grid = (2 * (places @ back[:2, :2].T + back[:2, 2]) / sides - 1).float()[None]
    pixels = F.grid_sample(record.image[None].float() - GROUND, grid, mode="bilinear", align_corners=False)[0] + GROUND
    masks = record.masks
    if masks is not None:
        masks = F.grid_sample(masks[None].float(), grid, mode="nearest", align_corners=False)[0] > 0.5
    left, top, right, bottom = record.boxes.double().unbind(1)
    corners = torch.stack([left, top, right, top, right, bottom, left, bottom], dim=1).view(-1, 4, 2)
    moved = corners @ matrix[:2, :2].T + matrix[:2, 2]
    boxes = _inside(torch.cat([moved.amin(dim=1), moved.amax(dim=1)], dim=1).float(), size)
    kept = candidates(record.boxes * factor, boxes, LEAST)
    found = replace(record, image=pixels.round().clamp(0, 255).to(torch.uint8), boxes=boxes, masks=masks)
    return found.keep(kept)


def blended(record: Record, other: Record, factor: float, mirrored: bool, place: tuple[float, float]) -> Record:
    """Return the mean of an image and a part of another, with the things of both.

    Args:
        record: the image.
        other: the other; it is made to fit, on a ground of the image's size, and both are scaled.
        factor: of the scale.
        mirrored: left and right of the other are exchanged.
        place: y and x, in [0, 1), of the part that is seen, where it is larger than the image.
    """
    size = record.size
    part = fitted(other, size)
    room = (0, size[1] - part.size[1], 0, size[0] - part.size[0])
    masks = None if part.masks is None else F.pad(part.masks, room)
    ground = replace(part, image=F.pad(part.image, room, value=GROUND), masks=masks)
    ground = resized(ground, (max(1, int(size[0] * factor)), max(1, int(size[1] * factor))))
    tall, wide = ground.size
    before, image, masks = ground.boxes, ground.image, ground.masks
    if mirrored:
        before = torch.stack([wide - before[:, 2], before[:, 1], wide - before[:, 0], before[:, 3]], dim=1)
        image, masks = image.flip(2), None if masks is None else masks.flip(2)
    top, left = (
        int(share * (max(own, side) - side + 1)) for share, own, side in zip(place, (tall, wide), size, strict=True)
    )
    room = (0, max(size[1] - wide, 0), 0, max(size[0] - tall, 0))
    image = F.pad(image, room, value=GROUND)[:, top : top + size[0], left : left + size[1]]
    boxes = _inside(before - torch.tensor([left, top, left, top]), size)
    kept = candidates(before, boxes, LEAST_OVER)
    if not kept.any():
        return record
    if masks is not None and record.masks is not None:
        masks = F.pad(masks, room)[:, top : top + size[0], left : left + size[1]]
        masks = torch.cat([record.masks, masks[kept]])
    return replace(
        record,
        image=((record.image.int() + image.int()) // 2).to(torch.uint8),
        boxes=torch.cat([record.boxes, boxes[kept]]),
        labels=torch.cat([record.labels, ground.labels[kept]]),
        masks=masks,
    )


def candidates(before: Tensor, after: Tensor, least: float) -> Tensor:
    """Return of which things enough is left: `[n]` bool.

    Args:
        before: `[n, 4]`.
        after: `[n, 4]`, cut at the edges of the image.
        least: pixels that a side must have more of.

    Example:
        >>> box = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
        >>> candidates(box, torch.tensor([[0.0, 0.0, 10.0, 3.0]]), 2), candidates(box, box / 10, 2)
        (tensor([True]), tensor([False]))
    """
    sides, was = after[:, 2:] - after[:, :2], before[:, 2:] - before[:, :2]
    thin = sides.amax(dim=1) / sides.amin(dim=1).clamp(min=1e-16)
    return (sides > least).all(dim=1) & (sides.prod(dim=1) > AREA * was.prod(dim=1)) & (thin < ASPECT)


def _inside(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    return boxes.clamp(min=0).minimum(torch.tensor([size[1], size[0]]).repeat(2).to(boxes.dtype))
