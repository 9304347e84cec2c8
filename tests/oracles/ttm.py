# SPDX-License-Identifier: Apache-2.0
"""TTM and WTTM: transformed teacher matching (Zheng and Yang 2024).

u_c = softmax(t)_c^gamma, U = sum_c u_c, q = u / U, p = softmax(s) at temperature 1.
TTM = 1/B sum_n KL(q_n || p_n), WTTM = 1/B sum_n U_n KL(q_n || p_n), U constant, no T^2. gamma = 1/T.
"""

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def _log_softmax(row: list[float]) -> list[float]:
    top = max(row)
    lse = top + math.log(math.fsum(math.exp(v - top) for v in row))
    return [v - lse for v in row]


def ttm(student_logits: Array, teacher_logits: Array, gamma: float) -> dict[str, float]:
    """Return "ttm" and "wttm"."""
    samples, classes = student_logits.shape
    plain, weighted = 0.0, 0.0
    for n in range(samples):
        log_p = _log_softmax([float(v) for v in student_logits[n]])
        log_t = _log_softmax([float(v) for v in teacher_logits[n]])
        u = [math.exp(gamma * v) for v in log_t]
        mass = math.fsum(u)
        kl = 0.0
        for c in range(classes):
            q = u[c] / mass
            if q > 0.0:
                kl += q * (math.log(q) - log_p[c])
        plain += kl
        weighted += mass * kl
    return {"ttm": float(plain / samples), "wttm": float(weighted / samples)}
