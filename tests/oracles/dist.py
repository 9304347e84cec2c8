# SPDX-License-Identifier: Apache-2.0
"""DIST: distillation from a stronger teacher (Huang et al. 2022).

p = softmax(s / tau), q = softmax(t / tau),
rho(a, b) = <a - mean a, b - mean b> / (||a - mean a|| ||b - mean b|| + eps).
inter = tau^2 (1 - mean over samples of rho(p_i, q_i)), intra = tau^2 (1 - mean over classes of rho(p_:c,
q_:c)), L = beta inter + gamma intra. ``form="clamped"`` divides by max(||.||, eps) max(||.||, eps) instead.
"""

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def _softmax(logits: Array, tau: float) -> list[list[float]]:
    rows: list[list[float]] = []
    for n in range(logits.shape[0]):
        values = [float(v) / tau for v in logits[n]]
        top = max(values)
        powers = [math.exp(v - top) for v in values]
        mass = math.fsum(powers)
        rows.append([v / mass for v in powers])
    return rows


def pearson(a: list[float], b: list[float], eps: float = 1e-8, form: str = "product") -> float:
    """Return rho(a, b)."""
    mean_a, mean_b = math.fsum(a) / len(a), math.fsum(b) / len(b)
    norm_a = math.sqrt(math.fsum((x - mean_a) ** 2 for x in a))
    norm_b = math.sqrt(math.fsum((y - mean_b) ** 2 for y in b))
    inner = math.fsum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    if form == "product":
        return inner / (norm_a * norm_b + eps)
    if form == "clamped":
        return inner / (max(norm_a, eps) * max(norm_b, eps))
    raise ValueError(form)


def dist(
    student_logits: Array,
    teacher_logits: Array,
    tau: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
    eps: float = 1e-8,
    form: str = "product",
) -> dict[str, float]:
    """Return "inter" and "intra" (tau^2 included) and the weighted "loss"."""
    samples, classes = student_logits.shape
    p, q = _softmax(student_logits, tau), _softmax(teacher_logits, tau)
    inter = 0.0
    for n in range(samples):
        inter += pearson(p[n], q[n], eps, form)
    intra = 0.0
    for c in range(classes):
        column_p = [p[n][c] for n in range(samples)]
        column_q = [q[n][c] for n in range(samples)]
        intra += pearson(column_p, column_q, eps, form)
    inter = float(tau**2 * (1.0 - inter / samples))
    intra = float(tau**2 * (1.0 - intra / classes))
    return {"inter": inter, "intra": intra, "loss": beta * inter + gamma * intra}
