# SPDX-License-Identifier: Apache-2.0
"""SimKD: the student borrows the teacher's classifier (Chen et al. 2022).

Projector P: conv1x1 (c_s -> c_t / f), conv3x3 (padding 1), conv1x1 (-> c_t), none with a bias, each followed
by batch norm (batch statistics) and ReLU. The taller map is first average-pooled to the square of the smaller
height. L = mean over all elements of (P(s) - t)^2. Prediction = W_t GAP(P(s)) + b_t.
"""

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def _pool_square(x: Array, size: int) -> Array:
    samples, channels, height, width = x.shape
    out = np.zeros((samples, channels, size, size), dtype=np.float64)
    for n, c, i, j in np.ndindex(*out.shape):
        rows = range(i * height // size, -(-(i + 1) * height // size))
        cols = range(j * width // size, -(-(j + 1) * width // size))
        total = math.fsum(float(x[n, c, h, w]) for h in rows for w in cols)
        out[n, c, i, j] = total / (len(rows) * len(cols))
    return out


def _layer(x: Array, kernel: Array, scale: Array, shift: Array, eps: float = 1e-5) -> Array:
    samples, channels, height, width = x.shape
    size = kernel.shape[2]
    out = np.zeros((samples, kernel.shape[0], height, width), dtype=np.float64)
    for n, o, h, w in np.ndindex(*out.shape):
        value = 0.0
        for dh in range(size):
            for dw in range(size):
                row, col = h + dh - size // 2, w + dw - size // 2
                if 0 <= row < height and 0 <= col < width:
                    for c in range(channels):
                        value += float(kernel[o, c, dh, dw]) * float(x[n, c, row, col])
        out[n, o, h, w] = value
    for o in range(kernel.shape[0]):
        values = [float(v) for v in out[:, o].flatten()]
        mean = math.fsum(values) / len(values)
        variance = math.fsum((v - mean) ** 2 for v in values) / len(values)
        for n in range(samples):
            for h in range(height):
                for w in range(width):
                    normal = (float(out[n, o, h, w]) - mean) / math.sqrt(variance + eps)
                    out[n, o, h, w] = max(normal * float(scale[o]) + float(shift[o]), 0.0)
    return out


def project(student_features: Array, teacher_features: Array, weights: Mapping[str, Array]) -> Array:
    """Return P(s) at the common size; keys transfer.{0,3,6}.weight and transfer.{1,4,7}.{weight,bias}."""
    x = student_features
    if x.shape[2] > teacher_features.shape[2]:
        x = _pool_square(x, teacher_features.shape[2])
    for conv, norm in ((0, 1), (3, 4), (6, 7)):
        x = _layer(
            x,
            weights[f"transfer.{conv}.weight"],
            weights[f"transfer.{norm}.weight"],
            weights[f"transfer.{norm}.bias"],
        )
    return x


def simkd(student_features: Array, teacher_features: Array, weights: Mapping[str, Array]) -> float:
    """Return the feature loss."""
    projected = project(student_features, teacher_features, weights)
    goal = teacher_features
    if goal.shape[2] > student_features.shape[2]:
        goal = _pool_square(goal, student_features.shape[2])
    total = 0.0
    for index in np.ndindex(*projected.shape):
        total += (float(projected[index]) - float(goal[index])) ** 2
    return float(total / projected.size)


def predict(projected: Array, weight: Array, bias: Array) -> Array:
    """Return the composed network's logits (N,C) from the teacher's classifier."""
    samples, channels, height, width = projected.shape
    logits = np.zeros((samples, weight.shape[0]), dtype=np.float64)
    for n in range(samples):
        pooled = [math.fsum(float(v) for v in projected[n, c].flatten()) / (height * width) for c in range(channels)]
        for k in range(weight.shape[0]):
            logits[n, k] = float(bias[k]) + math.fsum(float(weight[k, c]) * pooled[c] for c in range(channels))
    return logits
