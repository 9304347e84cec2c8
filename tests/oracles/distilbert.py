# SPDX-License-Identifier: Apache-2.0
"""DistilBERT (Sanh et al. 2019): the triple loss, over attended tokens unless stated.

* ce: T^2 times the mean over tokens of KL(softmax(t/T) || softmax(s/T));
* mlm: cross-entropy, the mean over positions whose label is not ignored;
* mse: sum (s - t)^2 of the logits / number of tokens;
* cos: mean over tokens of 1 - cos(h_s, h_t), last hidden states.

L = alpha_ce ce + alpha_mlm mlm + alpha_mse mse + alpha_cos cos.
"""

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


def _log_softmax(row: Array, temperature: float) -> list[float]:
    values = [float(v) / temperature for v in row]
    top = max(values)
    lse = top + math.log(math.fsum(math.exp(v - top) for v in values))
    return [v - lse for v in values]


def distilbert(
    student_logits: Array,
    teacher_logits: Array,
    student_hidden: Array,
    teacher_hidden: Array,
    attention_mask: npt.NDArray[np.generic],
    labels: Labels,
    temperature: float = 2.0,
    alpha_ce: float = 5.0,
    alpha_mlm: float = 2.0,
    alpha_mse: float = 0.0,
    alpha_cos: float = 1.0,
    ignore_index: int = -100,
) -> dict[str, float]:
    """Return the parts at unit weight and the weighted "loss"."""
    ce, mse, cos, tokens = 0.0, 0.0, 0.0, 0
    mlm, masked = 0.0, 0
    for b, i in np.ndindex(*labels.shape):
        if int(labels[b, i]) != ignore_index:
            masked += 1
            mlm -= _log_softmax(student_logits[b, i], 1.0)[int(labels[b, i])]
        if not attention_mask[b, i]:
            continue
        tokens += 1
        log_s = _log_softmax(student_logits[b, i], temperature)
        log_t = _log_softmax(teacher_logits[b, i], temperature)
        for s, t in zip(log_s, log_t, strict=True):
            ce += math.exp(t) * (t - s)
        mse += math.fsum(
            (float(s) - float(t)) ** 2 for s, t in zip(student_logits[b, i], teacher_logits[b, i], strict=True)
        )
        left = [float(v) for v in student_hidden[b, i]]
        right = [float(v) for v in teacher_hidden[b, i]]
        inner = math.fsum(x * y for x, y in zip(left, right, strict=True))
        norms = math.sqrt(math.fsum(x * x for x in left)) * math.sqrt(math.fsum(y * y for y in right))
        cos += 1.0 - inner / norms
    parts = {
        "ce": float(temperature**2 * ce / tokens),
        "mlm": mlm / masked,
        "mse": mse / tokens,
        "cos": cos / tokens,
    }
    parts["loss"] = (
        alpha_ce * parts["ce"] + alpha_mlm * parts["mlm"] + alpha_mse * parts["mse"] + alpha_cos * parts["cos"]
    )
    return parts
