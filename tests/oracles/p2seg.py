# SPDX-License-Identifier: Apache-2.0
"""P2Seg: segmentation from points by mutual distillation (Wang et al. 2024). One image at a time, P positions.

S2I: a position q of the weak map's thing class goes to the point of that class nearest to q + offset(q); before any
offset is learned, to the nearest to q. Offsets of an assignment: mean over assigned q of |offset(q) - (point - q)|_1.
center: mean over positions of (c(q) - max over points exp(-|q - point|^2 / (2 sigma^2)))^2.
I2S: a = sigmoid(e_i . e_j), target 1 where i and j went to one point;
L_aff = 1/2 sum_pos (1 - a) / (n_pos + 1) + 1/2 sum_neg a / (n_neg + 1), form "code": a once more through a sigmoid.
semantic: softmax over valid classes S, R = S (A divided by row sums), -log(R / sum_k R) of the weak class (form "code":
R are logits, beside those of other classes), mean of the hardest ceil(share P) positions, unknown ones counting 0.
"""

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


def assigned(points: Labels, weak: Labels, places: Array, offset: Array | None, background: int) -> list[int]:
    """Return the position of each position's point, -1 without one; `offset` is `[2, P]`."""
    found = []
    for q, label in enumerate(weak):
        best, nearest = -1, math.inf
        moved = places[q] if offset is None else places[q] + offset[:, q]
        for p, of in enumerate(points):
            if label >= 0 and label != background and of == label:
                distance = float(((moved - places[p]) ** 2).sum())
                if distance < nearest:
                    best, nearest = p, distance
        found.append(best)
    return found


def offsets(goal: list[int], places: Array, offset: Array) -> float:
    values = [float(np.abs(offset[:, q] - (places[p] - places[q])).sum()) for q, p in enumerate(goal) if p >= 0]
    return math.fsum(values) / max(len(values), 1)


def centers(points: Labels, places: Array, center: Array, sigma: float, background: int) -> float:
    total = 0.0
    for q in range(len(points)):
        height = 0.0
        for p, of in enumerate(points):
            if of >= 0 and of != background:
                height = max(height, math.exp(-float(((places[q] - places[p]) ** 2).sum()) / (2 * sigma**2)))
        total += (float(center[q]) - height) ** 2
    return total / len(points)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def likeness(embedding: Array) -> Array:
    positions = embedding.shape[1]
    out = np.zeros((positions, positions))
    for i, j in np.ndindex(positions, positions):
        out[i, j] = _sigmoid(float(embedding[:, i] @ embedding[:, j]))
    return out


def affinity(goal: list[int], a: Array, form: str) -> float:
    sums, counts = [0.0, 0.0], [0, 0]
    for i, one in enumerate(goal):
        for j, other in enumerate(goal):
            value = _sigmoid(float(a[i, j])) if form == "code" else float(a[i, j])
            kind = int(one >= 0 and one == other)
            sums[kind] += 1 - value if kind else value
            counts[kind] += 1
    return 0.5 * sums[1] / (counts[1] + 1) + 0.5 * sums[0] / (counts[0] + 1)


def semantic(logits: Array, a: Array, weak: Labels, valid: list[bool], share: float, form: str) -> float:
    classes, positions = logits.shape
    walked = np.zeros((classes, positions))
    for i in range(positions):
        mass = math.fsum(math.exp(float(logits[k, i])) for k in range(classes) if valid[k])
        for k in range(classes):
            if valid[k]:
                walked[k] += math.exp(float(logits[k, i])) / mass * a[i] / float(a[i].sum())
    losses = []
    for q, label in enumerate(weak):
        if label < 0:
            losses.append(0.0)
        elif form == "code":
            scores = [float(walked[k, q]) if valid[k] else float(logits[k, q]) for k in range(classes)]
            losses.append(math.log(math.fsum(math.exp(s) for s in scores)) - scores[label])
        else:
            losses.append(-math.log(float(walked[label, q]) / float(walked[:, q].sum())))
    hardest = sorted(losses, reverse=True)[: math.ceil(share * positions)]
    return math.fsum(hardest) / len(hardest)
