# SPDX-License-Identifier: Apache-2.0
"""PKT: probabilistic knowledge transfer (Passalis and Tefas 2018).

n = g / (||g|| + eps), c_ij = (n_i . n_j + 1) / 2, p_ij = c_ij / sum_k c_ik (diagonal kept);
L = 1 / B^2 sum_ij p_t,ij log((p_t,ij + eps) / (p_s,ij + eps)).
"""

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def _affinities(features: Array, eps: float) -> list[list[float]]:
    units: list[list[float]] = []
    for n in range(features.shape[0]):
        row = [float(v) for v in features[n].flatten()]
        norm = math.sqrt(math.fsum(v * v for v in row)) + eps
        units.append([v / norm for v in row])
    matrix: list[list[float]] = []
    for a in units:
        line = [(math.fsum(x * y for x, y in zip(a, b, strict=True)) + 1.0) / 2.0 for b in units]
        mass = math.fsum(line)
        matrix.append([v / mass for v in line])
    return matrix


def pkt(student_features: Array, teacher_features: Array, eps: float = 1e-7) -> float:
    """Return the mean over the B^2 entries."""
    student, teacher = _affinities(student_features, eps), _affinities(teacher_features, eps)
    samples = len(student)
    total = 0.0
    for i in range(samples):
        for j in range(samples):
            total += teacher[i][j] * math.log((teacher[i][j] + eps) / (student[i][j] + eps))
    return float(total / samples**2)
