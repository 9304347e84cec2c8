# SPDX-License-Identifier: Apache-2.0
"""BYOT: be your own teacher (Zhang et al. 2019); index 0 is the deepest classifier, constant as a teacher.

F_i = linear adaptation of the pooled feature of branch i, H the soft cross-entropy (batch mean, no T^2).

* form "paper": L = CE_0 + sum_{i>=1} [ (1-alpha) CE_i + alpha KL(p_0^T || p_i^T) ]
  + lambda sum_{i>=1} 1/B sum_n ||F_i,n - F_0,n||^2;
* form "code": L = CE_0 + sum_{i>=1} [ (1-alpha) CE_i + alpha H(p_0^T, z_i / T) ]
  + lambda sum_{i>=2} ||F_i - F_0||_F over the whole batch;
* form "masked": L = (1-alpha) sum_{i>=0} CE_i + alpha T^2 sum_{i>=1} H(p_0^T, z_i / T) + lambda sum_{i>=1} of
  the sum of (f_i - f_0)^2 where f_i > 0 or f_0 > 0, on features that already share the width (no adaptation).
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


def _log_softmax(row: Array, temperature: float) -> list[float]:
    values = [float(v) / temperature for v in row]
    top = max(values)
    lse = top + math.log(math.fsum(math.exp(v - top) for v in values))
    return [v - lse for v in values]


def _adapt(features: Array, n: int, weights: Mapping[str, Array], branch: int) -> list[float]:
    x = [float(v) for v in features[n]]
    key = f"adaptation.{branch - 1}"
    if f"{key}.weight" not in weights:
        return x
    weight, bias = weights[f"{key}.weight"], weights[f"{key}.bias"]
    return [
        float(bias[o]) + math.fsum(float(weight[o, i]) * x[i] for i in range(len(x))) for o in range(weight.shape[0])
    ]


def byot(
    logits: Sequence[Array],
    features: Sequence[Array],
    target: Labels,
    weights: Mapping[str, Array],
    temperature: float = 3.0,
    alpha: float = 0.3,
    feature_weight: float = 0.03,
    form: str = "paper",
) -> dict[str, float]:
    """Return the weighted "ce", "soft", "feature" and "loss"; keys adaptation.{i-1}.{weight,bias}."""
    if form not in ("paper", "code", "masked"):
        raise ValueError(form)
    samples, classes = logits[0].shape
    ce, soft, feature = 0.0, 0.0, 0.0
    for i in range(len(logits)):
        share = 1.0 if i == 0 and form != "masked" else 1.0 - alpha
        for n in range(samples):
            ce -= share * _log_softmax(logits[i][n], 1.0)[int(target[n])] / samples
            if i == 0:
                continue
            deepest = _log_softmax(logits[0][n], temperature)
            branch = _log_softmax(logits[i][n], temperature)
            for c in range(classes):
                entropy = deepest[c] if form == "paper" else 0.0
                soft += math.exp(deepest[c]) * (entropy - branch[c]) / samples
        if i == 0 or (i == 1 and form == "code"):
            continue
        squares = 0.0
        for n in range(samples):
            deepest_row = [float(v) for v in features[0][n]]
            row = [float(v) for v in features[i][n]] if form == "masked" else _adapt(features[i], n, weights, i)
            for a, b in zip(row, deepest_row, strict=True):
                if form != "masked" or a > 0.0 or b > 0.0:
                    squares += (a - b) ** 2
        if form == "paper":
            feature += squares / samples
        elif form == "code":
            feature += math.sqrt(squares)
        else:
            feature += squares
    scale = temperature**2 if form == "masked" else 1.0
    parts = {
        "ce": float(ce),
        "soft": float(alpha * scale * soft),
        "feature": float(feature_weight * feature),
    }
    parts["loss"] = math.fsum(parts.values())
    return parts
