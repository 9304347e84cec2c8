# SPDX-License-Identifier: Apache-2.0
"""SKD: structured distillation for segmentation (Liu et al. 2019).

* pair-wise: max-pool with kernel = stride = int(size * scale) (ceil mode, per axis), divide every position's
  channel vector by (its norm + 1e-8), the norm constant; A_ij = <f_i, f_j> over positions;
  L = 1/B sum_n sum_ij (A_s - A_t)_ij^2 / P^2, P the number of positions;
* pixel-wise: L = sum over samples and pixels of -sum_c softmax(t)_c log softmax(s)_c, divided by H W only
  (form "code") or by N H W (form "mean");
* holistic: D(x) = mean over what is left of the grid of five convolutions (fewer on small grids) of tanh(x), leaky
  by 0.1, with self-attention behind the last two of stride 2; the student loses -mean D(s), the discriminator
  mean D(s) - mean D(t) + lambda_gp mean ( |grad D(x)| - 1 )^2, x = u t + (1 - u) s.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def _pooled(features: Array, n: int, scale: float) -> list[list[float]]:
    _, channels, height, width = features.shape
    kernel_h, kernel_w = int(height * scale), int(width * scale)
    vectors: list[list[float]] = []
    for top in range(0, height, kernel_h):
        for left in range(0, width, kernel_w):
            rows = range(top, min(top + kernel_h, height))
            cols = range(left, min(left + kernel_w, width))
            vector = [max(float(features[n, c, h, w]) for h in rows for w in cols) for c in range(channels)]
            vectors.append(vector)
    return vectors


def pairwise(student_features: Array, teacher_features: Array, scale: float = 0.5) -> float:
    """Return the pair-wise term at unit weight."""
    samples = student_features.shape[0]
    total = 0.0
    for n in range(samples):
        sides: list[list[list[float]]] = []
        for features in (student_features, teacher_features):
            units: list[list[float]] = []
            for vector in _pooled(features, n, scale):
                norm = math.sqrt(math.fsum(v * v for v in vector)) + 1e-8
                units.append([v / norm for v in vector])
            sides.append(units)
        student, teacher = sides
        positions = len(student)
        for i in range(positions):
            for j in range(positions):
                left = math.fsum(a * b for a, b in zip(student[i], student[j], strict=True))
                right = math.fsum(a * b for a, b in zip(teacher[i], teacher[j], strict=True))
                total += (left - right) ** 2 / positions**2
    return float(total / samples)


def pixelwise(student_logits: Array, teacher_logits: Array, form: str = "code") -> float:
    """Return the pixel-wise term at unit weight."""
    samples, classes, height, width = student_logits.shape
    total = 0.0
    for n in range(samples):
        for h in range(height):
            for w in range(width):
                student = [float(v) for v in student_logits[n, :, h, w]]
                teacher = [float(v) for v in teacher_logits[n, :, h, w]]
                student_top, teacher_top = max(student), max(teacher)
                lse = student_top + math.log(math.fsum(math.exp(v - student_top) for v in student))
                mass = math.fsum(math.exp(v - teacher_top) for v in teacher)
                for c in range(classes):
                    total -= math.exp(teacher[c] - teacher_top) / mass * (student[c] - lse)
    divisor = {"code": height * width, "mean": samples * height * width}[form]
    return float(total / divisor)


def convolved(x: Array, weight: Array, bias: Array, stride: int, padding: int) -> Array:
    """Return the convolution of one image [C,H,W]."""
    kernel = weight.shape[2]
    wide = np.pad(x, ((0, 0), (padding, padding), (padding, padding)))
    rows, cols = ((side - kernel) // stride + 1 for side in wide.shape[1:])
    out = np.zeros((len(weight), rows, cols))
    for o, i, j in np.ndindex(len(weight), rows, cols):
        patch = wide[:, i * stride : i * stride + kernel, j * stride : j * stride + kernel]
        out[o, i, j] = float(bias[o]) + math.fsum((patch * weight[o]).flatten().tolist())
    return out


def attended(x: Array, weights: Mapping[str, Array]) -> Array:
    """Return one image [C,H,W] plus gamma times what its places say to each other."""
    query, key, value = (
        convolved(x, weights[f"{name}.weight"], weights[f"{name}.bias"], 1, 0).reshape(
            len(weights[f"{name}.weight"]), -1
        )
        for name in ("query", "key", "value")
    )
    out = np.zeros_like(value)
    for place in range(query.shape[1]):
        energy = [math.fsum((query[:, place] * key[:, other]).tolist()) for other in range(query.shape[1])]
        shares = [math.exp(one - max(energy)) for one in energy]
        for other, share in enumerate(shares):
            out[:, place] += share / math.fsum(shares) * value[:, other]
    return x + float(weights["gamma"][0]) * out.reshape(x.shape)


def judged(scores: Array, layers: Sequence[tuple[str, Mapping[str, Array]]], image: Array | None = None) -> list[float]:
    """Return D of each score map; layers are `conv`, `attention` and `last` in their order."""
    found = []
    for n, one in enumerate(scores):
        x = np.tanh(one)
        if image is not None:
            x = np.concatenate([x, image[n]])
        for kind, weights in layers:
            if kind == "attention":
                x = attended(x, weights)
            elif kind == "conv":
                x = convolved(x, weights["weight"], weights["bias"], 2, 1)
                x = np.where(x > 0, x, 0.1 * x)
            else:
                x = convolved(x, weights["weight"], weights["bias"], 1, 0)
        found.append(float(x.mean()))
    return found


def adversary(
    student: Array, teacher: Array, share: Array, judge: Callable[[Array], list[float]], penalty: float, step: float
) -> tuple[float, float]:
    """Return both parts at unit weight; the gradient of D by differences of this step."""
    samples = len(student)
    fake, real = judge(student), judge(teacher)
    total = 0.0
    for n in range(samples):
        u = float(share[n, 0])
        between = (u * teacher[n] + (1 - u) * student[n])[None]
        squares = []
        for place in np.ndindex(*between.shape):
            up, down = between.copy(), between.copy()
            up[place] += step
            down[place] -= step
            squares.append(((judge(up)[0] - judge(down)[0]) / (2 * step)) ** 2)
        total += fake[n] - real[n] + penalty * (math.sqrt(math.fsum(squares)) - 1) ** 2
    return -math.fsum(fake) / samples, total / samples
