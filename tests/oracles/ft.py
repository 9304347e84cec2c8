# SPDX-License-Identifier: Apache-2.0
"""FT: factor transfer (Kim et al. 2018).

Paraphraser encoder (on t) and translator (on s): three 3x3 convolutions (padding 1, bias), LeakyReLU(0.1)
after each; decoder: three transposed 3x3 convolutions (padding 1), LeakyReLU(0.1) after each.

* stage 1: L = mean (decoder(encoder(t)) - t)^2;
* stage 2, q = flattened factor / max(norm, 1e-12), form "paper": L = mean |q_s - q_t|; form "l2": batch mean
  of ||q_s - q_t||_2; form "attention": mean |a_s - a_t|, a = the same normalisation of mean_c F^2.
"""

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def _leaky(value: float, slope: float = 0.1) -> float:
    return value if value >= 0.0 else slope * value


def _block(x: Array, weight: Array, bias: Array) -> Array:
    samples, channels, height, width = x.shape
    out = np.zeros((samples, weight.shape[0], height, width), dtype=np.float64)
    for n, o, h, w in np.ndindex(*out.shape):
        value = float(bias[o])
        for dh in range(3):
            for dw in range(3):
                row, col = h + dh - 1, w + dw - 1
                if 0 <= row < height and 0 <= col < width:
                    for c in range(channels):
                        value += float(weight[o, c, dh, dw]) * float(x[n, c, row, col])
        out[n, o, h, w] = _leaky(value)
    return out


def _transposed_block(x: Array, weight: Array, bias: Array) -> Array:
    samples, channels, height, width = x.shape
    out = np.zeros((samples, weight.shape[1], height, width), dtype=np.float64)
    for n, o, h, w in np.ndindex(*out.shape):
        value = float(bias[o])
        for dh in range(3):
            for dw in range(3):
                # input cell (row, col) adds weight[dh, dw] times itself to (row + dh - 1, col + dw - 1)
                row, col = h - dh + 1, w - dw + 1
                if 0 <= row < height and 0 <= col < width:
                    for c in range(channels):
                        value += float(weight[c, o, dh, dw]) * float(x[n, c, row, col])
        out[n, o, h, w] = _leaky(value)
    return out


def factor(features: Array, weights: Mapping[str, Array], name: str) -> Array:
    """Return the factor; ``name`` is "paraphraser" or "translator", keys are <name>.conv{0,1,2}.*."""
    for i in range(3):
        features = _block(features, weights[f"{name}.conv{i}.weight"], weights[f"{name}.conv{i}.bias"])
    return features


def reconstruction(teacher_features: Array, weights: Mapping[str, Array]) -> float:
    """Return the stage-1 loss; keys are paraphraser.conv{0,1,2}.* and paraphraser.deconv{0,1,2}.*."""
    x = factor(teacher_features, weights, "paraphraser")
    for i in range(3):
        prefix = f"paraphraser.deconv{i}"
        x = _transposed_block(x, weights[f"{prefix}.weight"], weights[f"{prefix}.bias"])
    total = 0.0
    for index in np.ndindex(*x.shape):
        total += (float(x[index]) - float(teacher_features[index])) ** 2
    return float(total / teacher_features.size)


def _unit(features: Array, n: int, form: str) -> list[float]:
    _, channels, height, width = features.shape
    if form == "attention":
        row = [
            math.fsum(float(features[n, c, h, w]) ** 2 for c in range(channels)) / channels
            for h in range(height)
            for w in range(width)
        ]
    else:
        row = [float(v) for v in features[n].flatten()]
    norm = max(math.sqrt(math.fsum(v * v for v in row)), 1e-12)
    return [v / norm for v in row]


def ft(
    student_features: Array,
    teacher_features: Array,
    weights: Mapping[str, Array],
    form: str = "paper",
) -> float:
    """Return the stage-2 loss."""
    if form not in ("paper", "l2", "attention"):
        raise ValueError(form)
    student = factor(student_features, weights, "translator")
    teacher = factor(teacher_features, weights, "paraphraser")
    samples = student.shape[0]
    total = 0.0
    for n in range(samples):
        pairs = list(zip(_unit(student, n, form), _unit(teacher, n, form), strict=True))
        if form == "l2":
            total += math.sqrt(math.fsum((a - b) ** 2 for a, b in pairs))
        else:
            total += math.fsum(abs(a - b) for a, b in pairs) / len(pairs)
    return float(total / samples)
