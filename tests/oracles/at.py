# SPDX-License-Identifier: Apache-2.0
"""AT: attention transfer (Zagoruyko and Komodakis 2017).

Per sample Q(f) = vec over positions of mean_c |f|^p and q = Q / max(||Q||_2, 1e-12). When the heights differ,
the taller map is first average-pooled to the square of the smaller height.

* form "code":  L = sum over layers of the mean over batch and positions of (q_s - q_t)^2;
* form "paper": L = sum over layers of the batch mean of ||q_s - q_t||_2 (the paper's beta / 2 is left out);
* form "sum_eps": code form with the channel SUM and q = Q / (||Q||_2 + 1e-6).
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def _adaptive_pool(x: Array, size: int) -> Array:
    samples, channels, height, width = x.shape
    out = np.zeros((samples, channels, size, size), dtype=np.float64)
    for n, c, i, j in np.ndindex(*out.shape):
        rows = range(i * height // size, -(-(i + 1) * height // size))
        cols = range(j * width // size, -(-(j + 1) * width // size))
        total = math.fsum(float(x[n, c, h, w]) for h in rows for w in cols)
        out[n, c, i, j] = total / (len(rows) * len(cols))
    return out


def attention(features: Array, power: float, form: str) -> list[list[float]]:
    """Return the normalised attention vector of every sample."""
    samples, channels, height, width = features.shape
    maps: list[list[float]] = []
    for n in range(samples):
        row: list[float] = []
        for h in range(height):
            for w in range(width):
                total = math.fsum(abs(float(features[n, c, h, w])) ** power for c in range(channels))
                row.append(total if form == "sum_eps" else total / channels)
        norm = math.sqrt(math.fsum(v * v for v in row))
        divisor = norm + 1e-6 if form == "sum_eps" else max(norm, 1e-12)
        maps.append([v / divisor for v in row])
    return maps


def at(
    student_features: Sequence[Array],
    teacher_features: Sequence[Array],
    power: float = 2.0,
    form: str = "code",
) -> float:
    """Return the sum over layers of the chosen distance."""
    total = 0.0
    for student, teacher in zip(student_features, teacher_features, strict=True):
        if student.shape[2] > teacher.shape[2]:
            student = _adaptive_pool(student, teacher.shape[2])
        elif student.shape[2] < teacher.shape[2]:
            teacher = _adaptive_pool(teacher, student.shape[2])
        pairs = list(zip(attention(student, power, form), attention(teacher, power, form), strict=True))
        layer = 0.0
        for student_row, teacher_row in pairs:
            squares = math.fsum((a - b) ** 2 for a, b in zip(student_row, teacher_row, strict=True))
            if form in ("code", "sum_eps"):
                layer += squares / len(student_row)
            elif form == "paper":
                layer += math.sqrt(squares)
            else:
                raise ValueError(form)
        total += layer / len(pairs)
    return float(total)
