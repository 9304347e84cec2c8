# SPDX-License-Identifier: Apache-2.0
"""CWD: channel-wise distillation (Shu et al. 2021) on (N,C,H,W) maps.

p = softmax over the H W positions of a channel of map / T; L = T^2 / (N C) sum over samples and channels of
KL(p_t || p_s). When the widths differ the student first passes a bias-free 1x1 convolution; C is the width of
the compared maps (form "paper") or the student's width before that convolution (form "code").
Relatives: "spatial_kl" T^2 / (N H W) times the KL of softmaxes over channels at every pixel; "channel_mean"
the sum of squared differences of spatial means / (N C).
"""

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def _kl(student: list[float], teacher: list[float]) -> float:
    student_top, teacher_top = max(student), max(teacher)
    student_lse = student_top + math.log(math.fsum(math.exp(v - student_top) for v in student))
    teacher_lse = teacher_top + math.log(math.fsum(math.exp(v - teacher_top) for v in teacher))
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        p = math.exp(t - teacher_lse)
        if p > 0.0:
            total += p * ((t - teacher_lse) - (s - student_lse))
    return total


def _align(student_map: Array, kernel: Array) -> Array:
    samples, channels, height, width = student_map.shape
    out = np.zeros((samples, kernel.shape[0], height, width), dtype=np.float64)
    for n, o, h, w in np.ndindex(*out.shape):
        out[n, o, h, w] = math.fsum(float(kernel[o, c, 0, 0]) * float(student_map[n, c, h, w]) for c in range(channels))
    return out


def cwd(
    student_map: Array,
    teacher_map: Array,
    temperature: float = 4.0,
    kernel: Array | None = None,
    form: str = "paper",
) -> float:
    """Return the channel-wise loss at unit weight; ``kernel`` is the (Ct,Cs,1,1) convolution."""
    student = student_map if kernel is None else _align(student_map, kernel)
    samples, channels = student.shape[:2]
    total = 0.0
    for n in range(samples):
        for c in range(channels):
            total += _kl(
                [float(v) / temperature for v in student[n, c].flatten()],
                [float(v) / temperature for v in teacher_map[n, c].flatten()],
            )
    divisor = {"paper": channels, "code": student_map.shape[1]}[form]
    return float(temperature**2 * total / (samples * divisor))


def spatial_kl(student_map: Array, teacher_map: Array, temperature: float = 4.0) -> float:
    """Return the relative with a softmax over channels at every pixel."""
    samples, _, height, width = student_map.shape
    total = 0.0
    for n in range(samples):
        for h in range(height):
            for w in range(width):
                total += _kl(
                    [float(v) / temperature for v in student_map[n, :, h, w]],
                    [float(v) / temperature for v in teacher_map[n, :, h, w]],
                )
    return float(temperature**2 * total / (samples * height * width))


def channel_mean(student_map: Array, teacher_map: Array) -> float:
    """Return the relative that compares spatial means."""
    samples, channels, height, width = student_map.shape
    total = 0.0
    for n in range(samples):
        for c in range(channels):
            student = math.fsum(float(v) for v in student_map[n, c].flatten()) / (height * width)
            teacher = math.fsum(float(v) for v in teacher_map[n, c].flatten()) / (height * width)
            total += (student - teacher) ** 2
    return float(total / (samples * channels))
