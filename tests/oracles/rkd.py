# SPDX-License-Identifier: Apache-2.0
"""RKD: relational knowledge distillation (Park et al. 2019).

* distance: d_ij = sqrt(max(||e_i - e_j||^2, eps)), d_ii = 0, divided by the mean of the entries > 0 (each
  network by its own); L_D = mean over B^2 of huber(d_s - d_t), huber(x) = x^2 / 2 for |x| < 1,
  else |x| - 1/2;
* angle: psi_ijk = <u(e_j - e_i), u(e_k - e_i)>, u(x) = x / max(||x||, 1e-12); L_A = mean over B^3 of
  huber(psi_s - psi_t);
* L = 25 L_D + 50 L_A. ``squared`` skips the square root of the distances; ``normalise`` first divides every
  feature vector by its norm (another reading).
"""

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def _huber(x: float) -> float:
    return 0.5 * x * x if abs(x) < 1.0 else abs(x) - 0.5


def _rows(features: Array, normalise: bool) -> list[list[float]]:
    rows: list[list[float]] = []
    for n in range(features.shape[0]):
        row = [float(v) for v in features[n].flatten()]
        if normalise:
            norm = max(math.sqrt(math.fsum(v * v for v in row)), 1e-12)
            row = [v / norm for v in row]
        rows.append(row)
    return rows


def _distances(rows: list[list[float]], squared: bool, eps: float) -> list[list[float]]:
    matrix: list[list[float]] = []
    positive: list[float] = []
    for i in range(len(rows)):
        line: list[float] = []
        for j in range(len(rows)):
            if i == j:
                line.append(0.0)
                continue
            square = max(math.fsum((a - b) ** 2 for a, b in zip(rows[i], rows[j], strict=True)), eps)
            line.append(square if squared else math.sqrt(square))
            positive.append(line[-1])
        matrix.append(line)
    mean = math.fsum(positive) / len(positive)
    return [[v / mean for v in line] for line in matrix]


def distance(
    student_features: Array,
    teacher_features: Array,
    squared: bool = False,
    normalise: bool = False,
    eps: float = 1e-12,
) -> float:
    """Return the distance term at unit weight."""
    student = _distances(_rows(student_features, normalise), squared, eps)
    teacher = _distances(_rows(teacher_features, normalise), squared, eps)
    samples = len(student)
    total = 0.0
    for i in range(samples):
        for j in range(samples):
            total += _huber(student[i][j] - teacher[i][j])
    return float(total / samples**2)


def _angle(rows: list[list[float]], i: int, j: int, k: int) -> float:
    left = [a - b for a, b in zip(rows[j], rows[i], strict=True)]
    right = [a - b for a, b in zip(rows[k], rows[i], strict=True)]
    left_norm = max(math.sqrt(math.fsum(v * v for v in left)), 1e-12)
    right_norm = max(math.sqrt(math.fsum(v * v for v in right)), 1e-12)
    return math.fsum(a / left_norm * b / right_norm for a, b in zip(left, right, strict=True))


def angle(student_features: Array, teacher_features: Array, normalise: bool = False) -> float:
    """Return the angle term at unit weight."""
    student, teacher = _rows(student_features, normalise), _rows(teacher_features, normalise)
    samples = len(student)
    total = 0.0
    for i in range(samples):
        for j in range(samples):
            for k in range(samples):
                total += _huber(_angle(student, i, j, k) - _angle(teacher, i, j, k))
    return float(total / samples**3)


def rkd(
    student_features: Array,
    teacher_features: Array,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
    squared: bool = False,
    normalise: bool = False,
    eps: float = 1e-12,
) -> dict[str, float]:
    """Return "distance" and "angle" at unit weight and the weighted "loss"."""
    d = distance(student_features, teacher_features, squared, normalise, eps)
    a = angle(student_features, teacher_features, normalise)
    return {"distance": d, "angle": a, "loss": distance_weight * d + angle_weight * a}
