# SPDX-License-Identifier: Apache-2.0
"""DKD: decoupled knowledge distillation (Zhao et al. 2022).

p = softmax(z / T), b = (p_y, 1 - p_y), q = softmax over the C - 1 non-target logits at T.
TCKD = T^2 / N sum_n KL(b_t || b_s), NCKD = T^2 / N sum_n KL(q_t || q_s), L = alpha TCKD + beta NCKD.
The original schedule multiplies L by min(epoch / warmup_epochs, 1), epochs counted from 1.
"""

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


def _log_sum_exp(values: list[float]) -> float:
    top = max(values)
    return top + math.log(math.fsum(math.exp(v - top) for v in values))


def _kl(log_p: list[float], log_q: list[float]) -> float:
    total = 0.0
    for a, b in zip(log_p, log_q, strict=True):
        if math.exp(a) > 0.0:  # p log p is 0 at p = 0
            total += math.exp(a) * (a - b)
    return total


def _binary(row: list[float], y: int) -> list[float]:
    others = [v for c, v in enumerate(row) if c != y]
    everything = _log_sum_exp(row)
    return [row[y] - everything, _log_sum_exp(others) - everything]


def _others(row: list[float], y: int) -> list[float]:
    others = [v for c, v in enumerate(row) if c != y]
    return [v - _log_sum_exp(others) for v in others]


def dkd(
    student_logits: Array,
    teacher_logits: Array,
    target: Labels,
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> dict[str, float]:
    """Return "tckd" and "nckd" at unit weight (T^2 / N included) and "loss" = alpha tckd + beta nckd."""
    samples, classes = student_logits.shape
    tckd = 0.0
    nckd = 0.0
    for n in range(samples):
        y = int(target[n])
        student = [float(student_logits[n, c]) / temperature for c in range(classes)]
        teacher = [float(teacher_logits[n, c]) / temperature for c in range(classes)]
        tckd += _kl(_binary(teacher, y), _binary(student, y))
        nckd += _kl(_others(teacher, y), _others(student, y))
    scale = float(temperature**2 / samples)
    return {"tckd": scale * tckd, "nckd": scale * nckd, "loss": scale * (alpha * tckd + beta * nckd)}


def warmup(epoch: int, warmup_epochs: int = 20) -> float:
    """Return the factor of the original schedule; the first epoch is 1."""
    return min(epoch / warmup_epochs, 1.0)
