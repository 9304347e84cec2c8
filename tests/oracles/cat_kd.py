# SPDX-License-Identifier: Apache-2.0
"""CAT-KD: class attention transfer (Guo et al. 2023).

CAM = the bias-free 1x1 classifier convolution's output, logits = GAP(CAM). Both CAMs are
adaptive-average-pooled to r x r and, optionally, divided by their norm over positions (floor 1e-12); L = mean
over elements of (CAM_s - CAM_t)^2. ``binarise`` first sets the teacher's CAM to 1 where it exceeds the mean
|CAM| of its map, else 0. Partial transfer keeps, per sample, the classes with the largest teacher logits: k
classes (form "paper") or those strictly above the k-th largest (form "code", k - 1 classes), and takes the
mean over the kept maps.
"""

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


def _mean(cam: Array, n: int, c: int) -> float:
    values = [float(v) for v in cam[n, c].flatten()]
    return math.fsum(values) / len(values)


def _grid(values: Array, size: int, normalise: bool) -> list[float]:
    height, width = values.shape
    out: list[float] = []
    for i in range(size):
        for j in range(size):
            rows = range(i * height // size, -(-(i + 1) * height // size))
            cols = range(j * width // size, -(-(j + 1) * width // size))
            total = math.fsum(float(values[h, w]) for h in rows for w in cols)
            out.append(total / (len(rows) * len(cols)))
    if normalise:
        norm = max(math.sqrt(math.fsum(v * v for v in out)), 1e-12)
        out = [v / norm for v in out]
    return out


def kept_classes(teacher_cam: Array, n: int, k: int, form: str) -> list[int]:
    """Return the classes of sample n that partial transfer keeps."""
    logits = [_mean(teacher_cam, n, c) for c in range(teacher_cam.shape[1])]
    order = sorted(range(len(logits)), key=logits.__getitem__, reverse=True)
    if form == "paper":
        return sorted(order[:k])
    if form == "code":
        limit = logits[order[k - 1]]
        return [c for c in range(len(logits)) if logits[c] > limit]
    raise ValueError(form)


def cat_kd(
    student_cam: Array,
    teacher_cam: Array,
    resolution: int = 2,
    normalise: bool = False,
    binarise: bool = False,
    partial: int | None = None,
    form: str = "paper",
) -> float:
    """Return the transfer loss; ``partial`` is k, or None for all classes."""
    samples, classes = student_cam.shape[:2]
    total, count = 0.0, 0
    for n in range(samples):
        kept = list(range(classes)) if partial is None else kept_classes(teacher_cam, n, partial, form)
        for c in kept:
            teacher = np.array(teacher_cam[n, c], dtype=np.float64)
            if binarise:
                limit = math.fsum(abs(float(v)) for v in teacher.flatten()) / teacher.size
                for h, w in np.ndindex(*teacher.shape):
                    teacher[h, w] = 1.0 if teacher[h, w] > limit else 0.0
            left = _grid(student_cam[n, c], resolution, normalise)
            right = _grid(teacher, resolution, normalise)
            total += math.fsum((a - b) ** 2 for a, b in zip(left, right, strict=True))
            count += len(left)
    return float(total / count)


def task_loss(student_cam: Array, target: Labels) -> float:
    """Return the cross-entropy of GAP(CAM)."""
    samples, classes = student_cam.shape[:2]
    total = 0.0
    for n in range(samples):
        logits = [_mean(student_cam, n, c) for c in range(classes)]
        top = max(logits)
        total += top + math.log(math.fsum(math.exp(v - top) for v in logits)) - logits[int(target[n])]
    return float(total / samples)
