# SPDX-License-Identifier: Apache-2.0
"""OFA-KD: one for all (Hao et al. 2023), the loss of one exit and the CNN projector.

p_t = softmax(t / T), p_s = softmax(s / T), no T^2.

* form "paper": L = 1/B sum_n [ -(1 + p_t,y)^eps log p_s,y - sum_{c != y} p_t,c log p_s,c ];
* form "code":  L = 1/B sum_n -sum_c [ (p_t + o)^eps - o ]_c log p_s,c, o = one-hot(y).

Projector of an early stage: blocks of depthwise 3x3 stride 2, pointwise, BN, ReLU, depthwise 3x3 stride 1,
pointwise, BN, ReLU (padding 1, no biases, batch statistics), GAP, linear. Last stage: conv1x1 with bias, GAP,
linear.
"""

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


def _log_softmax(row: list[float]) -> list[float]:
    top = max(row)
    lse = top + math.log(math.fsum(math.exp(v - top) for v in row))
    return [v - lse for v in row]


def ofa(
    student_logits: Array,
    teacher_logits: Array,
    target: Labels,
    eps: float = 1.0,
    temperature: float = 1.0,
    form: str = "paper",
) -> float:
    """Return the loss of one exit."""
    samples, classes = student_logits.shape
    total = 0.0
    for n in range(samples):
        log_s = _log_softmax([float(v) / temperature for v in student_logits[n]])
        log_t = _log_softmax([float(v) / temperature for v in teacher_logits[n]])
        for c in range(classes):
            p = math.exp(log_t[c])
            is_target = c == int(target[n])
            if form == "paper":
                weight = (1.0 + p) ** eps if is_target else p
            elif form == "code":
                weight = (p + 1.0) ** eps - 1.0 if is_target else p**eps
            else:
                raise ValueError(form)
            total -= weight * log_s[c]
    return float(total / samples)


def _depthwise(x: Array, kernel: Array, stride: int) -> Array:
    samples, channels, height, width = x.shape
    out_h, out_w = (height - 1) // stride + 1, (width - 1) // stride + 1
    out = np.zeros((samples, channels, out_h, out_w), dtype=np.float64)
    for n, c, h, w in np.ndindex(*out.shape):
        value = 0.0
        for dh in range(3):
            for dw in range(3):
                row, col = h * stride + dh - 1, w * stride + dw - 1
                if 0 <= row < height and 0 <= col < width:
                    value += float(kernel[c, 0, dh, dw]) * float(x[n, c, row, col])
        out[n, c, h, w] = value
    return out


def _pointwise(x: Array, kernel: Array, bias: Array | None) -> Array:
    samples, channels, height, width = x.shape
    out = np.zeros((samples, kernel.shape[0], height, width), dtype=np.float64)
    for n, o, h, w in np.ndindex(*out.shape):
        out[n, o, h, w] = (float(bias[o]) if bias is not None else 0.0) + math.fsum(
            float(kernel[o, c, 0, 0]) * float(x[n, c, h, w]) for c in range(channels)
        )
    return out


def _norm_relu(x: Array, scale: Array, shift: Array, eps: float = 1e-5) -> Array:
    out = np.zeros(x.shape, dtype=np.float64)
    for c in range(x.shape[1]):
        values = [float(v) for v in x[:, c].flatten()]
        mean = math.fsum(values) / len(values)
        variance = math.fsum((v - mean) ** 2 for v in values) / len(values)
        for n in range(x.shape[0]):
            for h in range(x.shape[2]):
                for w in range(x.shape[3]):
                    normal = (float(x[n, c, h, w]) - mean) / math.sqrt(variance + eps)
                    out[n, c, h, w] = max(normal * float(scale[c]) + float(shift[c]), 0.0)
    return out


def project(student_features: Array, weights: Mapping[str, Array]) -> Array:
    """Return the exit's logits (B,C).

    Keys of an early stage: i.op.{0,1,4,5}.weight and i.op.{2,6}.{weight,bias} for blocks i = 0, 1, ...; of
    the last stage: conv.{weight,bias}; always fc.{weight,bias}.
    """
    x = student_features
    if "conv.weight" in weights:
        x = _pointwise(x, weights["conv.weight"], weights["conv.bias"])
    block = 0
    while f"{block}.op.0.weight" in weights:
        x = _depthwise(x, weights[f"{block}.op.0.weight"], 2)
        x = _pointwise(x, weights[f"{block}.op.1.weight"], None)
        x = _norm_relu(x, weights[f"{block}.op.2.weight"], weights[f"{block}.op.2.bias"])
        x = _depthwise(x, weights[f"{block}.op.4.weight"], 1)
        x = _pointwise(x, weights[f"{block}.op.5.weight"], None)
        x = _norm_relu(x, weights[f"{block}.op.6.weight"], weights[f"{block}.op.6.bias"])
        block += 1
    samples, channels, height, width = x.shape
    weight, bias = weights["fc.weight"], weights["fc.bias"]
    logits = np.zeros((samples, weight.shape[0]), dtype=np.float64)
    for n in range(samples):
        pooled = [math.fsum(float(v) for v in x[n, c].flatten()) / (height * width) for c in range(channels)]
        for k in range(weight.shape[0]):
            logits[n, k] = float(bias[k]) + math.fsum(float(weight[k, c]) * pooled[c] for c in range(channels))
    return logits
