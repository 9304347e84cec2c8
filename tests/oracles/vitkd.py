# SPDX-License-Identifier: Apache-2.0
"""ViTKD: mimic the two first layers, generate the last one.

* mimicking: L_m = alpha / B * sum over layers, tokens, channels of (A_l(low_s,l) - low_t,l)^2;
* generation: x = A_h(high_s); the k = int(n (1 - lambda)) tokens with the smallest noise of a sample are
  kept, the others replaced by the mask token; the sqrt(n) x sqrt(n) grid passes G = conv3x3 - ReLU - conv3x3;
  L_g = beta / (lambda B) * sum over removed tokens of (G(x) - high_t)^2;
* L = L_m + L_g. A_l, A_h are linear layers with bias, present only when the widths differ.
"""

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def removed_mask(noise: Array, drop_ratio: float) -> Array:
    """Return (B,n): 1 on the tokens replaced by the mask token, 0 on the kept ones."""
    samples, tokens = noise.shape
    kept = int(tokens * (1 - drop_ratio))
    mask = np.ones((samples, tokens), dtype=np.float64)
    for b in range(samples):
        order = sorted(range(tokens), key=[float(v) for v in noise[b]].__getitem__)
        for rank in range(kept):
            mask[b, order[rank]] = 0.0
    return mask


def _linear(token: Array, weights: Mapping[str, Array], name: str) -> list[float]:
    values = [float(v) for v in token]
    if f"{name}.weight" not in weights:
        return values
    weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    return [
        float(bias[o]) + math.fsum(float(weight[o, i]) * values[i] for i in range(len(values)))
        for o in range(weight.shape[0])
    ]


def _three_by_three(grid: Array, weight: Array, bias: Array) -> Array:
    channels, height, width = grid.shape
    out = np.zeros((weight.shape[0], height, width), dtype=np.float64)
    for o, h, w in np.ndindex(*out.shape):
        value = float(bias[o])
        for dh in range(3):
            for dw in range(3):
                row, col = h + dh - 1, w + dw - 1
                if 0 <= row < height and 0 <= col < width:
                    for c in range(channels):
                        value += float(weight[o, c, dh, dw]) * float(grid[c, row, col])
        out[o, h, w] = value
    return out


def vitkd(
    student_low: Array,
    teacher_low: Array,
    student_high: Array,
    teacher_high: Array,
    weights: Mapping[str, Array],
    noise: Array,
    alpha: float = 3e-5,
    beta: float = 3e-6,
    drop_ratio: float = 0.5,
) -> dict[str, float]:
    """Return "mimic", "generation" (both weighted) and "loss".

    Low features are (B,2,n,D), high features (B,n,D); ``weights`` holds mask_token (1,1,Dt),
    generation.{0,2}.* and, when the widths differ, align_low.{0,1}.* and align_high.*.
    """
    samples, layers, tokens, width = teacher_low.shape
    mimic = 0.0
    for b in range(samples):
        for layer in range(layers):
            for i in range(tokens):
                aligned = _linear(student_low[b, layer, i], weights, f"align_low.{layer}")
                for d in range(width):
                    mimic += (aligned[d] - float(teacher_low[b, layer, i, d])) ** 2
    mimic = float(alpha * mimic / samples)

    side = math.isqrt(tokens)
    mask = removed_mask(noise, drop_ratio)
    generation = 0.0
    for b in range(samples):
        grid = np.zeros((width, side, side), dtype=np.float64)
        for i in range(tokens):
            aligned = _linear(student_high[b, i], weights, "align_high")
            for d in range(width):
                removed = mask[b, i] == 1.0
                grid[d, i // side, i % side] = weights["mask_token"][0, 0, d] if removed else aligned[d]
        hidden = _three_by_three(grid, weights["generation.0.weight"], weights["generation.0.bias"])
        for index in np.ndindex(*hidden.shape):
            hidden[index] = max(float(hidden[index]), 0.0)
        generated = _three_by_three(hidden, weights["generation.2.weight"], weights["generation.2.bias"])
        for i in range(tokens):
            if mask[b, i] == 1.0:
                for d in range(width):
                    difference = float(generated[d, i // side, i % side]) - float(teacher_high[b, i, d])
                    generation += difference**2
    generation = float(beta / drop_ratio * generation / samples)
    return {"mimic": mimic, "generation": generation, "loss": mimic + generation}
