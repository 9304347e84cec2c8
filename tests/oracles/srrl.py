# SPDX-License-Identifier: Apache-2.0
"""SRRL: softmax regression representation learning.

h = ReLU(BN(conv1x1(f_s))) with batch statistics, g_s = GAP(h), g_t = GAP(f_t), W the teacher's classifier.
L_fm = 1/(N C_t) sum (g_s - g_t)^2,  L_sr = 1/(N C) sum (W g_s - W g_t)^2,  L = alpha L_fm + beta L_sr.
``form="map"`` is the paper and the released code (connector on the map); ``form="pooled"`` is another
repository's reading, with the connector applied to the pooled student vector.
"""

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def _pool(features: Array) -> Array:
    samples, channels, height, width = features.shape
    pooled = np.zeros((samples, channels), dtype=np.float64)
    for n in range(samples):
        for c in range(channels):
            pooled[n, c] = math.fsum(float(features[n, c, h, w]) for h in range(height) for w in range(width)) / (
                height * width
            )
    return pooled


def connector(student_features: Array, weights: Mapping[str, Array], eps: float = 1e-5) -> Array:
    """Return ReLU(BN(conv1x1(f_s))), the batch norm using the biased variance of this batch."""
    samples, channels, height, width = student_features.shape
    kernel = weights["connector.conv.weight"]
    out = np.zeros((samples, kernel.shape[0], height, width), dtype=np.float64)
    for n, o, h, w in np.ndindex(*out.shape):
        value = 0.0
        for c in range(channels):
            value += float(kernel[o, c, 0, 0]) * float(student_features[n, c, h, w])
        out[n, o, h, w] = value
    count = samples * height * width
    for o in range(kernel.shape[0]):
        cells = [(n, h, w) for n in range(samples) for h in range(height) for w in range(width)]
        mean = math.fsum(float(out[n, o, h, w]) for n, h, w in cells) / count
        variance = math.fsum((float(out[n, o, h, w]) - mean) ** 2 for n, h, w in cells) / count
        scale = float(weights["connector.bn.weight"][o])
        shift = float(weights["connector.bn.bias"][o])
        for n, h, w in cells:
            normalised = (float(out[n, o, h, w]) - mean) / math.sqrt(variance + eps)
            out[n, o, h, w] = max(scale * normalised + shift, 0.0)
    return out


def _classify(pooled: Array, weight: Array, bias: Array) -> Array:
    samples, channels = pooled.shape
    logits = np.zeros((samples, weight.shape[0]), dtype=np.float64)
    for n in range(samples):
        for k in range(weight.shape[0]):
            logits[n, k] = float(bias[k]) + math.fsum(
                float(weight[k, c]) * float(pooled[n, c]) for c in range(channels)
            )
    return logits


def srrl(
    student_features: Array,
    teacher_features: Array,
    weights: Mapping[str, Array],
    alpha: float = 1.0,
    beta: float = 1.0,
    form: str = "map",
) -> dict[str, float]:
    """Return "feature" and "regression" (unit weights) and "loss" = alpha feature + beta regression.

    ``weights`` holds connector.conv.weight, connector.bn.{weight,bias}, teacher_fc.{weight,bias}.
    """
    if form == "map":
        student_pooled = _pool(connector(student_features, weights))
    elif form == "pooled":
        vector = _pool(student_features)
        student_pooled = _pool(connector(vector.reshape(*vector.shape, 1, 1), weights))
    else:
        raise ValueError(form)
    teacher_pooled = _pool(teacher_features)
    samples, channels = teacher_pooled.shape
    feature = 0.0
    for n in range(samples):
        for c in range(channels):
            feature += (float(student_pooled[n, c]) - float(teacher_pooled[n, c])) ** 2
    feature /= samples * channels
    fc_weight, fc_bias = weights["teacher_fc.weight"], weights["teacher_fc.bias"]
    student_logits = _classify(student_pooled, fc_weight, fc_bias)
    teacher_logits = _classify(teacher_pooled, fc_weight, fc_bias)
    regression = 0.0
    for n in range(samples):
        for k in range(fc_weight.shape[0]):
            regression += (float(student_logits[n, k]) - float(teacher_logits[n, k])) ** 2
    regression /= samples * fc_weight.shape[0]
    return {"feature": feature, "regression": regression, "loss": alpha * feature + beta * regression}
