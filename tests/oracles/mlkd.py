# SPDX-License-Identifier: Apache-2.0
"""MLKD: multi-level logit distillation (Jin et al. 2023) on a weak and a strong view.

P = softmax(z / T), T in (4, 3, 5, 2, 6). Item terms: instance T^2 / B sum_n KL(P_t,n || P_s,n); batch
||P_t P_t^T - P_s P_s^T||_F^2 / B; class ||P_t^T P_t - P_s^T P_s||_F^2 / C. With teacher weak-view
probabilities at T = 1: m_n = 1 where max_c is <= its median over samples, mc_c = 1 where sum_n is <= its
median over classes.

* form "code": f = mean m, fc = mean mc; kd = w [ f sum_T instance(weak) + sum over T = 4, 3, 5 of
  instance(strong) + sum over T = 2, 6 of instance(weak) ], class = w fc sum_T class(weak), batch = w f sum_T
  batch(weak);
* form "selected": the masks select instead of scaling. Weak instance terms keep the samples with m_n = 1,
  batch terms the rows n with m_n = 1, class terms the rows c with mc_c = 1 (divisors stay B, B, C), and the
  strong view uses its own logits at every T.
* ce = ce_weight (CE(weak) + CE(strong)); L = ce + kd + class + batch. ``standardise`` applies the instance
  terms to logits (z - mean) / (std + 1e-7), std with C - 1.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


def _log_softmax(row: list[float]) -> list[float]:
    top = max(row)
    lse = top + math.log(math.fsum(math.exp(v - top) for v in row))
    return [v - lse for v in row]


def _probabilities(logits: Array, temperature: float) -> list[list[float]]:
    return [
        [math.exp(v) for v in _log_softmax([float(x) / temperature for x in logits[n]])] for n in range(logits.shape[0])
    ]


def instance(
    student_logits: Array, teacher_logits: Array, temperature: float, mask: Sequence[float] | None = None
) -> float:
    """Return T^2 / B sum_n mask_n KL_n."""
    samples, classes = student_logits.shape
    total = 0.0
    for n in range(samples):
        log_s = _log_softmax([float(v) / temperature for v in student_logits[n]])
        log_t = _log_softmax([float(v) / temperature for v in teacher_logits[n]])
        weight = 1.0 if mask is None else mask[n]
        for c in range(classes):
            total += weight * math.exp(log_t[c]) * (log_t[c] - log_s[c])
    return float(temperature**2 * total / samples)


def batch(
    student_logits: Array, teacher_logits: Array, temperature: float, mask: Sequence[float] | None = None
) -> float:
    """Return 1/B sum_n mask_n sum_m (G_t - G_s)_nm^2, G = P P^T."""
    samples = student_logits.shape[0]
    s, t = _probabilities(student_logits, temperature), _probabilities(teacher_logits, temperature)
    total = 0.0
    for n in range(samples):
        weight = 1.0 if mask is None else mask[n]
        for m in range(samples):
            left = math.fsum(a * b for a, b in zip(t[n], t[m], strict=True))
            right = math.fsum(a * b for a, b in zip(s[n], s[m], strict=True))
            total += weight * (left - right) ** 2
    return float(total / samples)


def classwise(
    student_logits: Array, teacher_logits: Array, temperature: float, mask: Sequence[float] | None = None
) -> float:
    """Return 1/C sum_c mask_c sum_d (M_t - M_s)_cd^2, M = P^T P."""
    samples, classes = student_logits.shape
    s, t = _probabilities(student_logits, temperature), _probabilities(teacher_logits, temperature)
    total = 0.0
    for c in range(classes):
        weight = 1.0 if mask is None else mask[c]
        for d in range(classes):
            left = math.fsum(t[n][c] * t[n][d] for n in range(samples))
            right = math.fsum(s[n][c] * s[n][d] for n in range(samples))
            total += weight * (left - right) ** 2
    return float(total / classes)


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    if len(ordered) % 2 == 1:
        return ordered[middle]
    return ordered[middle - 1] + 0.5 * (ordered[middle] - ordered[middle - 1])


def masks(teacher_logits: Array) -> tuple[list[float], list[float]]:
    """Return the sample mask and the class mask of the teacher's weak view."""
    p = _probabilities(teacher_logits, 1.0)
    confidence = [max(row) for row in p]
    mass = [math.fsum(row[c] for row in p) for c in range(teacher_logits.shape[1])]
    sample_limit, class_limit = _median(confidence), _median(mass)
    return (
        [1.0 if v <= sample_limit else 0.0 for v in confidence],
        [1.0 if v <= class_limit else 0.0 for v in mass],
    )


def _standardised(logits: Array) -> Array:
    samples, classes = logits.shape
    out = np.zeros((samples, classes), dtype=np.float64)
    for n in range(samples):
        mean = math.fsum(float(v) for v in logits[n]) / classes
        deviation = math.sqrt(math.fsum((float(v) - mean) ** 2 for v in logits[n]) / (classes - 1))
        for c in range(classes):
            out[n, c] = (float(logits[n, c]) - mean) / (deviation + 1e-7)
    return out


def mlkd(
    student_weak: Array,
    student_strong: Array,
    teacher_weak: Array,
    teacher_strong: Array,
    target: Labels,
    temperatures: Sequence[float] = (4.0, 3.0, 5.0, 2.0, 6.0),
    ce_weight: float = 0.1,
    kd_weight: float = 0.9,
    form: str = "code",
    standardise: bool = False,
) -> dict[str, float]:
    """Return "ce", "kd", "class", "batch" and "loss"; all logits are (B,C)."""
    samples = student_weak.shape[0]
    ce = 0.0
    for logits in (student_weak, student_strong):
        for n in range(samples):
            ce -= _log_softmax([float(v) for v in logits[n]])[int(target[n])] / samples
    sample_mask, class_mask = masks(teacher_weak)
    fraction = math.fsum(sample_mask) / len(sample_mask)
    class_fraction = math.fsum(class_mask) / len(class_mask)
    sw, ss, tw, ts = student_weak, student_strong, teacher_weak, teacher_strong
    if standardise:
        sw, ss, tw, ts = _standardised(sw), _standardised(ss), _standardised(tw), _standardised(ts)
    kd, classes, relations = 0.0, 0.0, 0.0
    for i, t in enumerate(temperatures):
        if form == "code":
            kd += fraction * instance(sw, tw, t)
            kd += instance(ss, ts, t) if i < 3 else instance(sw, tw, t)
            classes += class_fraction * classwise(student_weak, teacher_weak, t)
            relations += fraction * batch(student_weak, teacher_weak, t)
        elif form == "selected":
            kd += instance(sw, tw, t, sample_mask) + instance(ss, ts, t)
            classes += classwise(student_weak, teacher_weak, t, class_mask)
            relations += batch(student_weak, teacher_weak, t, sample_mask)
        else:
            raise ValueError(form)
    parts = {
        "ce": float(ce_weight * ce),
        "kd": kd_weight * kd,
        "class": kd_weight * classes,
        "batch": kd_weight * relations,
    }
    parts["loss"] = math.fsum(parts.values())
    return parts
