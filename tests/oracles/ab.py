# SPDX-License-Identifier: Apache-2.0
"""AB: activation boundaries (Heo et al. 2019), on connector outputs before any ReLU.

e(s, t) = (s + m)^2 where s > -m and t <= 0, (s - m)^2 where s <= m and t > 0, else 0.

* form "released": L = 3/1000 sum_l 2^(l - L + 1) sum(e) / B, l = 0 .. L - 1 from shallow to deep;
* form "sum": L = sum_l sum(e) / B;
* form "mean": L = sum_l mean(e).
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def ab(
    student_preactivations: Sequence[Array],
    teacher_preactivations: Sequence[Array],
    margin: float = 1.0,
    form: str = "released",
) -> float:
    """Return the loss over all layers."""
    layers = len(student_preactivations)
    total = 0.0
    for layer in range(layers):
        student, teacher = student_preactivations[layer], teacher_preactivations[layer]
        errors = 0.0
        for index in np.ndindex(*student.shape):
            s, t = float(student[index]), float(teacher[index])
            if s > -margin and t <= 0.0:
                errors += (s + margin) ** 2
            elif s <= margin and t > 0.0:
                errors += (s - margin) ** 2
        if form == "released":
            total += 3.0 / 1000.0 * 2.0 ** (layer - layers + 1) * errors / student.shape[0]
        elif form == "sum":
            total += errors / student.shape[0]
        elif form == "mean":
            total += errors / student.size
        else:
            raise ValueError(form)
    return float(total)
