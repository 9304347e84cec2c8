# SPDX-License-Identifier: Apache-2.0
r"""USKD: universal self-distillation without a teacher.

J = targets with values v (the label with value 1, or the two largest soft labels), p = softmax(s) and
w = softmax(W f + b).

* target:      P_j = p_j^2 + v_j - mean_n p_j^2 (each target column on its own), 0 where v_j = 0, constant;
               L_t = -mean_n sum_{j in J} P_j log p_j
* weak:        q = 0.9 label + 0.1 / C; L_w = -mu mean_n sum_i q_i log w_i
* non-target:  r_i = w_i / (1 - sum_J w_j + 1e-6) + g_i / (1 - sum_J g_j + 1e-6); the k-th largest r (targets
               included) gets 1/k; targets are removed and the rest is normalised to z;
               L_n = -mean_n sum_{i not in J} z_i log softmax(s over i not in J)_i
* total:       L = alpha L_t + beta L_n + L_w

``form="paper"`` ranks with g = p (also the first public revision), ``form="code"`` with g = log p (current
code).
"""

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


def _log_softmax(row: list[float]) -> list[float]:
    top = max(row)
    lse = top + math.log(math.fsum(math.exp(v - top) for v in row))
    return [v - lse for v in row]


def top_two(soft_labels: Array) -> tuple[Labels, Array]:
    """Return the classes and values of the two largest soft labels per row (ties: the lower class first)."""
    samples, classes = soft_labels.shape
    index = np.zeros((samples, 2), dtype=np.int64)
    value = np.zeros((samples, 2), dtype=np.float64)
    for n in range(samples):
        order = sorted(range(classes), key=lambda c: -float(soft_labels[n, c]))
        for j in range(2):
            index[n, j] = order[j]
            value[n, j] = soft_labels[n, order[j]]
    return index, value


def rank_classes(
    student_logits: Array,
    weak_logits: Array,
    target_index: Labels,
    form: str = "paper",
    eps: float = 1e-6,
) -> Labels:
    """Return (N,C): the classes of each sample by descending ranking score, targets included."""
    samples, classes = student_logits.shape
    order = np.zeros((samples, classes), dtype=np.int64)
    for n in range(samples):
        log_p = _log_softmax([float(v) for v in student_logits[n]])
        weak = [math.exp(v) for v in _log_softmax([float(v) for v in weak_logits[n]])]
        if form == "paper":
            final = [math.exp(v) for v in log_p]
        elif form == "code":
            final = log_p
        else:
            raise ValueError(form)
        targets = [int(j) for j in target_index[n]]
        weak_rest = 1.0 - math.fsum(weak[j] for j in targets) + eps
        final_rest = 1.0 - math.fsum(final[j] for j in targets) + eps
        score = [weak[i] / weak_rest + final[i] / final_rest for i in range(classes)]
        ranked = sorted(range(classes), key=score.__getitem__, reverse=True)
        for rank in range(classes):
            order[n, rank] = ranked[rank]
    return order


def uskd(
    student_logits: Array,
    mid_features: Array,
    weak_weight: Array,
    weak_bias: Array,
    labels: Array,
    target_index: Labels,
    target_value: Array,
    alpha: float = 1.0,
    beta: float = 0.1,
    mu: float = 0.005,
    form: str = "paper",
    smoothing: float = 0.1,
) -> dict[str, float]:
    """Return "target", "nontarget" (unit weights), "weak" (times mu) and "loss".

    ``labels`` is (N,C), one-hot or soft; ``target_index`` and ``target_value`` are (N,J): J = 1 for hard
    labels, 2 for soft labels (see :func:`top_two`).
    """
    samples, classes = student_logits.shape
    log_p = [_log_softmax([float(v) for v in student_logits[n]]) for n in range(samples)]

    target = 0.0
    for j in range(target_index.shape[1]):
        squared = [math.exp(log_p[n][int(target_index[n, j])]) ** 2 for n in range(samples)]
        batch_mean = math.fsum(squared) / samples
        for n in range(samples):
            v = float(target_value[n, j])
            smooth = squared[n] + v - batch_mean if v != 0.0 else 0.0
            target -= smooth * log_p[n][int(target_index[n, j])]
    target /= samples

    weak_logits = np.zeros((samples, classes), dtype=np.float64)
    weak = 0.0
    for n in range(samples):
        for i in range(classes):
            weak_logits[n, i] = float(weak_bias[i]) + math.fsum(
                float(weak_weight[i, c]) * float(mid_features[n, c]) for c in range(mid_features.shape[1])
            )
        log_w = _log_softmax([float(v) for v in weak_logits[n]])
        for i in range(classes):
            weak -= ((1.0 - smoothing) * float(labels[n, i]) + smoothing / classes) * log_w[i]
    weak *= mu / samples

    order = rank_classes(student_logits, weak_logits, target_index, form)
    nontarget = 0.0
    for n in range(samples):
        targets = {int(j) for j in target_index[n]}
        zipf = [0.0] * classes
        for rank in range(classes):
            zipf[int(order[n, rank])] = 1.0 / (rank + 1)
        others = [i for i in range(classes) if i not in targets]
        if not others:
            continue
        mass = math.fsum(zipf[i] for i in others)
        log_rest = _log_softmax([float(student_logits[n, i]) for i in others])
        for i, log_q in zip(others, log_rest, strict=True):
            nontarget -= zipf[i] / mass * log_q
    nontarget /= samples

    loss = alpha * target + beta * nontarget + weak
    return {"target": target, "nontarget": nontarget, "weak": weak, "loss": loss}
