# SPDX-License-Identifier: Apache-2.0
"""WSLD: weighted soft labels (Zhou et al. 2021).

E_s, E_t = -log softmax(z)_y of student and teacher at temperature 1, both constant;
w = 1 - exp(-max(0, E_s / (E_t + eps))); L = alpha T^2 / N sum_n w_n (-sum_c p_t,c^T log p_s,c^T).
``form="cross_entropy"`` is the released code; ``form="kl"`` is the text (teacher entropy subtracted, the same
gradient).
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


def sample_weights(student_logits: Array, teacher_logits: Array, target: Labels, eps: float = 1e-7) -> list[float]:
    """Return w_n for every sample."""
    weights: list[float] = []
    for n in range(student_logits.shape[0]):
        y = int(target[n])
        student_ce = -_log_softmax(student_logits[n], 1.0)[y]
        teacher_ce = -_log_softmax(teacher_logits[n], 1.0)[y]
        weights.append(1.0 - math.exp(-max(0.0, student_ce / (teacher_ce + eps))))
    return weights


def wsld(
    student_logits: Array,
    teacher_logits: Array,
    target: Labels,
    temperature: float = 4.0,
    alpha: float = 2.25,
    eps: float = 1e-7,
    form: str = "cross_entropy",
) -> float:
    """Return the weighted soft term, without the task loss."""
    samples, classes = student_logits.shape
    weights = sample_weights(student_logits, teacher_logits, target, eps)
    total = 0.0
    for n in range(samples):
        log_s = _log_softmax(student_logits[n], temperature)
        log_t = _log_softmax(teacher_logits[n], temperature)
        soft = 0.0
        for c in range(classes):
            p = math.exp(log_t[c])
            if p == 0.0:
                continue
            if form == "cross_entropy":
                soft -= p * log_s[c]
            elif form == "kl":
                soft += p * (log_t[c] - log_s[c])
            else:
                raise ValueError(form)
        total += weights[n] * soft
    return float(alpha * temperature**2 * total / samples)


def total(
    student_logits: Array,
    teacher_logits: Array,
    target: Labels,
    temperature: float = 4.0,
    alpha: float = 2.25,
    eps: float = 1e-7,
) -> dict[str, float]:
    """Return "ce", "wsld" and their sum "loss"."""
    samples = student_logits.shape[0]
    ce = 0.0
    for n in range(samples):
        ce -= _log_softmax(student_logits[n], 1.0)[int(target[n])]
    ce = float(ce / samples)
    soft = wsld(student_logits, teacher_logits, target, temperature, alpha, eps)
    return {"ce": ce, "wsld": soft, "loss": ce + soft}
