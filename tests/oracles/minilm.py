# SPDX-License-Identifier: Apache-2.0
"""MiniLM (Wang et al. 2020, 2021): relations of the distilled layer.

Queries, keys and values (B,L,d) are split into A relation heads of width d / A. For a pair (m, n) of them and
one head, relation = softmax over j of <u_i, v_j> / sqrt(d / A) among the first len = sum(attention_mask)
positions. L = sum over pairs of weight * 1/B sum_b 1/(A len_b) sum over heads and rows of KL(teacher row ||
student row). Version 2: pairs (q,q), (k,k), (v,v) at weight 1/3. Version 1: (q,k) and (v,v) at weight 1, A =
the attention heads.
"""

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

VERSION_1 = {"q,k": 1.0, "v,v": 1.0}
VERSION_2 = {"q,q": 1.0 / 3.0, "k,k": 1.0 / 3.0, "v,v": 1.0 / 3.0}


def _row(left: Array, right: Array, b: int, head: int, heads: int, i: int, length: int) -> list[float]:
    width = left.shape[2] // heads
    start = head * width
    scores: list[float] = []
    for j in range(length):
        dot = math.fsum(float(left[b, i, d]) * float(right[b, j, d]) for d in range(start, start + width))
        scores.append(dot / math.sqrt(width))
    top = max(scores)
    lse = top + math.log(math.fsum(math.exp(v - top) for v in scores))
    return [v - lse for v in scores]


def minilm(
    student: Mapping[str, Array],
    teacher: Mapping[str, Array],
    attention_mask: npt.NDArray[np.generic],
    heads: int,
    relations: Mapping[str, float],
) -> float:
    """Return the weighted sum; the vectors are keyed "q", "k", "v" and the relations "q,k" and so on."""
    samples = attention_mask.shape[0]
    total = 0.0
    for pair, weight in relations.items():
        u, v = pair.split(",")
        for b in range(samples):
            length = sum(1 for flag in attention_mask[b] if flag)
            kl = 0.0
            for head in range(heads):
                for i in range(length):
                    log_s = _row(student[u], student[v], b, head, heads, i, length)
                    log_t = _row(teacher[u], teacher[v], b, head, heads, i, length)
                    for s, t in zip(log_s, log_t, strict=True):
                        kl += math.exp(t) * (t - s)
            total += weight * kl / (heads * length) / samples
    return float(total)
