# SPDX-License-Identifier: Apache-2.0
"""ACAM-KD: masks over channels and positions, from features of teacher and student fused (Lan and Tian 2025).

Fusion, one image: q_p = W_q t_p + b_q, k_p = W_k s_p + b_k, v_p = W_v s_p + b_v at every position p (keys and values
after averaging over a grid of cells where the map is larger), f_p = sum_r softmax_r(<q_p, k_r> / sqrt(C_q)) v_r.
Masks: Mc_mk = sigmoid(c_m mean_p f_pk), Ms_mp = sigmoid(sum_k w_mk f_pk).
With E = t - s: Lc = 1/M sum_m (sum_k Mc_mk |E_k|^2) / (HW sum_k Mc_mk), Ls = 1/M sum_m (sum_p Ms_mp |E_p|^2) /
(C sum_p Ms_mp); as printed: Lc = 1/M sum_m 1/HW sum_k Mc_mk |Mc_mk E_k|^2, and
Ls = 1/M sum_m 1/C sum_p Ms_mp |Ms_mp E_p|^2.
Ldiv of either kind: 2 sum_{i != j} <M_i, M_j> / (sum_i |M_i|^2 + sum_j |M_j|^2). All averaged over images.
"""

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def _conv(x: Array, weight: Array, bias: Array) -> Array:
    """A 1x1 convolution of `[C, H, W]`."""
    out = np.zeros((len(weight), *x.shape[1:]))
    for h in range(x.shape[1]):
        for w in range(x.shape[2]):
            out[:, h, w] = weight[:, :, 0, 0] @ x[:, h, w] + bias
    return out


def _averaged(x: Array, most: int) -> Array:
    height, width = (min(side, most) for side in x.shape[1:])
    out = np.zeros((x.shape[0], height, width))
    for i in range(height):
        for j in range(width):
            rows = slice(i * x.shape[1] // height, -(-(i + 1) * x.shape[1] // height))
            columns = slice(j * x.shape[2] // width, -(-(j + 1) * x.shape[2] // width))
            out[:, i, j] = x[:, rows, columns].mean((1, 2))
    return out


def fused(student: Array, teacher: Array, weights: Mapping[str, Array], most: int = 32) -> Array:
    """Return `[B, C, H, W]`."""
    out = np.zeros(teacher.shape)
    for n in range(len(student)):
        query = _conv(teacher[n], weights["query.weight"], weights["query.bias"])
        small = _averaged(student[n], most)
        key = _conv(small, weights["key.weight"], weights["key.bias"]).reshape(len(query), -1)
        value = _conv(small, weights["value.weight"], weights["value.bias"]).reshape(teacher.shape[1], -1)
        for h in range(teacher.shape[2]):
            for w in range(teacher.shape[3]):
                scores = [float(query[:, h, w] @ key[:, r]) / math.sqrt(len(query)) for r in range(key.shape[1])]
                mass = [math.exp(score - max(scores)) for score in scores]
                out[n, :, h, w] = sum(m / math.fsum(mass) * value[:, r] for r, m in enumerate(mass))
    return out


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def masks(features: Array, channel_units: Array, spatial_units: Array) -> tuple[Array, Array]:
    """Return `[B, M, C]` and `[B, M, H, W]`; units are `[M, 1]` and `[M, C]`."""
    images, width, height, columns = features.shape
    over_channels = np.zeros((images, len(channel_units), width))
    over_positions = np.zeros((images, len(spatial_units), height, columns))
    for n in range(images):
        for m in range(len(channel_units)):
            for k in range(width):
                over_channels[n, m, k] = _sigmoid(float(channel_units[m, 0] * features[n, k].mean()))
            for h in range(height):
                for w in range(columns):
                    over_positions[n, m, h, w] = _sigmoid(float(spatial_units[m] @ features[n, :, h, w]))
    return over_channels, over_positions


def diversity(mask: Array) -> float:
    """Of `[B, M, ...]`."""
    total = 0.0
    for image in mask.reshape(*mask.shape[:2], -1):
        shared = squares = 0.0
        for i, one in enumerate(image):
            squares += float(one @ one)
            shared += math.fsum(float(one @ other) for j, other in enumerate(image) if i != j)
        total += 2 * shared / (2 * squares)
    return total / len(mask)


def parts(
    student: Array, teacher: Array, over_channels: Array, over_positions: Array, form: str
) -> tuple[float, float, float]:
    """Return Lc, Ls and Ldiv."""
    images, width, height, columns = teacher.shape
    units = over_channels.shape[1]
    channel = spatial = 0.0
    for n in range(images):
        apart = teacher[n] - student[n]
        for m in range(units):
            by_channel = [float((apart[k] ** 2).sum()) for k in range(width)]
            weights = [float(over_channels[n, m, k]) for k in range(width)]
            power = 1 if form == "normalized" else 3
            mass = math.fsum(weights) if form == "normalized" else 1.0
            found = math.fsum(w**power * e for w, e in zip(weights, by_channel, strict=True))
            channel += found / (height * columns * mass) / units
            places = [(h, w) for h in range(height) for w in range(columns)]
            at_place = [float((apart[:, h, w] ** 2).sum()) for h, w in places]
            weights = [float(over_positions[n, m, h, w]) for h, w in places]
            mass = math.fsum(weights) if form == "normalized" else 1.0
            found = math.fsum(w**power * e for w, e in zip(weights, at_place, strict=True))
            spatial += found / (width * mass) / units
    return channel / images, spatial / images, diversity(over_channels) + diversity(over_positions)
