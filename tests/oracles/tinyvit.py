# SPDX-License-Identifier: Apache-2.0
"""TinyViT: stored sparse soft labels (Wu et al. 2022).

Stored per image: the k largest teacher probabilities in descending order (float16), their classes (int16) and
a seed (int32) that regenerates the augmentation; a record is the seed, the classes, the values, little endian
(4 + 4 k bytes). Recovery: the stored values at their classes, (1 - their sum)/(C - k) elsewhere.
L = 1/B sum_n -sum_c target_c log softmax(s)_c.
"""

import math
import struct

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


def store(teacher_logits: Array, k: int) -> tuple[Labels, Array]:
    """Return (classes, values), both (B,k), the values rounded to float16 (ties: the lower class first)."""
    samples, classes = teacher_logits.shape
    index = np.zeros((samples, k), dtype=np.int64)
    value = np.zeros((samples, k), dtype=np.float64)
    for n in range(samples):
        row = [float(v) for v in teacher_logits[n]]
        top = max(row)
        mass = math.fsum(math.exp(v - top) for v in row)
        p = [math.exp(v - top) / mass for v in row]
        order = sorted(range(classes), key=p.__getitem__, reverse=True)
        for j in range(k):
            index[n, j] = order[j]
            value[n, j] = struct.unpack("<e", struct.pack("<e", p[order[j]]))[0]
    return index, value


def record(seed: int, index: Labels, value: Array) -> bytes:
    """Return the bytes of one image; ``index`` and ``value`` are (k)."""
    out = struct.pack("<i", seed)
    for c in index:
        out += struct.pack("<h", int(c))
    for v in value:
        out += struct.pack("<e", float(v))
    return out


def recover(index: Labels, value: Array, classes: int) -> Array:
    """Return the dense targets (B,C)."""
    samples, k = index.shape
    out = np.zeros((samples, classes), dtype=np.float64)
    for n in range(samples):
        rest = (1.0 - math.fsum(float(v) for v in value[n])) / (classes - k)
        for c in range(classes):
            out[n, c] = rest
        for j in range(k):
            out[n, int(index[n, j])] = value[n, j]
    return out


def tinyvit(student_logits: Array, teacher_logits: Array, k: int) -> float:
    """Return the loss of the student against the stored labels."""
    samples, classes = student_logits.shape
    targets = recover(*store(teacher_logits, k), classes)
    total = 0.0
    for n in range(samples):
        row = [float(v) for v in student_logits[n]]
        top = max(row)
        lse = top + math.log(math.fsum(math.exp(v - top) for v in row))
        for c in range(classes):
            total -= float(targets[n, c]) * (row[c] - lse)
    return float(total / samples)
