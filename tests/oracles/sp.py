# SPDX-License-Identifier: Apache-2.0
"""SP: similarity-preserving distillation (Tung and Mori 2019).

F = features flattened to (B, -1), A = F F^T, every row of A divided by its norm (floor 1e-12);
L = 1 / B^2 sum_ij (A_s - A_t)_ij^2. ``form="paper"`` uses the L2 norm; ``form="l1"`` the L1 norm (a published
slip of another reading).
"""

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def similarity(features: Array, form: str = "paper") -> Array:
    """Return the row-normalised B x B similarity matrix."""
    samples = features.shape[0]
    rows = [[float(v) for v in features[n].flatten()] for n in range(samples)]
    matrix = np.zeros((samples, samples), dtype=np.float64)
    for i in range(samples):
        for j in range(samples):
            matrix[i, j] = math.fsum(a * b for a, b in zip(rows[i], rows[j], strict=True))
    for i in range(samples):
        if form == "paper":
            norm = math.sqrt(math.fsum(float(v) ** 2 for v in matrix[i]))
        elif form == "l1":
            norm = math.fsum(abs(float(v)) for v in matrix[i])
        else:
            raise ValueError(form)
        for j in range(samples):
            matrix[i, j] /= max(norm, 1e-12)
    return matrix


def sp(student_features: Array, teacher_features: Array, form: str = "paper") -> float:
    """Return the squared Frobenius distance of the two similarity matrices over B^2."""
    student, teacher = similarity(student_features, form), similarity(teacher_features, form)
    samples = student.shape[0]
    total = 0.0
    for i in range(samples):
        for j in range(samples):
            total += (float(student[i, j]) - float(teacher[i, j])) ** 2
    return float(total / samples**2)
