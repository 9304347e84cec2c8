# SPDX-License-Identifier: Apache-2.0
"""DeiT: the distillation token (Touvron et al. 2021); class head z_c, distillation head z_d.

* hard: L = (1-alpha) CE(z_c, y) + alpha CE(z_d, argmax t);
* soft: L = (1-alpha) CE(z_c, y) + alpha tau^2 KL(softmax(t/tau) || softmax(z_d/tau)), the KL divided by B
  (form "paper") or by B C (form "code").

At test time the two heads' probabilities are averaged (form "paper") or their logits (form "code").
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


def hard(
    class_logits: Array,
    distillation_logits: Array,
    teacher_logits: Array,
    target: Labels,
    alpha: float = 0.5,
) -> float:
    """Return the hard form (ties in the teacher: the lower class)."""
    samples, classes = class_logits.shape
    total = 0.0
    for n in range(samples):
        best = 0
        for c in range(classes):
            if teacher_logits[n, c] > teacher_logits[n, best]:
                best = c
        total -= (1.0 - alpha) * _log_softmax(class_logits[n], 1.0)[int(target[n])]
        total -= alpha * _log_softmax(distillation_logits[n], 1.0)[best]
    return float(total / samples)


def soft(
    class_logits: Array,
    distillation_logits: Array,
    teacher_logits: Array,
    target: Labels,
    alpha: float = 0.1,
    tau: float = 3.0,
    form: str = "paper",
) -> float:
    """Return the soft form."""
    samples, classes = class_logits.shape
    ce, kl = 0.0, 0.0
    for n in range(samples):
        ce -= _log_softmax(class_logits[n], 1.0)[int(target[n])]
        student, teacher = _log_softmax(distillation_logits[n], tau), _log_softmax(teacher_logits[n], tau)
        for c in range(classes):
            kl += math.exp(teacher[c]) * (teacher[c] - student[c])
    divisor = {"paper": samples, "code": samples * classes}[form]
    return float((1.0 - alpha) * ce / samples + alpha * tau**2 * kl / divisor)


def predict(class_logits: Array, distillation_logits: Array, form: str = "paper") -> Array:
    """Return the fused prediction (B,C)."""
    samples, classes = class_logits.shape
    out = np.zeros((samples, classes), dtype=np.float64)
    for n in range(samples):
        left, right = _log_softmax(class_logits[n], 1.0), _log_softmax(distillation_logits[n], 1.0)
        for c in range(classes):
            if form == "paper":
                out[n, c] = (math.exp(left[c]) + math.exp(right[c])) / 2.0
            elif form == "code":
                out[n, c] = (float(class_logits[n, c]) + float(distillation_logits[n, c])) / 2.0
            else:
                raise ValueError(form)
    return out
