# SPDX-License-Identifier: Apache-2.0
"""FSP: flow of the solution procedure (Yim et al. 2017).

For consecutive maps a, b of one network the larger is pooled to the smaller, G_cd = 1/(H W) sum_hw a_c b_d.

* form "paper": max pooling, L = 1/N sum over samples, layer pairs (weight 1) and entries of (G_s - G_t)^2;
* form "mean": average pooling, L = sum over layer pairs of the mean over samples, entries of (G_s - G_t)^2;
* form "columns": max pooling, L = 1/N sum over samples, layer pairs and channels d of b of
  ||(G_s - G_t)_{:,d}||_2, the norm running over the channels of a.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def _pool(x: Array, height: int, width: int, largest: bool) -> Array:
    samples, channels, tall, wide = x.shape
    out = np.zeros((samples, channels, height, width), dtype=np.float64)
    for n, c, i, j in np.ndindex(*out.shape):
        rows = range(i * tall // height, -(-(i + 1) * tall // height))
        cols = range(j * wide // width, -(-(j + 1) * wide // width))
        cells = [float(x[n, c, h, w]) for h in rows for w in cols]
        out[n, c, i, j] = max(cells) if largest else math.fsum(cells) / len(cells)
    return out


def flow(a: Array, b: Array, largest: bool) -> Array:
    """Return G (B, C_a, C_b)."""
    if a.shape[2] > b.shape[2]:
        a = _pool(a, b.shape[2], b.shape[3], largest)
    elif a.shape[2] < b.shape[2]:
        b = _pool(b, a.shape[2], a.shape[3], largest)
    samples, channels, height, width = a.shape
    out = np.zeros((samples, channels, b.shape[1]), dtype=np.float64)
    for n, c, d in np.ndindex(*out.shape):
        out[n, c, d] = math.fsum(
            float(a[n, c, h, w]) * float(b[n, d, h, w]) for h in range(height) for w in range(width)
        ) / (height * width)
    return out


def fsp(
    student_features: Sequence[Array],
    teacher_features: Sequence[Array],
    form: str = "paper",
) -> float:
    """Return the loss over all consecutive pairs of maps."""
    largest = form != "mean"
    total = 0.0
    for i in range(len(student_features) - 1):
        student = flow(student_features[i], student_features[i + 1], largest)
        teacher = flow(teacher_features[i], teacher_features[i + 1], largest)
        samples, left, right = student.shape
        squares = np.zeros(student.shape, dtype=np.float64)
        for index in np.ndindex(*student.shape):
            squares[index] = (float(student[index]) - float(teacher[index])) ** 2
        cells = [(n, c, d) for n in range(samples) for c in range(left) for d in range(right)]
        if form == "paper":
            total += math.fsum(float(squares[cell]) for cell in cells) / samples
        elif form == "mean":
            total += math.fsum(float(squares[cell]) for cell in cells) / len(cells)
        elif form == "columns":
            for n in range(samples):
                for d in range(right):
                    total += math.sqrt(math.fsum(float(squares[n, c, d]) for c in range(left))) / samples
        else:
            raise ValueError(form)
    return float(total)
