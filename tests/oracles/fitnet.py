# SPDX-License-Identifier: Apache-2.0
"""FitNet hints (Romero et al. 2015).

L = mean over all elements of (r(s) - t)^2. The regressor r starts with a convolution with bias chosen by the
heights: 1x1 when equal, 3x3 stride 2 padding 1 when H_s = 2 H_t, transposed 4x4 stride 2 padding 1 when
2 H_s = H_t, else an unpadded convolution whose kernel is 1 + H_s - H_t.

* form "conv_bn_relu": the convolution, batch norm (batch statistics), ReLU; the usual code form;
* form "conv_bn": without the ReLU;
* form "conv": the bare convolution;
* form "paper": the bare convolution and 1/2 ||r(s) - t||^2, averaged over the batch.
"""

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def _convolve(x: Array, weight: Array, bias: Array, stride: int, padding: int) -> Array:
    samples, channels, height, width = x.shape
    outputs, _, kernel_h, kernel_w = weight.shape
    out_h = (height + 2 * padding - kernel_h) // stride + 1
    out_w = (width + 2 * padding - kernel_w) // stride + 1
    out = np.zeros((samples, outputs, out_h, out_w), dtype=np.float64)
    for n, o, h, w in np.ndindex(*out.shape):
        value = float(bias[o])
        for dh in range(kernel_h):
            for dw in range(kernel_w):
                row, col = h * stride + dh - padding, w * stride + dw - padding
                if 0 <= row < height and 0 <= col < width:
                    for c in range(channels):
                        value += float(weight[o, c, dh, dw]) * float(x[n, c, row, col])
        out[n, o, h, w] = value
    return out


def _transposed(x: Array, weight: Array, bias: Array, stride: int, padding: int) -> Array:
    samples, channels, height, width = x.shape
    _, outputs, kernel_h, kernel_w = weight.shape
    out_h = (height - 1) * stride - 2 * padding + kernel_h
    out_w = (width - 1) * stride - 2 * padding + kernel_w
    out = np.zeros((samples, outputs, out_h, out_w), dtype=np.float64)
    for n in range(samples):
        for o in range(outputs):
            for h in range(out_h):
                for w in range(out_w):
                    out[n, o, h, w] = bias[o]
            for c in range(channels):
                for h in range(height):
                    for w in range(width):
                        for dh in range(kernel_h):
                            for dw in range(kernel_w):
                                row, col = h * stride + dh - padding, w * stride + dw - padding
                                if 0 <= row < out_h and 0 <= col < out_w:
                                    out[n, o, row, col] += float(x[n, c, h, w]) * float(weight[c, o, dh, dw])
    return out


def regress(
    student_features: Array,
    teacher_features: Array,
    weights: Mapping[str, Array],
    form: str = "conv_bn_relu",
    eps: float = 1e-5,
) -> Array:
    """Return r(s); ``weights`` holds conv.{weight,bias} and, for the batch norm, bn.{weight,bias}."""
    student_height, teacher_height = student_features.shape[2], teacher_features.shape[2]
    weight, bias = weights["conv.weight"], weights["conv.bias"]
    if student_height == 2 * teacher_height:
        out = _convolve(student_features, weight, bias, 2, 1)
    elif 2 * student_height == teacher_height:
        out = _transposed(student_features, weight, bias, 2, 1)
    else:
        out = _convolve(student_features, weight, bias, 1, 0)
    if form in ("conv", "paper"):
        return out
    if form not in ("conv_bn", "conv_bn_relu"):
        raise ValueError(form)
    samples, channels, height, width = out.shape
    for c in range(channels):
        cells = [(n, h, w) for n in range(samples) for h in range(height) for w in range(width)]
        mean = math.fsum(float(out[n, c, h, w]) for n, h, w in cells) / len(cells)
        variance = math.fsum((float(out[n, c, h, w]) - mean) ** 2 for n, h, w in cells) / len(cells)
        for n, h, w in cells:
            value = (float(out[n, c, h, w]) - mean) / math.sqrt(variance + eps)
            value = value * float(weights["bn.weight"][c]) + float(weights["bn.bias"][c])
            out[n, c, h, w] = max(value, 0.0) if form == "conv_bn_relu" else value
    return out


def fitnet(
    student_features: Array,
    teacher_features: Array,
    weights: Mapping[str, Array],
    form: str = "conv_bn_relu",
) -> float:
    """Return the hint loss in the chosen form."""
    regressed = regress(student_features, teacher_features, weights, form)
    total = 0.0
    for index in np.ndindex(*regressed.shape):
        total += (float(regressed[index]) - float(teacher_features[index])) ** 2
    if form == "paper":
        return float(0.5 * total / teacher_features.shape[0])
    return float(total / teacher_features.size)
