# SPDX-License-Identifier: Apache-2.0
"""PKD: Pearson distillation for detectors (Cao et al. 2022).

Per level and channel z = (x - mean) / (std + eps) over samples and positions, std unbiased;
L = sum over levels of mean over all elements of (z_s - z_t)^2 / 2. Maps of different size: the student
(default) or the teacher is first resized bilinearly (half-pixel centres).
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def _bilinear(x: Array, height: int, width: int) -> Array:
    samples, channels, old_height, old_width = x.shape
    out = np.zeros((samples, channels, height, width), dtype=np.float64)
    for n, c, h, w in np.ndindex(*out.shape):
        row = max((h + 0.5) * old_height / height - 0.5, 0.0)
        col = max((w + 0.5) * old_width / width - 0.5, 0.0)
        top, left = int(row), int(col)
        bottom, right = min(top + 1, old_height - 1), min(left + 1, old_width - 1)
        down, across = row - top, col - left
        out[n, c, h, w] = (1.0 - down) * (
            (1.0 - across) * float(x[n, c, top, left]) + across * float(x[n, c, top, right])
        ) + down * ((1.0 - across) * float(x[n, c, bottom, left]) + across * float(x[n, c, bottom, right]))
    return out


def _standardised(x: Array, eps: float) -> Array:
    out = np.zeros(x.shape, dtype=np.float64)
    for c in range(x.shape[1]):
        values = [float(v) for v in x[:, c].flatten()]
        mean = math.fsum(values) / len(values)
        deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
        for n in range(x.shape[0]):
            for h in range(x.shape[2]):
                for w in range(x.shape[3]):
                    out[n, c, h, w] = (float(x[n, c, h, w]) - mean) / (deviation + eps)
    return out


def pkd(
    student_features: Sequence[Array],
    teacher_features: Sequence[Array],
    eps: float = 1e-6,
    resize_student: bool = True,
) -> float:
    """Return the sum over levels at unit weight."""
    total = 0.0
    for student, teacher in zip(student_features, teacher_features, strict=True):
        if student.shape[2:] != teacher.shape[2:]:
            if resize_student:
                student = _bilinear(student, teacher.shape[2], teacher.shape[3])
            else:
                teacher = _bilinear(teacher, student.shape[2], student.shape[3])
        left, right = _standardised(student, eps), _standardised(teacher, eps)
        squares = 0.0
        for index in np.ndindex(*left.shape):
            squares += (float(left[index]) - float(right[index])) ** 2
        total += squares / left.size / 2.0
    return float(total)
