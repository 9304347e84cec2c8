# SPDX-License-Identifier: Apache-2.0
"""FKD: stored soft labels of crops (Shen and Xing 2022).

p = softmax(t), C classes. Stored kinds and the dense target they give:

* "hard": the arg-max, one-hot;
* "smoothing": the largest value v, (1 - v)/(C - 1) elsewhere;
* "marginal_smoothing": the k largest, (1 - their sum)/(C - k) elsewhere;
* "marginal_renorm": the k largest divided by their sum, 0 elsewhere.

L = 1/B sum_n -sum_c target_c log softmax(s / T)_c, no T^2.
"""

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def recovered(teacher_logits: Array, kind: str = "marginal_smoothing", k: int = 5) -> Array:
    """Return the dense targets (B,C)."""
    samples, classes = teacher_logits.shape
    out = np.zeros((samples, classes), dtype=np.float64)
    for n in range(samples):
        row = [float(v) for v in teacher_logits[n]]
        top = max(row)
        mass = math.fsum(math.exp(v - top) for v in row)
        p = [math.exp(v - top) / mass for v in row]
        order = sorted(range(classes), key=p.__getitem__, reverse=True)
        kept = order[:1] if kind in ("hard", "smoothing") else order[:k]
        total = math.fsum(p[c] for c in kept)
        for c in range(classes):
            if kind == "hard":
                out[n, c] = 1.0 if c in kept else 0.0
            elif kind in ("smoothing", "marginal_smoothing"):
                out[n, c] = p[c] if c in kept else (1.0 - total) / (classes - len(kept))
            elif kind == "marginal_renorm":
                out[n, c] = p[c] / total if c in kept else 0.0
            else:
                raise ValueError(kind)
    return out


def soft_cross_entropy(student_logits: Array, targets: Array, temperature: float = 1.0) -> float:
    """Return the loss for dense targets."""
    samples, classes = student_logits.shape
    total = 0.0
    for n in range(samples):
        row = [float(v) / temperature for v in student_logits[n]]
        top = max(row)
        lse = top + math.log(math.fsum(math.exp(v - top) for v in row))
        for c in range(classes):
            total -= float(targets[n, c]) * (row[c] - lse)
    return float(total / samples)


def fkd(
    student_logits: Array,
    teacher_logits: Array,
    kind: str = "marginal_smoothing",
    k: int = 5,
    temperature: float = 1.0,
) -> float:
    """Return the loss of the student against the stored labels."""
    return soft_cross_entropy(student_logits, recovered(teacher_logits, kind, k), temperature)
