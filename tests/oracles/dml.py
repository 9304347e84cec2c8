# SPDX-License-Identifier: Apache-2.0
"""DML: deep mutual learning (Zhang et al. 2018).

L_i = CE(z_i, y) + 1/(K-1) sum_{j != i} KL_ij at temperature 1, every peer j constant.

* form "paper": KL_ij = 1/B sum_n sum_c p_j (log p_j - log p_i);
* form "code":  KL_ij = 1/B sum_n sum_c p_j log(p_j / (p_i + 1e-8) + 1e-8), summed over peers, not averaged.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


def _log_softmax(row: Array) -> list[float]:
    values = [float(v) for v in row]
    top = max(values)
    lse = top + math.log(math.fsum(math.exp(v - top) for v in values))
    return [v - lse for v in values]


def peer_kl(own_logits: Array, peer_logits: Array, form: str = "paper") -> float:
    """Return the divergence of one network from one peer."""
    samples, classes = own_logits.shape
    total = 0.0
    for n in range(samples):
        own, peer = _log_softmax(own_logits[n]), _log_softmax(peer_logits[n])
        for c in range(classes):
            p = math.exp(peer[c])
            if form == "paper":
                total += p * (peer[c] - own[c])
            elif form == "code":
                total += p * math.log(p / (math.exp(own[c]) + 1e-8) + 1e-8)
            else:
                raise ValueError(form)
    return float(total / samples)


def dml(logits: Sequence[Array], target: Labels, own: int = 0, form: str = "paper") -> dict[str, float]:
    """Return "ce", "mutual" and "loss" of network ``own`` among the K networks."""
    samples = logits[own].shape[0]
    ce = 0.0
    for n in range(samples):
        ce -= _log_softmax(logits[own][n])[int(target[n])]
    ce = float(ce / samples)
    mutual = 0.0
    for j in range(len(logits)):
        if j != own:
            mutual += peer_kl(logits[own], logits[j], form)
    if form == "paper":
        mutual /= len(logits) - 1
    return {"ce": ce, "mutual": mutual, "loss": ce + mutual}
