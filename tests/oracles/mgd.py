# SPDX-License-Identifier: Apache-2.0
"""Masked generative distillation (MGD): align, then mask, then generate.

L = alpha / N * sum_{n,c,h,w} ( G( A(s) * M ) - t )^2 over masked and kept positions alike.
G = conv3x3 - ReLU - conv3x3 (padding 1, biases), A a 1x1 convolution with bias used only when the widths
differ. Keep-mask M by variant:

* "channel" (classification): noise (N,Ct,1,1), dropped where noise < lambda;
* "spatial" (detection, segmentation): noise (N,1,H,W), dropped where noise > 1 - lambda (code form);
* "spatial_paper": noise (N,1,H,W), dropped where noise < lambda (the inequality as the paper writes it).

Segmentation adds a logit term: softmax over positions at temperature tau for every sample and class,
L_logit = weight tau^2 / (C N) * sum_{n,c} KL(teacher || student).
"""

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def keep_mask(noise: Array, drop_ratio: float, mask_style: str) -> Array:
    """Return 1 where an entry is kept and 0 where it is dropped, in the noise's own shape."""
    mask = np.ones(noise.shape, dtype=np.float64)
    for index in np.ndindex(*noise.shape):
        u = float(noise[index])
        if mask_style in ("channel", "spatial_paper"):
            dropped = u < drop_ratio
        elif mask_style == "spatial":
            dropped = u > 1.0 - drop_ratio
        else:
            raise ValueError(mask_style)
        if dropped:
            mask[index] = 0.0
    return mask


def _pointwise(x: Array, weight: Array, bias: Array) -> Array:
    samples, channels, height, width = x.shape
    out = np.zeros((samples, weight.shape[0], height, width), dtype=np.float64)
    for n, o, h, w in np.ndindex(*out.shape):
        value = float(bias[o])
        for c in range(channels):
            value += float(weight[o, c, 0, 0]) * float(x[n, c, h, w])
        out[n, o, h, w] = value
    return out


def _three_by_three(x: Array, weight: Array, bias: Array) -> Array:
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
        out[n, o, h, w] = value
    return out


def mgd(
    student_features: Array,
    teacher_features: Array,
    weights: Mapping[str, Array],
    noise: Array,
    alpha: float = 2e-5,
    drop_ratio: float = 0.65,
    mask_style: str = "spatial",
) -> float:
    """Return the weighted loss; ``weights`` holds generation.{0,2}.* and, when needed, align.*."""
    aligned = student_features
    if "align.weight" in weights:
        aligned = _pointwise(student_features, weights["align.weight"], weights["align.bias"])
    mask = keep_mask(noise, drop_ratio, mask_style)
    masked = np.zeros(aligned.shape, dtype=np.float64)
    for n, c, h, w in np.ndindex(*aligned.shape):
        keep = mask[n, c, 0, 0] if mask_style == "channel" else mask[n, 0, h, w]
        masked[n, c, h, w] = float(aligned[n, c, h, w]) * float(keep)
    hidden = _three_by_three(masked, weights["generation.0.weight"], weights["generation.0.bias"])
    for index in np.ndindex(*hidden.shape):
        hidden[index] = max(float(hidden[index]), 0.0)
    generated = _three_by_three(hidden, weights["generation.2.weight"], weights["generation.2.bias"])
    squares = 0.0
    for index in np.ndindex(*generated.shape):
        squares += (float(generated[index]) - float(teacher_features[index])) ** 2
    return float(alpha * squares / student_features.shape[0])


def logit_loss(student_logits: Array, teacher_logits: Array, temperature: float = 4.0, weight: float = 3.0) -> float:
    """Return the segmentation variant's logit term, a KL over positions for each sample and class."""
    samples, classes, height, width = student_logits.shape
    total = 0.0
    for n in range(samples):
        for c in range(classes):
            student = []
            teacher = []
            for h in range(height):
                for w in range(width):
                    student.append(float(student_logits[n, c, h, w]) / temperature)
                    teacher.append(float(teacher_logits[n, c, h, w]) / temperature)
            student_top, teacher_top = max(student), max(teacher)
            student_lse = student_top + math.log(math.fsum(math.exp(v - student_top) for v in student))
            teacher_lse = teacher_top + math.log(math.fsum(math.exp(v - teacher_top) for v in teacher))
            for s, t in zip(student, teacher, strict=True):
                log_pt = t - teacher_lse
                total += math.exp(log_pt) * (log_pt - (s - student_lse))
    return float(weight * temperature**2 * total / (classes * samples))


def seg(
    student_features: Array,
    teacher_features: Array,
    student_logits: Array,
    teacher_logits: Array,
    weights: Mapping[str, Array],
    noise: Array,
    alpha: float = 2e-5,
    drop_ratio: float = 0.75,
) -> dict[str, float]:
    """Return the parts of one segmentation step: "feature", "logit" and their sum "loss"."""
    feature = mgd(student_features, teacher_features, weights, noise, alpha, drop_ratio, "spatial")
    logit = logit_loss(student_logits, teacher_logits)
    return {"feature": feature, "logit": logit, "loss": feature + logit}
