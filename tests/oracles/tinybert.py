# SPDX-License-Identifier: Apache-2.0
"""TinyBERT (Jiao et al. 2020): attention scores, hidden states, predictions.

k = teacher layers / student layers.

* attention: un-normalised scores after the additive mask; entries <= the threshold become 0 in both;
  L_att = sum over student layers m = 0 .. M-1 of mean (A_s,m - A_t,(m+1)k-1)^2;
* hidden: index 0 is the embedding output; L_hid = sum over m = 0 .. M of mean (W h_s,m + b - h_t,mk)^2, one
  shared linear layer;
* prediction: -softmax(t/T) . log softmax(s/T), averaged over B C (form "code") or over B (form "batch"), no
  T^2.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def attention(student_scores: Sequence[Array], teacher_scores: Sequence[Array], threshold: float = -100.0) -> float:
    """Return L_att; scores are (B,heads,L,L) per layer."""
    step = len(teacher_scores) // len(student_scores)
    total = 0.0
    for m in range(len(student_scores)):
        student, teacher = student_scores[m], teacher_scores[(m + 1) * step - 1]
        squares = 0.0
        for index in np.ndindex(*student.shape):
            s, t = float(student[index]), float(teacher[index])
            s = 0.0 if s <= threshold else s
            t = 0.0 if t <= threshold else t
            squares += (s - t) ** 2
        total += squares / student.size
    return float(total)


def hidden(student_states: Sequence[Array], teacher_states: Sequence[Array], weight: Array, bias: Array) -> float:
    """Return L_hid; states are (B,L,d), embeddings first."""
    step = (len(teacher_states) - 1) // (len(student_states) - 1)
    total = 0.0
    for m in range(len(student_states)):
        student, teacher = student_states[m], teacher_states[m * step]
        squares = 0.0
        for b, i, o in np.ndindex(*teacher.shape):
            fitted = float(bias[o]) + math.fsum(
                float(weight[o, d]) * float(student[b, i, d]) for d in range(student.shape[2])
            )
            squares += (fitted - float(teacher[b, i, o])) ** 2
        total += squares / teacher.size
    return float(total)


def prediction(student_logits: Array, teacher_logits: Array, temperature: float = 1.0, form: str = "code") -> float:
    """Return the soft cross-entropy of the last stage."""
    samples, classes = student_logits.shape
    total = 0.0
    for n in range(samples):
        s = [float(v) / temperature for v in student_logits[n]]
        t = [float(v) / temperature for v in teacher_logits[n]]
        s_lse = max(s) + math.log(math.fsum(math.exp(v - max(s)) for v in s))
        t_lse = max(t) + math.log(math.fsum(math.exp(v - max(t)) for v in t))
        for c in range(classes):
            total -= math.exp(t[c] - t_lse) * (s[c] - s_lse)
    return float(total / {"code": samples * classes, "batch": samples}[form])


def tinybert(
    student_scores: Sequence[Array],
    teacher_scores: Sequence[Array],
    student_states: Sequence[Array],
    teacher_states: Sequence[Array],
    weight: Array,
    bias: Array,
    threshold: float = -100.0,
) -> dict[str, float]:
    """Return "attention", "hidden" and their sum "loss"."""
    a = attention(student_scores, teacher_scores, threshold)
    h = hidden(student_states, teacher_states, weight, bias)
    return {"attention": a, "hidden": h, "loss": a + h}
