# SPDX-License-Identifier: Apache-2.0
"""OFD: overhaul of feature distillation (Heo et al. 2019).

Margin of a teacher channel from the batch norm before the tap (scale a, shift b), x ~ N(b, |a|):
m = E[x | x < 0] = b - |a| phi(b/|a|) / Phi(-b/|a|), or -3 |a| when Phi(-b/|a|) <= 0.001.
Target r = max(t, m).
Student c = BN(conv1x1(s)), no convolution bias, batch statistics.
d = 0 where c <= r and r <= 0, else (c - r)^2; L = weight * sum_l 2^-(L-1-l) sum(d) / B, weight 1e-3 (CIFAR),
1e-4 (ImageNet).
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def margins(scale: Array, shift: Array) -> list[float]:
    """Return the margin of every channel."""
    out: list[float] = []
    for c in range(scale.shape[0]):
        a, b = abs(float(scale[c])), float(shift[c])
        below = 0.5 * math.erfc(b / a / math.sqrt(2.0))
        if below > 0.001:
            density = math.exp(-0.5 * (b / a) ** 2) / math.sqrt(2.0 * math.pi)
            out.append(b - a * density / below)
        else:
            out.append(-3.0 * a)
    return out


def connect(features: Array, kernel: Array, scale: Array, shift: Array, eps: float = 1e-5) -> Array:
    """Return BN(conv1x1(s)) with batch statistics."""
    samples, channels, height, width = features.shape
    out = np.zeros((samples, kernel.shape[0], height, width), dtype=np.float64)
    for n, o, h, w in np.ndindex(*out.shape):
        out[n, o, h, w] = math.fsum(float(kernel[o, c, 0, 0]) * float(features[n, c, h, w]) for c in range(channels))
    for o in range(kernel.shape[0]):
        values = [float(v) for v in out[:, o].flatten()]
        mean = math.fsum(values) / len(values)
        variance = math.fsum((v - mean) ** 2 for v in values) / len(values)
        for n in range(samples):
            for h in range(height):
                for w in range(width):
                    normal = (float(out[n, o, h, w]) - mean) / math.sqrt(variance + eps)
                    out[n, o, h, w] = normal * float(scale[o]) + float(shift[o])
    return out


def ofd(
    student_preactivations: Sequence[Array],
    teacher_preactivations: Sequence[Array],
    weights: Mapping[str, Array],
    weight: float = 1e-3,
) -> float:
    """Return the loss, layers from shallow to deep.

    Keys per layer l: connectors.l.0.weight (1x1), connectors.l.1.{weight,bias} (batch norm) and
    teacher_bn{l}.{weight,bias}.
    """
    layers = len(student_preactivations)
    total = 0.0
    for layer in range(layers):
        student = connect(
            student_preactivations[layer],
            weights[f"connectors.{layer}.0.weight"],
            weights[f"connectors.{layer}.1.weight"],
            weights[f"connectors.{layer}.1.bias"],
        )
        teacher = teacher_preactivations[layer]
        margin = margins(weights[f"teacher_bn{layer}.weight"], weights[f"teacher_bn{layer}.bias"])
        squares = 0.0
        for n, c, h, w in np.ndindex(*student.shape):
            value, goal = float(student[n, c, h, w]), max(float(teacher[n, c, h, w]), margin[c])
            if not (value <= goal and goal <= 0.0):
                squares += (value - goal) ** 2
        total += 2.0 ** (-(layers - 1 - layer)) * squares / student.shape[0]
    return float(weight * total)
