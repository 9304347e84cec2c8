# SPDX-License-Identifier: Apache-2.0
"""CRD: contrastive representation distillation (Tian et al. 2020).

e = W f + b divided by its norm (floor 1e-12). Per sample K + 1 dataset indices, the first one positive.
Student anchors score the teacher memory, teacher anchors the student memory:
o_bk = exp(<M[idx_bk], e_b> / tau).
Z = N mean(o), one per side, taken from the first batch and constant afterwards. With x = o / Z:
L = -1/B [ sum_b log( x_b0 / (x_b0 + K/N + eps) ) + sum_{b, k>=1} log( (K/N) / (x_bk + K/N + eps) ) ],
summed over the two anchor sides. After scoring, M[positive] = normalise(m M[positive] + (1 - m) e).
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


@dataclass
class Step:
    """What one step gives: the losses, the normalisers and the memories after the update."""

    loss: float
    student_anchor: float
    teacher_anchor: float
    student_z: float
    teacher_z: float
    student_memory: Array
    teacher_memory: Array


def embed(features: Array, weight: Array, bias: Array) -> Array:
    """Return the normalised linear embedding (B,d)."""
    samples = features.shape[0]
    out = np.zeros((samples, weight.shape[0]), dtype=np.float64)
    for n in range(samples):
        x = [float(v) for v in features[n].flatten()]
        row = [
            float(bias[o]) + math.fsum(float(weight[o, i]) * x[i] for i in range(len(x)))
            for o in range(weight.shape[0])
        ]
        norm = max(math.sqrt(math.fsum(v * v for v in row)), 1e-12)
        for o in range(weight.shape[0]):
            out[n, o] = row[o] / norm
    return out


def _scores(anchors: Array, memory: Array, index: Labels, temperature: float) -> Array:
    out = np.zeros(index.shape, dtype=np.float64)
    for b in range(index.shape[0]):
        for k in range(index.shape[1]):
            row = memory[int(index[b, k])]
            dot = math.fsum(float(row[d]) * float(anchors[b, d]) for d in range(anchors.shape[1]))
            out[b, k] = math.exp(dot / temperature)
    return out


def _contrast(scores: Array, z: float, n_data: int, eps: float) -> float:
    samples, columns = scores.shape
    noise = (columns - 1) / n_data
    total = 0.0
    for b in range(samples):
        for k in range(columns):
            x = float(scores[b, k]) / z
            total += math.log((x if k == 0 else noise) / (x + noise + eps))
    return float(-total / samples)


def _updated(memory: Array, embeddings: Array, positive: Labels, momentum: float) -> Array:
    out = memory.copy()
    for b in range(embeddings.shape[0]):
        i = int(positive[b])
        row = [
            momentum * float(memory[i, d]) + (1.0 - momentum) * float(embeddings[b, d])
            for d in range(embeddings.shape[1])
        ]
        norm = max(math.sqrt(math.fsum(v * v for v in row)), 1e-12)
        for d in range(embeddings.shape[1]):
            out[i, d] = row[d] / norm
    return out


def crd(
    student_embedding: Array,
    teacher_embedding: Array,
    student_memory: Array,
    teacher_memory: Array,
    contrast_index: Labels,
    temperature: float = 0.07,
    momentum: float = 0.5,
    student_z: float | None = None,
    teacher_z: float | None = None,
    eps: float = 1e-7,
) -> Step:
    """Return one step; the normalisers of the first batch are computed when they are not given.

    ``contrast_index`` is (B,K+1), the positive first. ``student_z`` belongs to the student anchors.
    """
    n_data = student_memory.shape[0]
    student_scores = _scores(student_embedding, teacher_memory, contrast_index, temperature)
    teacher_scores = _scores(teacher_embedding, student_memory, contrast_index, temperature)
    count = contrast_index.size
    if student_z is None:
        student_z = math.fsum(float(v) for v in student_scores.flatten()) / count * n_data
    if teacher_z is None:
        teacher_z = math.fsum(float(v) for v in teacher_scores.flatten()) / count * n_data
    student_anchor = _contrast(student_scores, student_z, n_data, eps)
    teacher_anchor = _contrast(teacher_scores, teacher_z, n_data, eps)
    positive = contrast_index[:, 0]
    return Step(
        loss=student_anchor + teacher_anchor,
        student_anchor=student_anchor,
        teacher_anchor=teacher_anchor,
        student_z=student_z,
        teacher_z=teacher_z,
        student_memory=_updated(student_memory, student_embedding, positive, momentum),
        teacher_memory=_updated(teacher_memory, teacher_embedding, positive, momentum),
    )
