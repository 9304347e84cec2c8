# SPDX-License-Identifier: Apache-2.0
"""NKD: normalised knowledge distillation.

With P = softmax(t), p = softmax(s) at temperature 1 and y the target class:
L_t = -1/N sum_n P_y log p_y (P constant); with entry y deleted from both vectors,
a = log softmax(s_{-y} / T) and b = softmax(t_{-y} / T), L_n = -gamma T^2 / N sum_n sum_{i != y} b_i a_i;
L = L_t + L_n.
The paper and the released code agree. For soft labels y is the arg-max of the soft label.
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


def hard_targets(soft_labels: Array) -> Labels:
    """Return the class with the largest soft label of each row (ties: the lower class)."""
    samples, classes = soft_labels.shape
    target = np.zeros(samples, dtype=np.int64)
    for n in range(samples):
        for c in range(classes):
            if soft_labels[n, c] > soft_labels[n, target[n]]:
                target[n] = c
    return target


def nkd(
    student_logits: Array,
    teacher_logits: Array,
    target: Labels,
    temperature: float = 1.0,
    gamma: float = 1.5,
) -> dict[str, float]:
    """Return "target", "nontarget" (times gamma T^2) and their sum "loss"."""
    samples, classes = student_logits.shape
    target_part = 0.0
    nontarget_part = 0.0
    for n in range(samples):
        y = int(target[n])
        student = [float(v) for v in student_logits[n]]
        teacher = [float(v) for v in teacher_logits[n]]
        target_part -= math.exp(_log_softmax(teacher)[y]) * _log_softmax(student)[y]
        others = [c for c in range(classes) if c != y]
        if not others:
            continue
        a = _log_softmax([student[c] / temperature for c in others])
        b = _log_softmax([teacher[c] / temperature for c in others])
        for log_student, log_teacher in zip(a, b, strict=True):
            nontarget_part -= math.exp(log_teacher) * log_student
    target_part = float(target_part / samples)
    nontarget_part = float(gamma * temperature**2 * nontarget_part / samples)
    return {"target": target_part, "nontarget": nontarget_part, "loss": target_part + nontarget_part}
