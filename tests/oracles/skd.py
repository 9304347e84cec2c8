# SPDX-License-Identifier: Apache-2.0
"""SKD: structured distillation for segmentation (Liu et al. 2019).

* pair-wise: max-pool with kernel = stride = int(size * scale) (ceil mode, per axis), divide every position's
  channel vector by (its norm + 1e-8), the norm constant; A_ij = <f_i, f_j> over positions;
  L = 1/B sum_n sum_ij (A_s - A_t)_ij^2 / P^2, P the number of positions;
* pixel-wise: L = sum over samples and pixels of -sum_c softmax(t)_c log softmax(s)_c, divided by H W only
  (form "code") or by N H W (form "mean").
"""

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def _pooled(features: Array, n: int, scale: float) -> list[list[float]]:
    _, channels, height, width = features.shape
    kernel_h, kernel_w = int(height * scale), int(width * scale)
    vectors: list[list[float]] = []
    for top in range(0, height, kernel_h):
        for left in range(0, width, kernel_w):
            rows = range(top, min(top + kernel_h, height))
            cols = range(left, min(left + kernel_w, width))
            vector = [max(float(features[n, c, h, w]) for h in rows for w in cols) for c in range(channels)]
            vectors.append(vector)
    return vectors


def pairwise(student_features: Array, teacher_features: Array, scale: float = 0.5) -> float:
    """Return the pair-wise term at unit weight."""
    samples = student_features.shape[0]
    total = 0.0
    for n in range(samples):
        sides: list[list[list[float]]] = []
        for features in (student_features, teacher_features):
            units: list[list[float]] = []
            for vector in _pooled(features, n, scale):
                norm = math.sqrt(math.fsum(v * v for v in vector)) + 1e-8
                units.append([v / norm for v in vector])
            sides.append(units)
        student, teacher = sides
        positions = len(student)
        for i in range(positions):
            for j in range(positions):
                left = math.fsum(a * b for a, b in zip(student[i], student[j], strict=True))
                right = math.fsum(a * b for a, b in zip(teacher[i], teacher[j], strict=True))
                total += (left - right) ** 2 / positions**2
    return float(total / samples)


def pixelwise(student_logits: Array, teacher_logits: Array, form: str = "code") -> float:
    """Return the pixel-wise term at unit weight."""
    samples, classes, height, width = student_logits.shape
    total = 0.0
    for n in range(samples):
        for h in range(height):
            for w in range(width):
                student = [float(v) for v in student_logits[n, :, h, w]]
                teacher = [float(v) for v in teacher_logits[n, :, h, w]]
                student_top, teacher_top = max(student), max(teacher)
                lse = student_top + math.log(math.fsum(math.exp(v - student_top) for v in student))
                mass = math.fsum(math.exp(v - teacher_top) for v in teacher)
                for c in range(classes):
                    total -= math.exp(teacher[c] - teacher_top) / mass * (student[c] - lse)
    divisor = {"code": height * width, "mean": samples * height * width}[form]
    return float(total / divisor)
