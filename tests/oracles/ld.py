# SPDX-License-Identifier: Apache-2.0
"""LD: localisation distillation (Zheng et al. 2022).

Row of one edge: R = T^2 KL(softmax(t/T) || softmax(s/T)) averaged over its n + 1 bins.

* main region: weight * sum over edges of (box weight) R / divisor; valuable region: the same with the region
  value;
* class: weight * sum over boxes of (label weight) T^2 KL over classes at T, averaged over classes / number of
  boxes;
* region: thr_g = mean + unbiased std of the IoU of box g with the k anchors per level whose centres are
  nearest; an anchor belongs where alpha thr_g <= DIoU < thr_g, and its value is the largest IoU among such
  boxes, else 0. DIoU = inter / union - d^2 / diagonal^2 (form "paper"); form "code" divides by the anchor's
  area instead of the union; d = distance of centres, diagonal that of the enclosing box.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def _mean_kl(student: Array, teacher: Array, temperature: float) -> float:
    s = [float(v) / temperature for v in student]
    t = [float(v) / temperature for v in teacher]
    s_top, t_top = max(s), max(t)
    s_lse = s_top + math.log(math.fsum(math.exp(v - s_top) for v in s))
    t_lse = t_top + math.log(math.fsum(math.exp(v - t_top) for v in t))
    total = 0.0
    for a, b in zip(s, t, strict=True):
        total += math.exp(b - t_lse) * ((b - t_lse) - (a - s_lse))
    return float(temperature**2 * total / len(s))


def ld(
    student_corners: Array,
    teacher_corners: Array,
    box_weights: Array,
    divisor: float,
    temperature: float = 10.0,
    weight: float = 0.25,
) -> float:
    """Return a region's term; corners are (4P,n+1), ``box_weights`` (P) hold for the four edges of a box."""
    total = 0.0
    for row in range(student_corners.shape[0]):
        total += float(box_weights[row // 4]) * _mean_kl(student_corners[row], teacher_corners[row], temperature)
    return float(weight * total / divisor)


def ld_mean(student_corners: Array, teacher_corners: Array, temperature: float = 10.0) -> float:
    """Return the plain mean of the rows."""
    rows = student_corners.shape[0]
    return float(math.fsum(_mean_kl(student_corners[r], teacher_corners[r], temperature) for r in range(rows)) / rows)


def class_term(
    student_logits: Array,
    teacher_logits: Array,
    label_weights: Array,
    divisor: float,
    temperature: float = 2.0,
    weight: float = 10.0,
) -> float:
    """Return the classification term over P boxes."""
    total = 0.0
    for row in range(student_logits.shape[0]):
        total += float(label_weights[row]) * _mean_kl(student_logits[row], teacher_logits[row], temperature)
    return float(weight * total / divisor)


def _area(box: list[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def overlaps(anchor: Array, box: Array, form: str = "paper") -> tuple[float, float]:
    """Return (IoU, DIoU) of two boxes x1 y1 x2 y2."""
    a, b = [float(v) for v in anchor], [float(v) for v in box]
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0.0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0.0)
    inter = width * height
    union = _area(a) + _area(b) - inter
    distance = ((a[0] + a[2] - b[0] - b[2]) / 2.0) ** 2 + ((a[1] + a[3] - b[1] - b[3]) / 2.0) ** 2
    outer_width = max(a[2], b[2]) - min(a[0], b[0])
    outer_height = max(a[3], b[3]) - min(a[1], b[1])
    share = {"paper": union, "code": _area(a)}[form]
    return inter / union, inter / share - distance / (outer_width**2 + outer_height**2)


def valuable_region(
    anchors: Array,
    boxes: Array,
    level_sizes: Sequence[int],
    nearest: int = 9,
    alpha: float = 0.25,
    form: str = "paper",
) -> Array:
    """Return the region value of every anchor; ``level_sizes`` are the anchors per level, in order."""
    count = anchors.shape[0]
    values = np.zeros(count, dtype=np.float64)
    for g in range(boxes.shape[0]):
        centre_x = (float(boxes[g, 0]) + float(boxes[g, 2])) / 2.0
        centre_y = (float(boxes[g, 1]) + float(boxes[g, 3])) / 2.0
        candidates: list[float] = []
        start = 0
        for size in level_sizes:
            distances: list[tuple[float, int]] = []
            for a in range(start, start + size):
                x = (float(anchors[a, 0]) + float(anchors[a, 2])) / 2.0
                y = (float(anchors[a, 1]) + float(anchors[a, 3])) / 2.0
                distances.append((math.hypot(x - centre_x, y - centre_y), a))
            for _, a in sorted(distances)[:nearest]:
                candidates.append(overlaps(anchors[a], boxes[g], form)[0])
            start += size
        mean = math.fsum(candidates) / len(candidates)
        variance = math.fsum((v - mean) ** 2 for v in candidates) / (len(candidates) - 1)
        threshold = mean + math.sqrt(variance)
        for a in range(count):
            iou, diou = overlaps(anchors[a], boxes[g], form)
            if alpha * threshold <= diou < threshold:
                values[a] = max(float(values[a]), iou)
    return values
