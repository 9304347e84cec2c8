# SPDX-License-Identifier: Apache-2.0
"""PS-KD: progressive self-knowledge distillation (Kim et al. 2021).

a_e = alpha_T (e + 1) / E, e from 0; target = (1 - a_e) onehot + a_e p^(e-1), the network's own probabilities
of the previous epoch (the one-hot at e = 0); L = 1/B sum_n -sum_c target_c log softmax(s)_c.
"""

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


def mixing(epoch: int, epochs: int, final: float = 0.8) -> float:
    """Return a_e."""
    return final * (epoch + 1) / epochs


def soft_targets(previous: Array, target: Labels, epoch: int, epochs: int, final: float = 0.8) -> Array:
    """Return the mixed targets (B,C)."""
    a = mixing(epoch, epochs, final)
    out = np.zeros(previous.shape, dtype=np.float64)
    for n, c in np.ndindex(*out.shape):
        onehot = 1.0 if c == int(target[n]) else 0.0
        memory = onehot if epoch == 0 else float(previous[n, c])
        out[n, c] = (1.0 - a) * onehot + a * memory
    return out


def ps_kd(
    student_logits: Array,
    previous: Array,
    target: Labels,
    epoch: int,
    epochs: int,
    final: float = 0.8,
) -> float:
    """Return the loss."""
    mixed = soft_targets(previous, target, epoch, epochs, final)
    samples, classes = student_logits.shape
    total = 0.0
    for n in range(samples):
        row = [float(v) for v in student_logits[n]]
        top = max(row)
        lse = top + math.log(math.fsum(math.exp(v - top) for v in row))
        for c in range(classes):
            total -= float(mixed[n, c]) * (row[c] - lse)
    return float(total / samples)
