# SPDX-License-Identifier: Apache-2.0
"""Logit standardisation (Sun et al. 2024).

Z(v) = (v - mean_c v) / (std_c v + 1e-7) replaces student and teacher logits before a logit loss;
L = T^2 / B sum_n KL(softmax(Z(t)/T) || softmax(Z(s)/T)).
``form="paper"`` divides the variance by C, ``form="code"`` by C - 1.
"""

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def standardise(logits: Array, form: str = "paper", eps: float = 1e-7) -> Array:
    """Return Z of every row."""
    samples, classes = logits.shape
    out = np.zeros((samples, classes), dtype=np.float64)
    divisor = {"paper": classes, "code": classes - 1}[form]
    for n in range(samples):
        mean = math.fsum(float(v) for v in logits[n]) / classes
        variance = math.fsum((float(v) - mean) ** 2 for v in logits[n]) / divisor
        for c in range(classes):
            out[n, c] = (float(logits[n, c]) - mean) / (math.sqrt(variance) + eps)
    return out


def logit_std(
    student_logits: Array,
    teacher_logits: Array,
    temperature: float = 2.0,
    form: str = "paper",
    eps: float = 1e-7,
) -> float:
    """Return KD on standardised logits, at unit weight."""
    student, teacher = standardise(student_logits, form, eps), standardise(teacher_logits, form, eps)
    samples, classes = student.shape
    total = 0.0
    for n in range(samples):
        mass_s = math.fsum(math.exp(float(v) / temperature) for v in student[n])
        mass_t = math.fsum(math.exp(float(v) / temperature) for v in teacher[n])
        for c in range(classes):
            log_s = float(student[n, c]) / temperature - math.log(mass_s)
            log_t = float(teacher[n, c]) / temperature - math.log(mass_t)
            total += math.exp(log_t) * (log_t - log_s)
    return float(temperature**2 * total / samples)
