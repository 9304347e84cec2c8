# SPDX-License-Identifier: Apache-2.0
"""DWPose: features of the last map and SimCC logits, decayed by epoch (Yang et al. 2023).

L_fea = alpha / N * sum over n, c, h, w of (s - t)^2
L_logit = w / K * sum over x, y of mean over n of sum over k of KL( sm(beta t) || sm(beta s) ), summed over bins
r(e) = 1 - e / e_max, e from 0
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def _softmax(row: Array, beta: float) -> list[float]:
    top = max(beta * float(v) for v in row)
    raised = [math.exp(beta * float(v) - top) for v in row]
    return [v / math.fsum(raised) for v in raised]


def features(student: Array, teacher: Array, alpha: float) -> float:
    gaps = [
        (float(student[place]) - float(teacher[place])) ** 2
        for place in np.ndindex(student.shape[0], student.shape[1], student.shape[2], student.shape[3])
    ]
    return float(alpha * math.fsum(gaps) / student.shape[0])


def logits(student: Sequence[Array], teacher: Sequence[Array], weight: float, beta: float) -> float:
    total = []
    for one, other in zip(student, teacher, strict=True):
        for n in range(one.shape[0]):
            for k in range(one.shape[1]):
                p, q = _softmax(one[n, k], beta), _softmax(other[n, k], beta)
                total += [b * (math.log(b) - math.log(a)) / one.shape[0] for a, b in zip(p, q, strict=True) if b > 0]
    return float(weight * math.fsum(total) / student[0].shape[1])


def decay(epoch: int, epochs: int) -> float:
    return 1.0 - epoch / epochs
