# SPDX-License-Identifier: Apache-2.0
"""Knowledge distillation (Hinton et al. 2015), the soft-target term.

Paper form ("kl"):             L = T^2 / B * sum_n sum_c p_t,c (log p_t,c - log p_s,c), p = softmax(z / T).
Code form ("cross_entropy"):   L = alpha T^2 / B * sum_n sum_c -p_t,c log p_s,c, task loss times (1 - alpha).
"""

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


def kd(
    student_logits: Array,
    teacher_logits: Array,
    temperature: float = 4.0,
    alpha: float = 1.0,
    form: str = "kl",
) -> float:
    """Return the soft term, times ``alpha``; ``form`` is "kl" or "cross_entropy"."""
    samples, classes = student_logits.shape
    total = 0.0
    for n in range(samples):
        student = [float(student_logits[n, c]) / temperature for c in range(classes)]
        teacher = [float(teacher_logits[n, c]) / temperature for c in range(classes)]
        student_top, teacher_top = max(student), max(teacher)
        student_lse = student_top + math.log(math.fsum(math.exp(v - student_top) for v in student))
        teacher_lse = teacher_top + math.log(math.fsum(math.exp(v - teacher_top) for v in teacher))
        for c in range(classes):
            log_ps = student[c] - student_lse
            log_pt = teacher[c] - teacher_lse
            pt = math.exp(log_pt)
            if pt == 0.0:
                continue  # p log p is 0 at p = 0
            if form == "kl":
                total += pt * (log_pt - log_ps)
            elif form == "cross_entropy":
                total += -pt * log_ps
            else:
                raise ValueError(form)
    return float(alpha * temperature**2 * total / samples)


def task_loss(student_logits: Array, target: Labels) -> float:
    """Return the batch mean of -log softmax(z)_y."""
    samples, classes = student_logits.shape
    total = 0.0
    for n in range(samples):
        row = [float(student_logits[n, c]) for c in range(classes)]
        top = max(row)
        total += top + math.log(math.fsum(math.exp(v - top) for v in row)) - row[int(target[n])]
    return float(total / samples)


def total(
    student_logits: Array,
    teacher_logits: Array,
    target: Labels,
    temperature: float = 4.0,
    ce_weight: float = 0.1,
    kd_weight: float = 0.9,
    form: str = "kl",
) -> dict[str, float]:
    """Return the named parts of ``ce_weight`` CE + ``kd_weight`` KD."""
    ce = ce_weight * task_loss(student_logits, target)
    soft = kd(student_logits, teacher_logits, temperature, kd_weight, form)
    return {"ce": ce, "kd": soft, "loss": ce + soft}
