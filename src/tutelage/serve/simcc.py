# SPDX-License-Identifier: Apache-2.0
"""Crops of people, and points from the logits of both axes, with numpy alone: PyTorch is not imported here."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tutelage.functional import openpose
from tutelage.serve.yolox import bilinear

Array = NDArray[np.floating]
#: Of RTMPose's input, red, green and blue, in [0, 255].
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
PADDING, SPLIT = 1.25, 2.0


def with_area(boxes: Array) -> Array:
    """Return those of boxes `[P, 4]` that are numbers and have an area: of others there is nothing to cut out."""
    return boxes[np.isfinite(boxes).all(1) & (boxes[:, 2:] > boxes[:, :2]).all(1)]


def enlarged(boxes: Array, padding: float = PADDING) -> tuple[Array, Array]:
    """Return centres `[P, 2]`, and sides (width, height) times the padding `[P, 2]`."""
    low, high = boxes[:, :2], boxes[:, 2:]
    return (low + high) / 2, (high - low) * padding


def widened(sides: Array, size: tuple[int, int]) -> Array:
    """Return sides with the input's aspect ratio: the one that is too short grows.

    Args:
        sides: `[P, 2]` (width, height).
        size: (height, width) of the input.
    """
    aspect = size[1] / size[0]
    width = np.maximum(sides[:, 0], sides[:, 1] * aspect)
    return np.stack([width, width / aspect], 1)


def warp(centre: Array, sides: Array, size: tuple[int, int]) -> Array:
    """Return `[P, 2, 3]`, from the image to the input: a centre comes to (width / 2, height / 2)."""
    scale = size[1] / sides[:, 0]
    matrix = np.zeros((len(centre), 2, 3))
    matrix[:, 0, 0] = matrix[:, 1, 1] = scale
    matrix[:, :, 2] = np.array([size[1] / 2, size[0] / 2]) - scale[:, None] * centre
    return matrix


def crops(image: NDArray[np.uint8], matrix: Array, size: tuple[int, int]) -> NDArray[np.float32]:
    """Return `[P, h, w, 3]` in [0, 255]: what stands at each pixel of the input, black beyond the image."""
    x, y = np.meshgrid(np.arange(size[1]), np.arange(size[0]))
    found = [
        bilinear(image, (x - one[0, 2]) / one[0, 0], (y - one[1, 2]) / one[1, 1]) for one in np.asarray(matrix, float)
    ]
    return np.stack(found) if found else np.zeros((0, *size, 3), np.float32)


def whole(image: NDArray[Any]) -> Array:
    """Return the box of a whole image, `[1, 4]`."""
    return np.array([[0.0, 0.0, image.shape[1], image.shape[0]]])


def peaks(x: Array, y: Array, split: float = SPLIT) -> tuple[Array, Array]:
    """Return points in pixels of the input `[P, K, 2]` and scores `[P, K]`; see `tutelage.functional.simcc.decode`.

    Args:
        x: `[P, K, Wx]` logits.
        y: `[P, K, Wy]`.
        split: bins a pixel.
    """
    bins = [axis.argmax(-1) for axis in (x, y)]
    tops = [np.take_along_axis(axis, at[..., None], -1)[..., 0] for axis, at in zip((x, y), bins, strict=True)]
    scores = np.minimum(*tops)
    return np.where((scores > 0)[..., None], np.stack(bins, -1).astype(x.dtype), -1) / split, scores


def to_image(points: Array, centre: Array, sides: Array, size: tuple[int, int]) -> Array:
    """Return points of the input in the pixels of the image: p / size * sides + centre - sides / 2."""
    found = points / np.array([size[1], size[0]]) * sides[:, None] + (centre - sides / 2)[:, None]
    return np.asarray(found)


def to_openpose(points: Array, scores: Array, threshold: float = 0.3) -> tuple[Array, Array]:
    """Return keypoints in OpenPose's order, with a neck between the shoulders.

    Args:
        points: `[P, K, 2]`, K at least 17.
        scores: `[P, K]`.
        threshold: that the scores of both shoulders must exceed for the neck's score to be 1, else it is 0.
    """
    left, right = openpose.SHOULDERS
    neck = (points[:, left] + points[:, right]) / 2
    there = ((scores[:, left] > threshold) & (scores[:, right] > threshold)).astype(scores.dtype)
    points = np.insert(points, openpose.NECK, neck, axis=1)
    scores = np.insert(scores, openpose.NECK, there, axis=1)
    order = list(openpose.order(points.shape[1] - 1))
    return points[:, order], scores[:, order]
