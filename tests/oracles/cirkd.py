# SPDX-License-Identifier: Apache-2.0
"""CIRKD: cross-image relational distillation for segmentation (Yang et al. 2022).

* pixel term: mean over pixels of KL(softmax(t) || softmax(s)) over classes;
* mini-batch: channel-normalised features (floor 1e-12), S_ij = F_i^T F_j / tau for every ordered pair of
  images, i = j included; L = mean over the B^2 pairs of the mean over rows of KL(softmax row t || softmax row
  s);
* memory: student = normalised conv1x1 - BN - ReLU - conv1x1 (no biases), teacher normalised. The queues are
  updated before use; keys = the same drawn slots of every class; L = mean over the pixels that are not
  ignored of KL(softmax(anchor_t . keys / 0.1) || softmax(anchor_s . keys / 0.1)), once for pixel keys and
  once for region keys.

Update, per image and class in ascending order: region slot = normalised mean of the class's normalised
teacher pixels, pointer + 1; then K = min(#pixels, frequency) normalised pixels go to the pixel queue at the
pointer, or into the last K slots with the pointer set to 0 when pointer + K >= length. With a drawn
permutation of range(#pixels), form "paper" takes the class's own pixels perm[:K], form "code" the image
positions perm[:K].
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


def _unit(vector: list[float]) -> list[float]:
    norm = max(math.sqrt(math.fsum(v * v for v in vector)), 1e-12)
    return [v / norm for v in vector]


def _dot(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def _pixels(features: Array, n: int) -> list[list[float]]:
    _, _, height, width = features.shape
    return [_unit([float(v) for v in features[n, :, h, w]]) for h in range(height) for w in range(width)]


def _kl(student: list[float], teacher: list[float]) -> float:
    student_top, teacher_top = max(student), max(teacher)
    student_lse = student_top + math.log(math.fsum(math.exp(v - student_top) for v in student))
    teacher_lse = teacher_top + math.log(math.fsum(math.exp(v - teacher_top) for v in teacher))
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        total += math.exp(t - teacher_lse) * ((t - teacher_lse) - (s - student_lse))
    return total


def pixel(student_logits: Array, teacher_logits: Array) -> float:
    """Return the per-pixel term."""
    samples, _, height, width = student_logits.shape
    total = 0.0
    for n in range(samples):
        for h in range(height):
            for w in range(width):
                total += _kl(
                    [float(v) for v in student_logits[n, :, h, w]],
                    [float(v) for v in teacher_logits[n, :, h, w]],
                )
    return float(total / (samples * height * width))


def minibatch(student_features: Array, teacher_features: Array, tau: float = 0.1) -> float:
    """Return the mini-batch relation term."""
    samples = student_features.shape[0]
    total = 0.0
    for i in range(samples):
        for j in range(samples):
            si, sj = _pixels(student_features, i), _pixels(student_features, j)
            ti, tj = _pixels(teacher_features, i), _pixels(teacher_features, j)
            rows = 0.0
            for a in range(len(si)):
                rows += _kl([_dot(si[a], b) / tau for b in sj], [_dot(ti[a], b) / tau for b in tj])
            total += rows / len(si)
    return float(total / samples**2)


def project(
    features: Array, weights: Mapping[str, Array], keep: npt.NDArray[np.bool_] | None = None, eps: float = 1e-5
) -> Array:
    """Return the student's projection; keys 0.weight, 1.{weight,bias} (batch statistics, of kept cells), 3.weight."""
    samples, channels, height, width = features.shape
    cells = [(n, h, w) for n in range(samples) for h in range(height) for w in range(width)]
    first, last = weights["0.weight"], weights["3.weight"]
    hidden: list[list[float]] = []
    for n, h, w in cells:
        hidden.append(
            [
                math.fsum(float(first[o, c, 0, 0]) * float(features[n, c, h, w]) for c in range(channels))
                for o in range(first.shape[0])
            ]
        )
    for o in range(first.shape[0]):
        counted = [row[o] for cell, row in zip(cells, hidden, strict=True) if keep is None or keep[cell]]
        mean = math.fsum(counted) / len(counted)
        variance = math.fsum((one - mean) ** 2 for one in counted) / len(counted)
        for row in hidden:
            normal = (row[o] - mean) / math.sqrt(variance + eps)
            row[o] = max(normal * float(weights["1.weight"][o]) + float(weights["1.bias"][o]), 0.0)
    out = np.zeros((samples, last.shape[0], height, width), dtype=np.float64)
    for (n, h, w), row in zip(cells, hidden, strict=True):
        for o in range(last.shape[0]):
            out[n, o, h, w] = math.fsum(float(last[o, c, 0, 0]) * row[c] for c in range(len(row)))
    return out


def resize_labels(labels: Labels, height: int, width: int) -> Labels:
    """Return the nearest-resized label maps (N,height,width)."""
    samples, old_height, old_width = labels.shape
    out = np.zeros((samples, height, width), dtype=np.int64)
    for n, h, w in np.ndindex(*out.shape):
        out[n, h, w] = labels[n, h * old_height // height, w * old_width // width]
    return out


@dataclass
class Queues:
    """The teacher memories, (classes, slots, channels), and their pointers (classes)."""

    pixel: Array
    region: Array
    pixel_pointer: Labels
    region_pointer: Labels


def update(
    queues: Queues,
    teacher_features: Array,
    labels: Labels,
    permutations: Sequence[Labels],
    frequency: int = 16,
    ignore_label: int = -1,
    form: str = "paper",
) -> Queues:
    """Return the queues after one batch; ``permutations`` come in drawing order, labels at feature size."""
    pixel_queue, region_queue = queues.pixel.copy(), queues.region.copy()
    pixel_pointer, region_pointer = queues.pixel_pointer.copy(), queues.region_pointer.copy()
    draw = 0
    for n in range(teacher_features.shape[0]):
        vectors = _pixels(teacher_features, n)
        flat = [int(v) for v in labels[n].flatten()]
        for c in sorted(set(flat)):
            if c == ignore_label:
                continue
            members = [i for i in range(len(flat)) if flat[i] == c]
            channels = len(vectors[0])
            mean = [math.fsum(vectors[i][d] for i in members) / len(members) for d in range(channels)]
            region_queue[c, int(region_pointer[c])] = _unit(mean)
            region_pointer[c] = (int(region_pointer[c]) + 1) % region_queue.shape[1]

            count, length, pointer = min(len(members), frequency), pixel_queue.shape[1], int(pixel_pointer[c])
            order = [int(v) for v in permutations[draw][:count]]
            draw += 1
            if form == "paper":
                order = [members[i] for i in order]
            elif form != "code":
                raise ValueError(form)
            if pointer + count >= length:
                start, pixel_pointer[c] = length - count, 0
            else:
                start, pixel_pointer[c] = pointer, pointer + count
            for k in range(count):
                pixel_queue[c, start + k] = vectors[order[k]]
    return Queues(pixel_queue, region_queue, pixel_pointer, region_pointer)


def contrast(
    student_features: Array,
    teacher_features: Array,
    labels: Labels,
    queue: Array,
    slots: Sequence[int],
    temperature: float = 0.1,
    ignore_label: int = -1,
) -> float:
    """Return one memory term; the student is already projected, ``slots`` are those drawn for all classes."""
    keys = [[float(v) for v in queue[c, k]] for c in range(queue.shape[0]) for k in slots]
    total, count = 0.0, 0
    for n in range(student_features.shape[0]):
        student, teacher = _pixels(student_features, n), _pixels(teacher_features, n)
        flat = [int(v) for v in labels[n].flatten()]
        for i in range(len(flat)):
            if flat[i] == ignore_label:
                continue
            total += _kl(
                [_dot(student[i], key) / temperature for key in keys],
                [_dot(teacher[i], key) / temperature for key in keys],
            )
            count += 1
    return float(total / count)
