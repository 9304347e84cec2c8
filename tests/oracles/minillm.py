# SPDX-License-Identifier: Apache-2.0
"""MiniLLM (Gu et al. 2024): reverse KL on student samples by policy gradient.

Prompt length P, response length R; token j of the response is predicted at position P - 1 + j. A slot counts
where the predicting token is not padding. For the sampled tokens, log-probabilities set to 0 on the other
slots:

* reward r = (log p - log q_old) / scaling, clipped to +-clip; importance weight w = q_old / ((1-a) q_old + a
  p);
* return, form "code": R_t = sum_{k>=t} gamma^(k-t) r_k / max(slots that count from t on, 1), whitened over
  ALL slots: (R - mean) / sqrt(variance + 1e-8), variance unbiased;
  form "paper": R_t = sum_{k>t} gamma^(k-t-1) r_k / max(slots that count after t, 1), whitened over counting
  slots only;
* policy = mean over counting slots of max(-R rho w, -R clip(rho w, 1-c, 1+c)), rho = q / q_old;
* single step = mean over counting slots of KL(q || p) over the vocabulary; L = policy + single step;
* pre-training = (1-k) CE + k soft CE on plain text, the mean over labels that are not ignored.
"""

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


def _log_softmax(row: Array) -> list[float]:
    values = [float(v) for v in row]
    top = max(values)
    lse = top + math.log(math.fsum(math.exp(v - top) for v in values))
    return [v - lse for v in values]


def response_mask(query: Labels, response: Labels, pad_id: int) -> Array:
    """Return (B,R): 1 on the slots that count."""
    samples, length = response.shape
    prompt = query.shape[1]
    mask = np.zeros((samples, length), dtype=np.float64)
    for b in range(samples):
        tokens = [int(v) for v in query[b]] + [int(v) for v in response[b]]
        for j in range(length):
            mask[b, j] = 0.0 if tokens[prompt - 1 + j] == pad_id else 1.0
    return mask


def token_logprobs(logits: Array, query: Labels, response: Labels, mask: Array) -> Array:
    """Return (B,R): the log-probability of every response token, 0 on the slots that do not count."""
    prompt = query.shape[1]
    out = np.zeros(response.shape, dtype=np.float64)
    for b, j in np.ndindex(*response.shape):
        if mask[b, j] == 1.0:
            out[b, j] = _log_softmax(logits[b, prompt - 1 + j])[int(response[b, j])]
    return out


def rewards(teacher: Array, old: Array, scaling: float = 0.5, clip: float = 100.0) -> Array:
    """Return r from the token log-probabilities."""
    out = np.zeros(teacher.shape, dtype=np.float64)
    for index in np.ndindex(*teacher.shape):
        out[index] = min(max((float(teacher[index]) - float(old[index])) / scaling, -clip), clip)
    return out


def importance(teacher: Array, old: Array, mixed: float = 0.2) -> Array:
    """Return w from the token log-probabilities."""
    out = np.zeros(teacher.shape, dtype=np.float64)
    for index in np.ndindex(*teacher.shape):
        q, p = math.exp(float(old[index])), math.exp(float(teacher[index]))
        out[index] = q / ((1.0 - mixed) * q + mixed * p)
    return out


def advantages(reward: Array, mask: Array, gamma: float = 0.95, form: str = "paper") -> Array:
    """Return the whitened returns (0 on uncounted slots of the paper form)."""
    samples, length = reward.shape
    out = np.zeros((samples, length), dtype=np.float64)
    for b in range(samples):
        for t in range(length):
            start = {"code": t, "paper": t + 1}[form]
            total = math.fsum(gamma ** (k - start) * float(reward[b, k]) for k in range(start, length))
            count = math.fsum(float(mask[b, k]) for k in range(start, length))
            out[b, t] = total / max(count, 1.0)
    slots = [(b, t) for b in range(samples) for t in range(length) if form == "code" or mask[b, t] == 1.0]
    mean = math.fsum(float(out[slot]) for slot in slots) / len(slots)
    variance = math.fsum((float(out[slot]) - mean) ** 2 for slot in slots) / (len(slots) - 1)
    whitened = np.zeros((samples, length), dtype=np.float64)
    for slot in slots:
        whitened[slot] = (float(out[slot]) - mean) / math.sqrt(variance + 1e-8)
    return whitened


def minillm(
    student_logits: Array,
    old_logits: Array,
    teacher_logits: Array,
    query: Labels,
    response: Labels,
    pad_id: int,
    gamma: float = 0.95,
    scaling: float = 0.5,
    reward_clip: float = 100.0,
    ratio_clip: float = 0.2,
    mixed: float = 0.2,
    form: str = "paper",
) -> dict[str, float]:
    """Return "policy", "single_step" and their sum "loss"; logits are (B,P+R,V)."""
    mask = response_mask(query, response, pad_id)
    new = token_logprobs(student_logits, query, response, mask)
    old = token_logprobs(old_logits, query, response, mask)
    teacher = token_logprobs(teacher_logits, query, response, mask)
    weight = importance(teacher, old, mixed)
    advantage = advantages(rewards(teacher, old, scaling, reward_clip), mask, gamma, form)
    prompt = query.shape[1]
    policy, single, count = 0.0, 0.0, 0
    for b, j in np.ndindex(*response.shape):
        if mask[b, j] == 0.0:
            continue
        count += 1
        a = float(advantage[b, j])
        ratio = math.exp(float(new[b, j]) - float(old[b, j])) * float(weight[b, j])
        clipped = min(max(ratio, 1.0 - ratio_clip), 1.0 + ratio_clip)
        policy += max(-a * ratio, -a * clipped)
        log_q = _log_softmax(student_logits[b, prompt - 1 + j])
        log_p = _log_softmax(teacher_logits[b, prompt - 1 + j])
        for q, p in zip(log_q, log_p, strict=True):
            single += math.exp(q) * (q - p)
    policy, single = policy / count, single / count
    return {"policy": policy, "single_step": single, "loss": policy + single}


def pretrain(
    student_logits: Array,
    teacher_logits: Array,
    labels: Labels,
    kd_ratio: float = 0.5,
    ignore_index: int = -100,
) -> float:
    """Return the loss on plain text."""
    hard, soft, count = 0.0, 0.0, 0
    for b, i in np.ndindex(*labels.shape):
        if int(labels[b, i]) == ignore_index:
            continue
        count += 1
        log_q, log_p = _log_softmax(student_logits[b, i]), _log_softmax(teacher_logits[b, i])
        hard -= log_q[int(labels[b, i])]
        for q, p in zip(log_q, log_p, strict=True):
            soft -= math.exp(p) * q
    return float((1.0 - kd_ratio) * hard / count + kd_ratio * soft / count)
