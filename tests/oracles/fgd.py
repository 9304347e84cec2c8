# SPDX-License-Identifier: Apache-2.0
"""Focal and global distillation (FGD) of one pyramid level, by loops over images, boxes, cells and channels.

L = alpha L_fg + beta L_bg + gamma L_at + lambda L_rel, where S is the student's map, aligned by a 1x1 convolution
with bias if widths differ, and F the teacher's:

* attention at temperature T: spatial A^S(X) = H W softmax over positions of mean_c |X| / T, channel
  A^C(X) = C softmax over channels of mean_hw |X| / T;
* a box covers the cells floor(lower) .. ceil(upper), both included, of its edges scaled to the map by the
  unpadded image size; a covered cell holds 1 / (rows * columns) of that span, clipped or not, the largest where
  boxes overlap; background cells hold 1 / (number of background cells of the image);
* L_fg, L_bg = 1/N sum M (S - F)^2 A^S(F) A^C(F);
* L_at = 1/N ( sum |A^C(S) - A^C(F)| + sum |A^S(S) - A^S(F)| );
* L_rel = 1/N sum ( R_s(S) - R_t(F) )^2, R(X) = X + V2 ReLU LN V1 ( sum over positions of softmax(k X) X ).
"""

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
LAYER_NORM_EPS = 1e-5


def aligned(student: Array, weights: Mapping[str, Array]) -> Array:
    """Return the student's map at the teacher's width."""
    if "align.weight" not in weights:
        return student
    weight, bias = weights["align.weight"], weights["align.bias"]
    images, channels, height, width = student.shape
    out = np.zeros((images, weight.shape[0], height, width))
    for n, o, y, x in np.ndindex(*out.shape):
        value = float(bias[o])
        for c in range(channels):
            value += float(weight[o, c, 0, 0]) * float(student[n, c, y, x])
        out[n, o, y, x] = value
    return out


def masks(
    boxes: Array, box_image: npt.NDArray[np.int64], image_size: Array, height: int, width: int
) -> tuple[Array, Array]:
    """Return foreground and background, both (N, H, W); image_size holds (height, width) without padding."""
    images = len(image_size)
    foreground, background = np.zeros((images, height, width)), np.zeros((images, height, width))
    for image in range(images):
        tall, wide = float(image_size[image][0]), float(image_size[image][1])
        for box, owner in zip(boxes, box_image, strict=True):
            if int(owner) != image:
                continue
            first_x = math.floor(float(box[0]) * width / wide)
            first_y = math.floor(float(box[1]) * height / tall)
            last_x = math.ceil(float(box[2]) * width / wide)
            last_y = math.ceil(float(box[3]) * height / tall)
            value = 1.0 / ((last_y + 1 - first_y) * (last_x + 1 - first_x))
            for y in range(first_y, last_y + 1):
                for x in range(first_x, last_x + 1):
                    if 0 <= y < height and 0 <= x < width:
                        foreground[image, y, x] = max(foreground[image, y, x], value)
        empty = 0
        for y, x in np.ndindex(height, width):
            if foreground[image, y, x] == 0.0:
                background[image, y, x] = 1.0
                empty += 1
        if empty:
            for y, x in np.ndindex(height, width):
                background[image, y, x] /= empty
    return foreground, background


def _softmax(values: list[float]) -> list[float]:
    top = max(values)
    powers = [math.exp(value - top) for value in values]
    total = math.fsum(powers)
    return [power / total for power in powers]


def attention(feature_map: Array, temperature: float) -> tuple[Array, Array]:
    """Return spatial (N, H, W) and channel (N, C) attention."""
    images, channels, height, width = feature_map.shape
    spatial, by_channel = np.zeros((images, height, width)), np.zeros((images, channels))
    for n in range(images):
        means = []
        for y, x in np.ndindex(height, width):
            means.append(sum(abs(float(feature_map[n, c, y, x])) for c in range(channels)) / channels / temperature)
        for place, share in zip(np.ndindex(height, width), _softmax(means), strict=True):
            spatial[(n, *place)] = height * width * share
        means = []
        for c in range(channels):
            total = sum(abs(float(feature_map[n, c, y, x])) for y, x in np.ndindex(height, width))
            means.append(total / (height * width) / temperature)
        for c, share in enumerate(_softmax(means)):
            by_channel[n, c] = channels * share
    return spatial, by_channel


def _matrix(weight: Array, bias: Array, vector: list[float]) -> list[float]:
    return [
        float(bias[o]) + sum(float(weight[o, c, 0, 0]) * value for c, value in enumerate(vector))
        for o in range(weight.shape[0])
    ]


def related(feature_map: Array, weights: Mapping[str, Array], side: str) -> Array:
    """Return R(X) of the block whose weights are named ``context_{side}.*``."""
    at = {name: weights[f"context_{side}.{name}"] for name in (
        *("conv_mask.weight", "conv_mask.bias", "reduce.weight", "reduce.bias"),
        *("norm.weight", "norm.bias", "expand.weight", "expand.bias"),
    )}  # fmt: skip
    images, channels, height, width = feature_map.shape
    out = feature_map.astype(np.float64).copy()
    for n in range(images):
        scores = []
        for y, x in np.ndindex(height, width):
            pixel = [float(feature_map[n, c, y, x]) for c in range(channels)]
            scores.append(_matrix(at["conv_mask.weight"], at["conv_mask.bias"], pixel)[0])
        context = [0.0] * channels
        for (y, x), share in zip(np.ndindex(height, width), _softmax(scores), strict=True):
            for c in range(channels):
                context[c] += share * float(feature_map[n, c, y, x])
        hidden = _matrix(at["reduce.weight"], at["reduce.bias"], context)
        mean = math.fsum(hidden) / len(hidden)
        variance = math.fsum((value - mean) ** 2 for value in hidden) / len(hidden)
        scale, shift = at["norm.weight"].reshape(-1), at["norm.bias"].reshape(-1)
        hidden = [
            max(0.0, (value - mean) / math.sqrt(variance + LAYER_NORM_EPS) * float(scale[i]) + float(shift[i]))
            for i, value in enumerate(hidden)
        ]
        added = _matrix(at["expand.weight"], at["expand.bias"], hidden)
        for c, y, x in np.ndindex(channels, height, width):
            out[n, c, y, x] += added[c]
    return out


def fgd(
    student: Array,
    teacher: Array,
    boxes: Array,
    box_image: npt.NDArray[np.int64],
    image_size: Array,
    weights: Mapping[str, Array],
    temperature: float = 0.5,
    alpha: float = 1e-3,
    beta: float = 5e-4,
    gamma: float = 1e-3,
    lambda_: float = 5e-6,
) -> dict[str, float]:
    """Return the unweighted parts "fg", "bg", "attention", "relation", and their weighted sum "loss"."""
    ours = aligned(student, weights)
    images, channels, height, width = teacher.shape
    foreground, background = masks(boxes, box_image, image_size, height, width)
    our_places, our_channels = attention(ours, temperature)
    their_places, their_channels = attention(teacher, temperature)
    one, other = related(ours, weights, "student"), related(teacher, weights, "teacher")
    parts = {"fg": 0.0, "bg": 0.0, "attention": 0.0, "relation": 0.0}
    for n, c, y, x in np.ndindex(images, channels, height, width):
        error = (float(ours[n, c, y, x]) - float(teacher[n, c, y, x])) ** 2
        error *= float(their_places[n, y, x]) * float(their_channels[n, c])
        parts["fg"] += float(foreground[n, y, x]) * error / images
        parts["bg"] += float(background[n, y, x]) * error / images
        parts["relation"] += (float(one[n, c, y, x]) - float(other[n, c, y, x])) ** 2 / images
    for index in np.ndindex(images, channels):
        parts["attention"] += abs(float(our_channels[index]) - float(their_channels[index])) / images
    for place in np.ndindex(images, height, width):
        parts["attention"] += abs(float(our_places[place]) - float(their_places[place])) / images
    total = alpha * parts["fg"] + beta * parts["bg"] + gamma * parts["attention"] + lambda_ * parts["relation"]
    return {**parts, "loss": total}
