# SPDX-License-Identifier: Apache-2.0
"""VID: variational information distillation (Ahn et al. 2019), one layer.

mu = conv1x1 - ReLU - conv1x1 - ReLU - conv1x1 (no biases) of the student, var_c = log(1 + exp(a_c)) + eps.
L = mean over all elements of 1/2 [ (mu - t)^2 / var_c + log var_c ]; 1/2 log 2 pi is left out.
When the heights differ, the taller map is first average-pooled to the square of the smaller height.
"""

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def _pool_to(x: Array, size: int) -> Array:
    samples, channels, height, width = x.shape
    out = np.zeros((samples, channels, size, size), dtype=np.float64)
    for n, c, i, j in np.ndindex(*out.shape):
        rows = range(i * height // size, -(-(i + 1) * height // size))
        cols = range(j * width // size, -(-(j + 1) * width // size))
        total = math.fsum(float(x[n, c, h, w]) for h in rows for w in cols)
        out[n, c, i, j] = total / (len(rows) * len(cols))
    return out


def initial_log_scale(variance: float = 5.0, eps: float = 1e-5) -> float:
    """Return a with log(1 + exp(a)) + eps equal to the wished initial variance."""
    return math.log(math.exp(variance - eps) - 1.0)


def vid(
    student_features: Array,
    teacher_features: Array,
    weights: Mapping[str, Array],
    eps: float = 1e-5,
) -> float:
    """Return the loss; ``weights`` holds regressor.{0,2,4}.weight and log_scale (Ct)."""
    if student_features.shape[2] > teacher_features.shape[2]:
        student_features = _pool_to(student_features, teacher_features.shape[2])
    elif student_features.shape[2] < teacher_features.shape[2]:
        teacher_features = _pool_to(teacher_features, student_features.shape[2])
    samples, channels, height, width = teacher_features.shape
    total = 0.0
    for n in range(samples):
        for h in range(height):
            for w in range(width):
                x = [float(v) for v in student_features[n, :, h, w]]
                for layer in (0, 2, 4):
                    kernel = weights[f"regressor.{layer}.weight"]
                    if layer > 0:
                        x = [max(v, 0.0) for v in x]
                    x = [
                        math.fsum(float(kernel[o, i, 0, 0]) * x[i] for i in range(len(x)))
                        for o in range(kernel.shape[0])
                    ]
                for c in range(channels):
                    a = float(weights["log_scale"][c])
                    softplus = max(a, 0.0) + math.log1p(math.exp(-abs(a)))
                    variance = softplus + eps
                    error = x[c] - float(teacher_features[n, c, h, w])
                    total += 0.5 * (error * error / variance + math.log(variance))
    return float(total / teacher_features.size)
