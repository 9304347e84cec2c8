# SPDX-License-Identifier: Apache-2.0
"""People from the raw answers of a YOLOX detector, with numpy alone.

PyTorch is not imported here, nor in any other file of this folder that says so.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
STRIDES = (8, 16, 32)
GREY = 114  # beyond the image


def letterbox(image: NDArray[np.uint8], size: tuple[int, int], fill: int = GREY) -> tuple[NDArray[np.float32], float]:
    """Return an image enlarged or made smaller to fit, at the top left of a grey one, and the factor.

    Args:
        image: `[H, W, 3]` uint8.
        size: (height, width) of the detector's input.
        fill: of what is beyond the image.

    Returns:
        `[3, h, w]` float32 in [0, 255], not normalised.
    """
    ratio = min(size[0] / image.shape[0], size[1] / image.shape[1])
    height, width = (int(side * ratio) for side in image.shape[:2])
    padded = np.full((*size, 3), fill, dtype=np.float32)
    padded[:height, :width] = resized(image, (height, width))
    return np.ascontiguousarray(padded.transpose(2, 0, 1)), ratio


def resized(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.float32]:
    """Return an image in another size, bilinear between the centres of pixels."""
    rows, columns = (
        ((np.arange(goal) + 0.5) * side / goal - 0.5).clip(0, side - 1)
        for goal, side in zip(size, image.shape[:2], strict=True)
    )
    return bilinear(image, *np.meshgrid(columns, rows))


def bilinear(image: NDArray[np.uint8], x: Array, y: Array) -> NDArray[np.float32]:
    """Return what stands at points of an image, `[h, w, C]`; black beyond it.

    Args:
        image: `[H, W, C]` uint8.
        x: `[h, w]` in pixels, whole numbers at their centres.
        y: `[h, w]`.
    """
    height, width = image.shape[:2]
    left, top = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
    across, down = (x - left)[..., None].astype(np.float32), (y - top)[..., None].astype(np.float32)
    found = np.zeros((*x.shape, image.shape[2]), dtype=np.float32)
    for dy, wy in ((0, 1 - down), (1, down)):
        for dx, wx in ((0, 1 - across), (1, across)):
            row, column = top + dy, left + dx
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            pixels = image[row.clip(0, height - 1), column.clip(0, width - 1)]
            found += wy * wx * inside[..., None] * pixels
    return found


def decoded(raw: Array, size: tuple[int, int], strides: Sequence[int] = STRIDES) -> Array:
    """Return boxes in pixels of the input: centre (xy + cell) * stride, sides exp(wh) * stride.

    Args:
        raw: `[A, 5 + C]` x, y, w, h, objectness, classes, finest level first.
        size: (height, width) of the input.
        strides: of the levels.

    Raises:
        ValueError: if the rows are not those of this input.
    """
    cells, steps = [], []
    for stride in strides:
        height, width = size[0] // stride, size[1] // stride
        x, y = np.meshgrid(np.arange(width), np.arange(height))
        cells.append(np.stack([x, y], 2).reshape(-1, 2))
        steps.append(np.full((height * width, 1), stride))
    cell, step = np.concatenate(cells), np.concatenate(steps)
    if len(cell) != len(raw):
        raise ValueError(f"the detector gave {len(raw)} boxes; an input of {size[0]} x {size[1]} has {len(cell)}")
    centre = (raw[:, :2] + cell) * step
    sides = np.exp(raw[:, 2:4]) * step
    return np.concatenate([centre, sides, raw[:, 4:]], 1).astype(raw.dtype)


def corners(rows: Array, ratio: float = 1.0) -> tuple[Array, Array]:
    """Return boxes x1, y1, x2, y2 in the image, and scores objectness * class.

    Args:
        rows: `[A, 5 + C]`, see `decoded`.
        ratio: of `letterbox`.
    """
    centre, half = rows[:, :2], rows[:, 2:4] / 2
    boxes = np.concatenate([centre - half, centre + half], 1) / ratio
    return boxes, rows[:, 4:5] * rows[:, 5:]


def overlaps(box: Array, boxes: Array) -> Array:
    """Return the intersection over union of one box with others; sides count the pixels at both ends."""
    low, high = np.maximum(box[:2], boxes[:, :2]), np.minimum(box[2:], boxes[:, 2:])
    shared = np.maximum(high - low + 1, 0).prod(1)
    area = (box[2:] - box[:2] + 1).prod() + (boxes[:, 2:] - boxes[:, :2] + 1).prod(1)
    return np.asarray(shared / (area - shared))


def suppressed(boxes: Array, scores: Array, threshold: float) -> NDArray[np.int64]:
    """Return which boxes stay, best first: none that overlaps a better one by more than the threshold."""
    order = scores.argsort()[::-1]
    kept = []
    while len(order):
        best, rest = order[0], order[1:]
        kept.append(best)
        order = rest[overlaps(boxes[best], boxes[rest]) <= threshold]
    return np.array(kept, dtype=np.int64)


def detections(boxes: Array, scores: Array, *, overlap: float = 0.45, least: float = 0.1) -> NDArray[np.float64]:
    """Return `[D, 6]` x1, y1, x2, y2, score, class: class after class, best first.

    Args:
        boxes: `[A, 4]`.
        scores: `[A, C]`.
        overlap: from which the worse of two boxes of a class goes.
        least: score that a box must exceed.
    """
    found = [np.zeros((0, 6))]
    for number in range(scores.shape[1]):
        likely = scores[:, number] > least
        mine, score = boxes[likely], scores[likely, number]
        stay = suppressed(mine, score, overlap)
        found.append(np.concatenate([mine[stay], score[stay, None], np.full((len(stay), 1), number)], 1))
    return np.concatenate(found)


def people(found: NDArray[np.float64], *, least: float = 0.3, person: int = 0) -> NDArray[np.float64]:
    """Return the boxes `[P, 4]` of one class with a score above the threshold."""
    return found[(found[:, 4] > least) & (found[:, 5] == person), :4]
