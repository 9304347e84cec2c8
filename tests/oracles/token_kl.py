# SPDX-License-Identifier: Apache-2.0
"""Token-level divergences for language models (the family compared by DistiLLM, Ko et al. 2024).

p teacher, q student over the vocabulary at one position; every loss is the mean over positions whose label is
not the ignored one (labels are aligned with the logits).

* forward:        KL(p || q), or -sum p log q (form "cross_entropy", the released code)
* reverse:        KL(q || p)
* symmetric:      (1-a) forward + a reverse (forward in the same form)
* total variation: 1/2 sum |p - q|
* js:             a KL(q || m) + (1-a) KL(p || m), m = (1-a) p + a q
* skewed forward: KL(p || l p + (1-l) q), or -sum p log(l p + (1-l) q) (form "cross_entropy")
* skewed reverse: KL(q || (1-l) p + l q)

An entry where either logit is -inf (a masked vocabulary) contributes 0 to every sum.
"""

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]

Rows = list[tuple[list[float], list[float]]]


def _log_softmax(row: Array) -> list[float]:
    values = [float(v) for v in row]
    top = max(values)
    lse = top + math.log(math.fsum(math.exp(v - top) for v in values))
    return [v - lse for v in values]


def _kept(student_logits: Array, teacher_logits: Array, labels: Labels, ignore_index: int) -> Rows:
    rows: Rows = []
    for b in range(labels.shape[0]):
        for i in range(labels.shape[1]):
            if int(labels[b, i]) == ignore_index:
                continue
            log_p, log_q = _log_softmax(teacher_logits[b, i]), _log_softmax(student_logits[b, i])
            both = [c for c in range(len(log_p)) if math.isfinite(log_p[c]) and math.isfinite(log_q[c])]
            rows.append(([log_p[c] for c in both], [log_q[c] for c in both]))
    return rows


def _mixture(log_a: float, weight_a: float, log_b: float, weight_b: float) -> float:
    terms = [math.log(weight) + value for value, weight in ((log_a, weight_a), (log_b, weight_b)) if weight > 0.0]
    top = max(terms)
    return top + math.log(math.fsum(math.exp(v - top) for v in terms))


def forward_kl(
    student_logits: Array, teacher_logits: Array, labels: Labels, ignore_index: int = -100, form: str = "kl"
) -> float:
    """Return the forward divergence; ``form`` is "kl" or "cross_entropy"."""
    return skewed_forward_kl(student_logits, teacher_logits, labels, 0.0, ignore_index, form)


def reverse_kl(student_logits: Array, teacher_logits: Array, labels: Labels, ignore_index: int = -100) -> float:
    """Return the reverse divergence."""
    return skewed_reverse_kl(student_logits, teacher_logits, labels, 0.0, ignore_index)


def symmetric_kl(
    student_logits: Array,
    teacher_logits: Array,
    labels: Labels,
    a: float = 0.5,
    ignore_index: int = -100,
    form: str = "kl",
) -> float:
    """Return (1-a) forward + a reverse."""
    forward = forward_kl(student_logits, teacher_logits, labels, ignore_index, form)
    return (1.0 - a) * forward + a * reverse_kl(student_logits, teacher_logits, labels, ignore_index)


def total_variation(student_logits: Array, teacher_logits: Array, labels: Labels, ignore_index: int = -100) -> float:
    """Return half the L1 distance."""
    rows = _kept(student_logits, teacher_logits, labels, ignore_index)
    total = 0.0
    for log_p, log_q in rows:
        total += 0.5 * math.fsum(abs(math.exp(x) - math.exp(y)) for x, y in zip(log_p, log_q, strict=True))
    return float(total / len(rows))


def js(
    student_logits: Array,
    teacher_logits: Array,
    labels: Labels,
    a: float = 0.5,
    ignore_index: int = -100,
) -> float:
    """Return the Jensen-Shannon form whose mixture puts weight a on the student."""
    rows = _kept(student_logits, teacher_logits, labels, ignore_index)
    total = 0.0
    for log_p, log_q in rows:
        for x, y in zip(log_p, log_q, strict=True):
            log_m = _mixture(x, 1.0 - a, y, a)
            total += a * math.exp(y) * (y - log_m) + (1.0 - a) * math.exp(x) * (x - log_m)
    return float(total / len(rows))


def skewed_forward_kl(
    student_logits: Array,
    teacher_logits: Array,
    labels: Labels,
    skew: float = 0.1,
    ignore_index: int = -100,
    form: str = "kl",
) -> float:
    """Return the forward divergence from the mixture; ``form`` is "kl" or "cross_entropy"."""
    rows = _kept(student_logits, teacher_logits, labels, ignore_index)
    total = 0.0
    for log_p, log_q in rows:
        for x, y in zip(log_p, log_q, strict=True):
            log_m = _mixture(x, skew, y, 1.0 - skew)
            if form == "kl":
                total += math.exp(x) * (x - log_m)
            elif form == "cross_entropy":
                total -= math.exp(x) * log_m
            else:
                raise ValueError(form)
    return float(total / len(rows))


def skewed_reverse_kl(
    student_logits: Array,
    teacher_logits: Array,
    labels: Labels,
    skew: float = 0.1,
    ignore_index: int = -100,
) -> float:
    """Return the reverse divergence from the mixture."""
    rows = _kept(student_logits, teacher_logits, labels, ignore_index)
    total = 0.0
    for log_p, log_q in rows:
        for x, y in zip(log_p, log_q, strict=True):
            total += math.exp(y) * (y - _mixture(x, 1.0 - skew, y, skew))
    return float(total / len(rows))
