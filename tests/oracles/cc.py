# SPDX-License-Identifier: Apache-2.0
"""CC: correlation congruence (Peng et al. 2019).

e = W f + b on the flattened features of each side, n_i = e_i / max(||e_i||, 1e-12).

* form "paper": K_ij = sum_{p=0..P} exp(-2 gamma) (2 gamma)^p / p! (n_i . n_j)^p, L = mean_ij (K_s - K_t)^2;
* form "neighbour": L = mean over i < B - 1 of sum_d |delta_i,d| |delta_{i+1},d|, delta = e_s - e_t;
* form "frobenius": L = ||K_s - K_t||_F / B^2 with e in place of n;
* form "bilinear": the same with K_ij = e_i . e_j.
"""

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def embed(features: Array, weight: Array, bias: Array) -> list[list[float]]:
    """Return the linear embedding of every sample."""
    rows: list[list[float]] = []
    for n in range(features.shape[0]):
        x = [float(v) for v in features[n].flatten()]
        rows.append(
            [
                float(bias[o]) + math.fsum(float(weight[o, i]) * x[i] for i in range(len(x)))
                for o in range(weight.shape[0])
            ]
        )
    return rows


def _kernel(rows: list[list[float]], gamma: float, order: int, form: str) -> list[list[float]]:
    if form == "paper":
        units = []
        for row in rows:
            norm = max(math.sqrt(math.fsum(v * v for v in row)), 1e-12)
            units.append([v / norm for v in row])
        rows = units
    matrix: list[list[float]] = []
    for a in rows:
        line: list[float] = []
        for b in rows:
            dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
            value = dot
            if form != "bilinear":
                value = 0.0
                for p in range(order + 1):
                    value += math.exp(-2.0 * gamma) * (2.0 * gamma) ** p / math.factorial(p) * dot**p
            line.append(value)
        matrix.append(line)
    return matrix


def cc(
    student_features: Array,
    teacher_features: Array,
    weights: Mapping[str, Array],
    gamma: float = 0.4,
    order: int = 2,
    form: str = "paper",
) -> float:
    """Return the loss; ``weights`` holds embed_s.{weight,bias} and embed_t.{weight,bias}."""
    student = embed(student_features, weights["embed_s.weight"], weights["embed_s.bias"])
    teacher = embed(teacher_features, weights["embed_t.weight"], weights["embed_t.bias"])
    samples = len(student)
    if form == "neighbour":
        delta = [[abs(a - b) for a, b in zip(s, t, strict=True)] for s, t in zip(student, teacher, strict=True)]
        total = 0.0
        for i in range(samples - 1):
            total += math.fsum(a * b for a, b in zip(delta[i], delta[i + 1], strict=True))
        return float(total / (samples - 1))
    if form not in ("paper", "frobenius", "bilinear"):
        raise ValueError(form)
    student_kernel = _kernel(student, gamma, order, form)
    teacher_kernel = _kernel(teacher, gamma, order, form)
    squares = 0.0
    for i in range(samples):
        for j in range(samples):
            squares += (student_kernel[i][j] - teacher_kernel[i][j]) ** 2
    return float((squares if form == "paper" else math.sqrt(squares)) / samples**2)
