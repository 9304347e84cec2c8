# SPDX-License-Identifier: Apache-2.0
"""GKD: generalised knowledge distillation (Agarwal et al. 2024), the generalised Jensen-Shannon divergence.

p = softmax(t / T), q = softmax(s / T), m = beta p + (1-beta) q per position;
D = beta KL(p || m) + (1-beta) KL(q || m); beta = 0 means KL(p || q) and beta = 1 means KL(q || p), unscaled.
No T^2.

Reductions: "tokens" sum over kept positions / their number, "sum", "elements" sum / (number kept times the
vocabulary), "batch" sum / B. A position is kept unless its label is the ignored one; no labels keep
everything.
"""

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


def _log_softmax(row: Array, temperature: float) -> list[float]:
    values = [float(v) / temperature for v in row]
    top = max(values)
    lse = top + math.log(math.fsum(math.exp(v - top) for v in values))
    return [v - lse for v in values]


def divergence(log_p: float, log_q: float, beta: float) -> float:
    """Return one vocabulary entry's share of D."""
    p, q = math.exp(log_p), math.exp(log_q)
    if beta == 0.0:
        return p * (log_p - log_q) if p > 0.0 else 0.0
    if beta == 1.0:
        return q * (log_q - log_p) if q > 0.0 else 0.0
    m = beta * p + (1.0 - beta) * q
    out = 0.0
    if p > 0.0:
        out += beta * p * (log_p - math.log(m))
    if q > 0.0:
        out += (1.0 - beta) * q * (log_q - math.log(m))
    return out


def gkd(
    student_logits: Array,
    teacher_logits: Array,
    labels: Labels | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "tokens",
    ignore_index: int = -100,
) -> float:
    """Return the reduced divergence of (B,L,V) logits."""
    batch, length, vocabulary = student_logits.shape
    total, kept = 0.0, 0
    for b in range(batch):
        for i in range(length):
            if labels is not None and int(labels[b, i]) == ignore_index:
                continue
            kept += 1
            log_p = _log_softmax(teacher_logits[b, i], temperature)
            log_q = _log_softmax(student_logits[b, i], temperature)
            for v in range(vocabulary):
                total += divergence(log_p[v], log_q[v], beta)
    divisor = {"tokens": kept, "sum": 1, "elements": kept * vocabulary, "batch": batch}[reduction]
    return float(total / divisor)
