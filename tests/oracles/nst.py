# SPDX-License-Identifier: Apache-2.0
"""NST: neuron selectivity transfer (Huang and Wang 2017), second-order polynomial kernel.

x_k = channel k of a sample flattened over positions, divided by max(norm, 1e-12); k(x, y) = (x . y)^2.
L = sum over layers of mean k(t, t) + mean k(s, s) - 2 mean k(s, t), means over the batch and channel pairs.
When the heights differ, the taller map is first average-pooled to the square of the smaller height.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def _shrink(x: Array, size: int) -> Array:
    samples, channels, height, width = x.shape
    out = np.zeros((samples, channels, size, size), dtype=np.float64)
    for n, c, i, j in np.ndindex(*out.shape):
        rows = range(i * height // size, -(-(i + 1) * height // size))
        cols = range(j * width // size, -(-(j + 1) * width // size))
        total = math.fsum(float(x[n, c, h, w]) for h in rows for w in cols)
        out[n, c, i, j] = total / (len(rows) * len(cols))
    return out


def _channels(features: Array, n: int) -> list[list[float]]:
    vectors: list[list[float]] = []
    for c in range(features.shape[1]):
        row = [float(v) for v in features[n, c].flatten()]
        norm = max(math.sqrt(math.fsum(v * v for v in row)), 1e-12)
        vectors.append([v / norm for v in row])
    return vectors


def _mean_kernel(left: list[list[float]], right: list[list[float]]) -> float:
    total = 0.0
    for x in left:
        for y in right:
            dot = math.fsum(a * b for a, b in zip(x, y, strict=True))
            total += dot * dot
    return total / (len(left) * len(right))


def nst(student_features: Sequence[Array], teacher_features: Sequence[Array]) -> float:
    """Return the squared maximum mean discrepancy summed over layers."""
    total = 0.0
    for student, teacher in zip(student_features, teacher_features, strict=True):
        if student.shape[2] > teacher.shape[2]:
            student = _shrink(student, teacher.shape[2])
        elif student.shape[2] < teacher.shape[2]:
            teacher = _shrink(teacher, student.shape[2])
        samples = student.shape[0]
        for n in range(samples):
            s, t = _channels(student, n), _channels(teacher, n)
            total += (_mean_kernel(t, t) + _mean_kernel(s, s) - 2.0 * _mean_kernel(s, t)) / samples
    return float(total)
