# SPDX-License-Identifier: Apache-2.0
"""tf-NKD: the teacher-free form of NKD.

For each target column j (one for hard labels with v = 1; two for soft labels, the two largest with their
values) and p = softmax(s): w_{n,j} = p_{n,c_j} + v_{n,j} - mean_n p_{n,c_j}, constant, 0 where v_{n,j} = 0
(the batch mean still counts such rows), and L = sum_j -1/N sum_n w_{n,j} log p_{n,c_j}.
"""

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


def _log_probability(row: Array, index: int) -> float:
    values = [float(v) for v in row]
    top = max(values)
    return values[index] - top - math.log(math.fsum(math.exp(v - top) for v in values))


def tf_nkd(student_logits: Array, target_index: Labels, target_value: Array) -> dict[str, float]:
    """Return "target_0", "target_1", ... and their sum "loss"; index and value are (N,J)."""
    samples, columns = target_index.shape
    parts: dict[str, float] = {}
    for j in range(columns):
        log_p = [_log_probability(student_logits[n], int(target_index[n, j])) for n in range(samples)]
        mean = math.fsum(math.exp(v) for v in log_p) / samples
        total = 0.0
        for n in range(samples):
            value = float(target_value[n, j])
            weight = math.exp(log_p[n]) + value - mean if value != 0.0 else 0.0
            total -= weight * log_p[n]
        parts[f"target_{j}"] = float(total / samples)
    parts["loss"] = math.fsum(parts.values())
    return parts
