# SPDX-License-Identifier: Apache-2.0
"""TransKD: transformer-to-transformer distillation for segmentation (Liu et al. 2022).

Stages go from deep to shallow, i = 0 the deepest. CSF: x = BN(conv1x1(F_i)); from the second on y = the previous
x, resized (nearest), d = relu(BN(w mean_hw(x + y))) (one image: relu(w' mean) instead), a = softmax over the two
branches of [V_1 d + b_1, V_2 d + b_2], x = a_1 x + a_2 y; x is handed on, out_i = BN(conv3x3(x)). Batch norms use
the batch's statistics. L_map = sum_i HCL(out_i, F_i(t)), or sum_i CWD.

PEA: L_emb = sum_i w_i mean((E_i W_i' + c_i - E_i(t))^2). GL-Mixer, deepest embedding before its linear layer:
E <- a MHSA(E) + b conv1d(E) * sigmoid(conv1d(E)) + E. EA: f_i linear(E_i) + f_{i+L} LN(conv(input of stage i)).
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Weights = Mapping[str, Array]


def convolve(x: Array, weight: Array, bias: Array | None = None, stride: int = 1, padding: int = 0) -> Array:
    """Cross-correlation of `[B, C, H, W]`, one position at a time."""
    samples, _, height, width = x.shape
    outputs, _, rows, columns = weight.shape
    padded = np.zeros((samples, x.shape[1], height + 2 * padding, width + 2 * padding))
    padded[:, :, padding : padding + height, padding : padding + width] = x
    size = [(side + 2 * padding - kernel) // stride + 1 for side, kernel in ((height, rows), (width, columns))]
    out = np.zeros((samples, outputs, *size))
    for n, o, h, w in np.ndindex(*out.shape):
        window = padded[n, :, h * stride : h * stride + rows, w * stride : w * stride + columns]
        out[n, o, h, w] = float((window * weight[o]).sum()) + (0.0 if bias is None else float(bias[o]))
    return out


def batch_norm(x: Array, scale: Array, shift: Array) -> Array:
    out = np.zeros(x.shape)
    for c in range(x.shape[1]):
        values = [float(v) for v in x[:, c].flatten()]
        mean = math.fsum(values) / len(values)
        variance = math.fsum((v - mean) ** 2 for v in values) / len(values)
        out[:, c] = (x[:, c] - mean) / math.sqrt(variance + 1e-5) * scale[c] + shift[c]
    return out


def nearest(x: Array, height: int, width: int) -> Array:
    out = np.zeros((*x.shape[:2], height, width))
    for h in range(height):
        for w in range(width):
            out[:, :, h, w] = x[:, :, h * x.shape[2] // height, w * x.shape[3] // width]
    return out


def csf(maps: Sequence[Array], weights: Weights) -> list[Array]:
    """Return the fused maps, from shallow to deep as the given ones; weights as `skfs.0...`, 0 the deepest."""
    handed: Array | None = None
    fused: list[Array] = []
    for turn, features in enumerate(reversed(maps)):
        own = {name.removeprefix(f"skfs.{turn}."): w for name, w in weights.items() if name.startswith(f"skfs.{turn}.")}
        x = batch_norm(convolve(features, own["conv1.0.weight"]), own["conv1.1.weight"], own["conv1.1.bias"])
        if handed is not None:
            y = nearest(handed, *x.shape[2:])
            images, width = x.shape[:2]
            mean = np.array([[float((x + y)[n, c].mean()) for c in range(width)] for n in range(images)])
            if images == 1:
                hidden = mean @ own["fc1.0.weight"][:, :, 0, 0].T
            else:
                wide = (mean @ own["fc.0.weight"][:, :, 0, 0].T)[:, :, None, None]
                hidden = batch_norm(wide, own["fc.1.weight"], own["fc.1.bias"])[:, :, 0, 0]
            hidden = np.maximum(hidden, 0.0)
            gates = [hidden @ own[f"fcs.{k}.weight"][:, :, 0, 0].T + own[f"fcs.{k}.bias"] for k in (0, 1)]
            joined = np.zeros(x.shape)
            for n in range(images):
                for c in range(width):
                    first = 1 / (1 + math.exp(float(gates[1][n, c] - gates[0][n, c])))
                    joined[n, c] = first * x[n, c] + (1 - first) * y[n, c]
            x = joined
        handed = x
        out = convolve(x, own["conv2.0.weight"], padding=1)
        fused.insert(0, batch_norm(out, own["conv2.1.weight"], own["conv2.1.bias"]))
    return fused


def mse(one: Array, other: Array) -> float:
    return math.fsum(float(v) ** 2 for v in (one - other).flatten()) / one.size


def pooled(x: Array, size: int) -> Array:
    """Means over a grid of cells; a cell reaches from floor(i H / size) to ceil((i + 1) H / size)."""
    out = np.zeros((*x.shape[:2], size, size))
    for i in range(size):
        for j in range(size):
            rows = slice(i * x.shape[2] // size, -(-(i + 1) * x.shape[2] // size))
            columns = slice(j * x.shape[3] // size, -(-(j + 1) * x.shape[3] // size))
            out[:, :, i, j] = x[:, :, rows, columns].mean((2, 3))
    return out


def hcl(students: Sequence[Array], teachers: Sequence[Array]) -> float:
    total = 0.0
    for student, teacher in zip(students, teachers, strict=True):
        value, weight, weights = mse(student, teacher), 1.0, 1.0
        for size in (4, 2, 1):
            if size < student.shape[2]:
                weight /= 2
                value += weight * mse(pooled(student, size), pooled(teacher, size))
                weights += weight
        total += value / weights
    return total


def cwd(students: Sequence[Array], teachers: Sequence[Array], temperature: float) -> float:
    """Each `[B, C, positions...]`: T^2 / (B C) sum_bc KL(softmax(t_bc / T) || softmax(s_bc / T)), added up."""
    total = 0.0
    for student, teacher in zip(students, teachers, strict=True):
        images, width = student.shape[:2]
        for n in range(images):
            for c in range(width):
                s = [float(v) / temperature for v in student[n, c].flatten()]
                t = [float(v) / temperature for v in teacher[n, c].flatten()]
                log_s = max(s) + math.log(math.fsum(math.exp(v - max(s)) for v in s))
                log_t = max(t) + math.log(math.fsum(math.exp(v - max(t)) for v in t))
                kl = math.fsum(math.exp(b - log_t) * ((b - log_t) - (a - log_s)) for a, b in zip(s, t, strict=True))
                total += temperature**2 * kl / (images * width)
    return total


def linear(x: Array, weights: Weights, number: int) -> Array:
    """The linear layer of the embedding of this number, counted from 1, as `embed1_linearproject...`."""
    weight, bias = (weights[f"embed{number}_linearproject.{part}"] for part in ("weight", "bias"))
    return np.asarray([[weight @ token + bias for token in image] for image in x])


def pea(embeddings: Sequence[Array], teachers: Sequence[Array], coefficients: Sequence[float]) -> float:
    """Embeddings after their linear layers."""
    return sum(c * mse(one, other) for c, one, other in zip(coefficients, embeddings, teachers, strict=True))


def mixed(x: Array, weights: Weights, heads: int) -> Array:
    """The GL-Mixer's embedding, `[B, N, C]`."""
    images, tokens, width = x.shape
    each = width // heads
    out = np.array(x)
    for n in range(images):
        q, k, v = np.split(x[n] @ weights["attn4.qkv.weight"].T, 3, axis=1)
        seen = np.zeros((tokens, width))
        for head in range(heads):
            part = slice(head * each, (head + 1) * each)
            for i in range(tokens):
                scores = [float(q[i, part] @ k[j, part]) / math.sqrt(each) for j in range(tokens)]
                mass = [math.exp(score - max(scores)) for score in scores]
                seen[i, part] = sum(m / math.fsum(mass) * v[j, part] for j, m in enumerate(mass))
        attended = seen @ weights["attn4.proj.weight"].T + weights["attn4.proj.bias"]
        gated = np.zeros((tokens, width))
        for i in range(tokens):
            sides = []
            for name in ("conv1", "conv2"):
                value = np.array(weights[f"{name}.bias"], dtype=np.float64)
                for offset in (-1, 0, 1):
                    if 0 <= i + offset < tokens:
                        value = value + weights[f"{name}.weight"][:, :, offset + 1] @ x[n, i + offset]
                sides.append(value)
            gated[i] = sides[0] / (1 + np.exp(-sides[1]))
        out[n] += float(weights["atten_weight"][0]) * attended + float(weights["conv_weight"][0]) * gated
    return out


def assisted(
    embeddings: Sequence[Array], inputs: Sequence[Array], weights: Weights, strides: Sequence[int]
) -> list[Array]:
    """The embedding assistant's outputs; `inputs` are the image and the maps of the stages before."""
    count, found = len(embeddings), []
    for i, (tokens, given, stride) in enumerate(zip(embeddings, inputs, strides, strict=True)):
        name = f"patch_embed{i + 1}"
        weight = weights[f"{name}.proj.weight"]
        patches = convolve(given, weight, weights[f"{name}.proj.bias"], stride, weight.shape[2] // 2)
        rows = patches.reshape(*patches.shape[:2], -1).transpose(0, 2, 1)
        mean, variance = rows.mean(-1, keepdims=True), rows.var(-1, keepdims=True)
        normal = (rows - mean) / np.sqrt(variance + 1e-5) * weights[f"{name}.norm.weight"] + weights[
            f"{name}.norm.bias"
        ]
        own, other = (float(weights[f"fuse_weights.{k}"][0]) for k in (i, i + count))
        found.append(own * linear(tokens, weights, i + 1) + other * normal)
    return found
