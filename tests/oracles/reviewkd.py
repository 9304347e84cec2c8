# SPDX-License-Identifier: Apache-2.0
"""ReviewKD: knowledge review (Chen et al. 2021).

Levels go from deep to shallow, i = 0 the deepest (the pooled vector as a 1x1 map). Fusion (ABF) of level i:
x = BN(conv1x1(F_i)); from the second level on r = previous x, resized (nearest) to the student size of level
i, [a_1, a_2] = sigmoid(conv1x1([x, r])), x = a_1 x + a_2 r; then x is resized (nearest) to the teacher size
when that differs and handed on as the next residual; out_i = BN(conv3x3(x)). Batch norms use the batch's
statistics.

HCL(s, t) = [ mse(s, t) + sum over k in 4, 2, 1 with k < H of w_k mse(AAP_k s, AAP_k t) ] / (1 + sum w_k), the
weights 1/2, 1/4, 1/8 in order of use. L = sum_i HCL(out_i, t_i), in training times the method weight and
min(epoch / warmup_epochs, 1).
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def _convolve(x: Array, weight: Array, bias: Array | None, padding: int) -> Array:
    samples, channels, height, width = x.shape
    outputs, _, kernel, _ = weight.shape
    out = np.zeros((samples, outputs, height, width), dtype=np.float64)
    for n, o, h, w in np.ndindex(*out.shape):
        value = float(bias[o]) if bias is not None else 0.0
        for dh in range(kernel):
            for dw in range(kernel):
                row, col = h + dh - padding, w + dw - padding
                if 0 <= row < height and 0 <= col < width:
                    for c in range(channels):
                        value += float(weight[o, c, dh, dw]) * float(x[n, c, row, col])
        out[n, o, h, w] = value
    return out


def _batch_norm(x: Array, scale: Array, shift: Array, eps: float = 1e-5) -> Array:
    out = np.zeros(x.shape, dtype=np.float64)
    for c in range(x.shape[1]):
        values = [float(v) for v in x[:, c].flatten()]
        mean = math.fsum(values) / len(values)
        variance = math.fsum((v - mean) ** 2 for v in values) / len(values)
        for n in range(x.shape[0]):
            for h in range(x.shape[2]):
                for w in range(x.shape[3]):
                    normal = (float(x[n, c, h, w]) - mean) / math.sqrt(variance + eps)
                    out[n, c, h, w] = normal * float(scale[c]) + float(shift[c])
    return out


def _nearest(x: Array, height: int, width: int) -> Array:
    samples, channels, old_height, old_width = x.shape
    out = np.zeros((samples, channels, height, width), dtype=np.float64)
    for n, c, h, w in np.ndindex(*out.shape):
        out[n, c, h, w] = x[n, c, h * old_height // height, w * old_width // width]
    return out


def _adaptive_pool(x: Array, size: int) -> Array:
    samples, channels, height, width = x.shape
    out = np.zeros((samples, channels, size, size), dtype=np.float64)
    for n, c, i, j in np.ndindex(*out.shape):
        rows = range(i * height // size, -(-(i + 1) * height // size))
        cols = range(j * width // size, -(-(j + 1) * width // size))
        total = math.fsum(float(x[n, c, h, w]) for h in rows for w in cols)
        out[n, c, i, j] = total / (len(rows) * len(cols))
    return out


def _mse(a: Array, b: Array) -> float:
    total = 0.0
    for index in np.ndindex(*a.shape):
        total += (float(a[index]) - float(b[index])) ** 2
    return float(total / a.size)


def hcl(student: Array, teacher: Array) -> float:
    """Return the hierarchical context loss of one pair of maps."""
    loss = _mse(student, teacher)
    weight, weights = 1.0, 1.0
    for size in (4, 2, 1):
        if size >= student.shape[2]:
            continue
        weight /= 2.0
        loss += weight * _mse(_adaptive_pool(student, size), _adaptive_pool(teacher, size))
        weights += weight
    return loss / weights


def fuse(
    student_features: Sequence[Array],
    weights: Mapping[str, Array],
    student_sizes: Sequence[tuple[int, int]],
    teacher_sizes: Sequence[tuple[int, int]],
) -> list[Array]:
    """Return the fused maps; everything runs deep to shallow, sizes are (height, width).

    Keys: abfs.i.conv1.{0.weight,1.weight,1.bias}, abfs.i.att_conv.0.{weight,bias} (i > 0) and
    abfs.i.conv2.{0.weight,1.weight,1.bias}.
    """
    outputs: list[Array] = []
    residual: Array | None = None
    for i, features in enumerate(student_features):
        prefix = f"abfs.{i}"
        x = _convolve(features, weights[f"{prefix}.conv1.0.weight"], None, 0)
        x = _batch_norm(x, weights[f"{prefix}.conv1.1.weight"], weights[f"{prefix}.conv1.1.bias"])
        if residual is not None:
            residual = _nearest(residual, *student_sizes[i])
            stacked = np.concatenate([x, residual], axis=1)
            gate = _convolve(stacked, weights[f"{prefix}.att_conv.0.weight"], weights[f"{prefix}.att_conv.0.bias"], 0)
            mixed = np.zeros(x.shape, dtype=np.float64)
            for n, c, h, w in np.ndindex(*x.shape):
                own = 1.0 / (1.0 + math.exp(-float(gate[n, 0, h, w])))
                deeper = 1.0 / (1.0 + math.exp(-float(gate[n, 1, h, w])))
                mixed[n, c, h, w] = float(x[n, c, h, w]) * own + float(residual[n, c, h, w]) * deeper
            x = mixed
        if (x.shape[2], x.shape[3]) != tuple(teacher_sizes[i]):
            x = _nearest(x, *teacher_sizes[i])
        residual = x
        out = _convolve(x, weights[f"{prefix}.conv2.0.weight"], None, 1)
        outputs.append(_batch_norm(out, weights[f"{prefix}.conv2.1.weight"], weights[f"{prefix}.conv2.1.bias"]))
    return outputs


def reviewkd(
    student_features: Sequence[Array],
    teacher_features: Sequence[Array],
    weights: Mapping[str, Array],
) -> float:
    """Return the sum of HCL over levels; both lists run deep to shallow, pooled vectors as (B,C,1,1)."""
    student_sizes = [(x.shape[2], x.shape[3]) for x in student_features]
    teacher_sizes = [(x.shape[2], x.shape[3]) for x in teacher_features]
    fused = fuse(student_features, weights, student_sizes, teacher_sizes)
    total = 0.0
    for student, teacher in zip(fused, teacher_features, strict=True):
        total += hcl(student, teacher)
    return total


def warmup(epoch: int, warmup_epochs: int = 20) -> float:
    """Return the factor of the loss at an epoch."""
    return min(epoch / warmup_epochs, 1.0)
