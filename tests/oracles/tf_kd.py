# SPDX-License-Identifier: Apache-2.0
"""Tf-KD: teacher-free knowledge distillation (Yuan et al. 2020).

KLm = the KL summed over the batch, divided by B C (form "code") or by B (form "paper").

* self: the teacher is a trained copy, L = (1-alpha) CE + alpha T^2 m KLm(softmax(t/T) || softmax(s/T));
* reg: virtual teacher a = correct at the label, (1 - correct)/(C-1) elsewhere, q = softmax(a / T);
  L = (1-alpha) CE + alpha m KLm(q || softmax(s)), the student at temperature 1;
* label smoothing: CE with 1 - eps at the label and eps/(C-1) elsewhere.
"""

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


def _log_softmax(row: list[float]) -> list[float]:
    top = max(row)
    lse = top + math.log(math.fsum(math.exp(v - top) for v in row))
    return [v - lse for v in row]


def _ce(student_logits: Array, target: Labels) -> float:
    total = 0.0
    for n in range(student_logits.shape[0]):
        total -= _log_softmax([float(v) for v in student_logits[n]])[int(target[n])]
    return float(total / student_logits.shape[0])


def _divisor(samples: int, classes: int, form: str) -> int:
    return {"code": samples * classes, "paper": samples}[form]


def self_training(
    student_logits: Array,
    teacher_logits: Array,
    target: Labels,
    temperature: float = 20.0,
    alpha: float = 0.95,
    multiplier: float = 1.0,
    form: str = "paper",
) -> float:
    """Return the total of the self form."""
    samples, classes = student_logits.shape
    total = 0.0
    for n in range(samples):
        log_s = _log_softmax([float(v) / temperature for v in student_logits[n]])
        log_t = _log_softmax([float(v) / temperature for v in teacher_logits[n]])
        for c in range(classes):
            total += math.exp(log_t[c]) * (log_t[c] - log_s[c])
    soft = temperature**2 * multiplier * total / _divisor(samples, classes, form)
    return float((1.0 - alpha) * _ce(student_logits, target) + alpha * soft)


def regularisation(
    student_logits: Array,
    target: Labels,
    temperature: float = 20.0,
    alpha: float = 0.1,
    multiplier: float = 1.0,
    correct: float = 0.99,
    form: str = "paper",
) -> float:
    """Return the total of the virtual-teacher form."""
    samples, classes = student_logits.shape
    total = 0.0
    for n in range(samples):
        y = int(target[n])
        log_s = _log_softmax([float(v) for v in student_logits[n]])
        virtual = [correct if c == y else (1.0 - correct) / (classes - 1) for c in range(classes)]
        log_q = _log_softmax([v / temperature for v in virtual])
        for c in range(classes):
            total += math.exp(log_q[c]) * (log_q[c] - log_s[c])
    soft = multiplier * total / _divisor(samples, classes, form)
    return float((1.0 - alpha) * _ce(student_logits, target) + alpha * soft)


def label_smoothing(student_logits: Array, target: Labels, eps: float = 0.1) -> float:
    """Return the smoothed cross-entropy."""
    samples, classes = student_logits.shape
    total = 0.0
    for n in range(samples):
        log_s = _log_softmax([float(v) for v in student_logits[n]])
        for c in range(classes):
            total -= (1.0 - eps if c == int(target[n]) else eps / (classes - 1)) * log_s[c]
    return float(total / samples)
