# SPDX-License-Identifier: Apache-2.0
"""CrossKD (Wang et al. 2024) with a GFL head: the student's tower feature goes through the teacher's head.

Align, per channel over samples and positions (unbiased std): f = (s - mean_s) / (std_s + eps) std_t + mean_t;
ReLU unless the reused index is 0; teacher blocks i.. (conv3x3 + ReLU here), then the class and the box
predictors.

* class: QFL = BCE-with-logits(s, sigmoid(t)) |sigmoid(s) - sigmoid(t)|^beta (the modulator is
  differentiated); L = weight * sum over positions and classes of (position weight) QFL / (divisor + e);
* box: L = weight * sum over positions and the 4 edges of w T^2 KL(bins t || bins s) / (4 + e) / sum w,
  w = the teacher's largest class sigmoid where the position weight is not 0, else 0;

e = 2^-23, the float32 epsilon.
"""

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

EPS32 = 2.0**-23


def align(student_features: Array, teacher_features: Array, eps: float = 1e-6) -> Array:
    """Return the student map with the teacher's channel statistics."""
    out = np.zeros(student_features.shape, dtype=np.float64)
    samples, channels, height, width = student_features.shape
    for c in range(channels):
        student = [float(v) for v in student_features[:, c].flatten()]
        teacher = [float(v) for v in teacher_features[:, c].flatten()]
        s_mean, t_mean = math.fsum(student) / len(student), math.fsum(teacher) / len(teacher)
        s_std = math.sqrt(math.fsum((v - s_mean) ** 2 for v in student) / (len(student) - 1))
        t_std = math.sqrt(math.fsum((v - t_mean) ** 2 for v in teacher) / (len(teacher) - 1))
        for n in range(samples):
            for h in range(height):
                for w in range(width):
                    normal = (float(student_features[n, c, h, w]) - s_mean) / (s_std + eps)
                    out[n, c, h, w] = normal * t_std + t_mean
    return out


def _convolve(x: Array, weight: Array, bias: Array) -> Array:
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


def _relu(x: Array) -> Array:
    out = np.zeros(x.shape, dtype=np.float64)
    for index in np.ndindex(*x.shape):
        out[index] = max(float(x[index]), 0.0)
    return out


def reuse(
    aligned: Array, weights: Mapping[str, Array], tower: str, predictor: str, start: int, scale: float = 1.0
) -> Array:
    """Return the reused prediction; keys <tower>.i.conv.{weight,bias} and <predictor>.{weight,bias}."""
    x = _relu(aligned) if start != 0 else aligned
    block = start
    while f"{tower}.{block}.conv.weight" in weights:
        prefix = f"{tower}.{block}.conv"
        x = _relu(_convolve(x, weights[f"{prefix}.weight"], weights[f"{prefix}.bias"]))
        block += 1
    out = _convolve(x, weights[f"{predictor}.weight"], weights[f"{predictor}.bias"])
    for index in np.ndindex(*out.shape):
        out[index] = float(out[index]) * scale
    return out


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0.0 else math.exp(x) / (1.0 + math.exp(x))


def qfl(student: float, teacher: float, beta: float = 1.0) -> float:
    """Return the quality focal loss of one logit pair."""
    target = _sigmoid(teacher)
    entropy = max(student, 0.0) - student * target + math.log1p(math.exp(-abs(student)))
    return float(entropy * abs(_sigmoid(student) - target) ** beta)


def rows(
    student_logits: Array,
    teacher_logits: Array,
    row_weights: Array | None = None,
    divisor: float | None = None,
    beta: float = 1.0,
) -> float:
    """Return QFL on (P,C) logits: the weighted sum over the divisor, or the mean without a divisor."""
    total = 0.0
    for p in range(student_logits.shape[0]):
        weight = 1.0 if row_weights is None else float(row_weights[p])
        for c in range(student_logits.shape[1]):
            total += weight * qfl(float(student_logits[p, c]), float(teacher_logits[p, c]), beta)
    return float(total / student_logits.size if divisor is None else total / (divisor + EPS32))


def class_term(
    student_scores: Array,
    teacher_scores: Array,
    position_weights: Array,
    divisor: float,
    beta: float = 1.0,
    weight: float = 1.0,
) -> float:
    """Return the class term on (N,C,H,W) scores; ``position_weights`` is (N, H W)."""
    samples, classes, height, width = student_scores.shape
    total = 0.0
    for n in range(samples):
        for h in range(height):
            for w in range(width):
                for c in range(classes):
                    total += float(position_weights[n, h * width + w]) * qfl(
                        float(student_scores[n, c, h, w]), float(teacher_scores[n, c, h, w]), beta
                    )
    return float(weight * total / (divisor + EPS32))


def box_term(
    student_boxes: Array,
    teacher_boxes: Array,
    teacher_scores: Array,
    position_weights: Array,
    temperature: float = 1.0,
    weight: float = 4.0,
) -> dict[str, float]:
    """Return "weight_sum" and "loss"; box maps are (N,4 (n+1),H,W), the bins of an edge adjacent."""
    samples, channels, height, width = student_boxes.shape
    bins = channels // 4
    total, weight_sum = 0.0, 0.0
    for n in range(samples):
        for h in range(height):
            for w in range(width):
                if float(position_weights[n, h * width + w]) == 0.0:
                    continue
                certainty = max(_sigmoid(float(v)) for v in teacher_scores[n, :, h, w])
                weight_sum += certainty
                for edge in range(4):
                    channel = range(edge * bins, (edge + 1) * bins)
                    s = [float(student_boxes[n, c, h, w]) / temperature for c in channel]
                    t = [float(teacher_boxes[n, c, h, w]) / temperature for c in channel]
                    s_lse = max(s) + math.log(math.fsum(math.exp(v - max(s)) for v in s))
                    t_lse = max(t) + math.log(math.fsum(math.exp(v - max(t)) for v in t))
                    for a, b in zip(s, t, strict=True):
                        gap = (b - t_lse) - (a - s_lse)
                        total += certainty * temperature**2 * math.exp(b - t_lse) * gap
    return {"weight_sum": weight_sum, "loss": float(weight * total / (4.0 + EPS32) / weight_sum)}
