# SPDX-License-Identifier: Apache-2.0
"""CTKD: curriculum temperature (Li et al. 2023).

T = T_0 + T_r sigmoid(g) with one learned number g (global form); L = T^2 / B sum_n KL(softmax(t/T) ||
softmax(s/T)), differentiable in T. The gradient into g is reversed and multiplied by lambda(e), which rises
from 0 to 1: cosine 1/2 (1 - cos(pi e / E)) or linear e / E for e <= E, then 1 (the code carries the sign, 0
to -1). Instance form: one T_i per sample, L = 1/B sum_i T_i^2 sum_c (p + 1e-7) (log(p + 1e-7) - log
softmax(s/T_i)), p = softmax(t/T_i).
"""

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def temperature(g: float, start: float = 1.0, span: float = 20.0) -> float:
    """Return T."""
    return start + span / (1.0 + math.exp(-g))


def strength(epoch: int, epochs: int = 10, form: str = "cosine") -> float:
    """Return lambda(epoch), between 0 and 1."""
    if epoch > epochs:
        return 1.0
    if form == "cosine":
        return 0.5 * (1.0 - math.cos(math.pi * epoch / epochs))
    if form == "linear":
        return epoch / epochs
    raise ValueError(form)


def _log_softmax(row: list[float]) -> list[float]:
    top = max(row)
    lse = top + math.log(math.fsum(math.exp(v - top) for v in row))
    return [v - lse for v in row]


def ctkd(
    student_logits: Array,
    teacher_logits: Array,
    g: float,
    start: float = 1.0,
    span: float = 20.0,
) -> float:
    """Return the global form at the learned temperature."""
    value = temperature(g, start, span)
    samples, classes = student_logits.shape
    total = 0.0
    for n in range(samples):
        log_s = _log_softmax([float(v) / value for v in student_logits[n]])
        log_t = _log_softmax([float(v) / value for v in teacher_logits[n]])
        for c in range(classes):
            total += math.exp(log_t[c]) * (log_t[c] - log_s[c])
    return float(value**2 * total / samples)


def reversed_gradient(
    student_logits: Array,
    teacher_logits: Array,
    g: float,
    factor: float,
    start: float = 1.0,
    span: float = 20.0,
) -> float:
    """Return -factor dL/dg of the global form, by the chain rule.

    With u = t/T, v = s/T, p = softmax(u), q = softmax(v): d log p_c / dT = (sum_k p_k u_k - u_c) / T, the
    same for q, and dL/dT = 2 T KL + T^2 dKL/dT per sample.
    """
    value = temperature(g, start, span)
    samples, classes = student_logits.shape
    slope = 0.0
    for n in range(samples):
        u = [float(x) / value for x in teacher_logits[n]]
        v = [float(x) / value for x in student_logits[n]]
        log_p, log_q = _log_softmax(u), _log_softmax(v)
        p, q = [math.exp(x) for x in log_p], [math.exp(x) for x in log_q]
        mean_u = math.fsum(p[c] * u[c] for c in range(classes))
        mean_v = math.fsum(q[c] * v[c] for c in range(classes))
        for c in range(classes):
            d_log_p = (mean_u - u[c]) / value
            d_log_q = (mean_v - v[c]) / value
            gap = log_p[c] - log_q[c]
            slope += 2.0 * value * p[c] * gap
            slope += value**2 * (p[c] * d_log_p * gap + p[c] * (d_log_p - d_log_q))
    sigmoid = 1.0 / (1.0 + math.exp(-g))
    return float(-factor * slope / samples * span * sigmoid * (1.0 - sigmoid))


def instance(student_logits: Array, teacher_logits: Array, temperatures: Array, eps: float = 1e-7) -> float:
    """Return the instance form with one temperature per sample."""
    samples, classes = student_logits.shape
    total = 0.0
    for n in range(samples):
        value = float(temperatures[n])
        log_s = _log_softmax([float(v) / value for v in student_logits[n]])
        log_t = _log_softmax([float(v) / value for v in teacher_logits[n]])
        for c in range(classes):
            p = math.exp(log_t[c]) + eps
            total += value**2 * p * (math.log(p) - log_s[c])
    return float(total / samples)
