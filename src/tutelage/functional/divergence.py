# SPDX-License-Identifier: Apache-2.0
"""Divergences between rows of logits: one convention for direction and reduction.

The student comes first, the teacher second; every function returns one value a row (`[B]`, or the leading shape
of its inputs): the caller divides. Classes masked in both (minus infinity) count nothing.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Return the cross-entropy of each row, - sum_k q_k log p_k with q the teacher's softmax.

    Args:
        student_logits: `[..., K]`.
        teacher_logits: `[..., K]`.

    Returns:
        `[...]`, summed over classes.

    Example:
        >>> cross_entropy(torch.zeros(1, 2), torch.zeros(1, 2))
        tensor([0.6931])
    """
    return soft_cross_entropy(student_logits, F.softmax(teacher_logits, dim=-1))


def soft_cross_entropy(student_logits: Tensor, target: Tensor) -> Tensor:
    """Return - sum_k target_k log softmax(student)_k of each row.

    Args:
        student_logits: `[..., K]`.
        target: `[..., K]` weights, usually probabilities.
    """
    log_probs = F.log_softmax(student_logits, dim=-1)
    return -(target * torch.where(target > 0, log_probs, 0.0)).sum(dim=-1)


def kl_divergence(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Return KL(teacher || student) of each row.

    Args:
        student_logits: `[..., K]`.
        teacher_logits: `[..., K]`.

    Returns:
        `[...]`, summed over classes, in nats.

    Example:
        >>> kl_divergence(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]))
        tensor([0.1109])
    """
    log_q = F.log_softmax(teacher_logits, dim=-1)
    log_p = F.log_softmax(student_logits, dim=-1)
    q = log_q.exp()
    return (q * torch.where(q > 0, log_q - log_p, 0.0)).sum(dim=-1)


def log_probabilities(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return both models' log-probabilities, and where both are finite; elsewhere the logarithms are 0.

    A class that one model masks (minus infinity) can then be left out of a sum without a gradient that is no
    number.

    Args:
        student_logits: `[..., K]`.
        teacher_logits: `[..., K]`.

    Returns:
        Three tensors `[..., K]`, the last of them bool.
    """
    log_p, log_q = F.log_softmax(student_logits, dim=-1), F.log_softmax(teacher_logits, dim=-1)
    both = log_p.isfinite() & log_q.isfinite()
    return log_p.masked_fill(~both, 0.0), log_q.masked_fill(~both, 0.0), both


def log_mixture(first: Tensor, second: Tensor, weight: float) -> Tensor:
    """Return log(weight * exp(first) + (1 - weight) * exp(second)), finite wherever one of both is."""
    if weight in (0.0, 1.0):
        return first if weight else second
    return torch.logaddexp(first + math.log(weight), second + math.log(1 - weight))


def skewed_kl(student_logits: Tensor, teacher_logits: Tensor, skew: float = 0.0, *, entropy: bool = True) -> Tensor:
    """Return KL(q || skew q + (1 - skew) p) of each row, with q the teacher and p the student.

    Args:
        student_logits: `[..., K]`.
        teacher_logits: `[..., K]`.
        skew: share of the teacher in the mixture; 0 is the forward divergence.
        entropy: take the teacher's entropy off; without it the row is a cross-entropy.

    Returns:
        `[...]`; a class that either model masks counts nothing.

    Example:
        >>> skewed_kl(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]))
        tensor([0.1109])
    """
    log_p, log_q, both = log_probabilities(student_logits, teacher_logits)
    gap = (log_q if entropy else 0.0) - log_mixture(log_q, log_p, skew)
    return (log_q.exp() * gap).where(both, 0.0).sum(dim=-1)


def skewed_reverse_kl(student_logits: Tensor, teacher_logits: Tensor, skew: float = 0.0) -> Tensor:
    """Return KL(p || skew p + (1 - skew) q) of each row, with p the student and q the teacher.

    Args:
        student_logits: `[..., K]`.
        teacher_logits: `[..., K]`.
        skew: share of the student in the mixture; 0 is the reverse divergence.

    Returns:
        `[...]`; a class that either model masks counts nothing.

    Example:
        >>> skewed_reverse_kl(torch.tensor([[0.0, 1.0]]), torch.zeros(1, 2))
        tensor([0.1109])
    """
    log_p, log_q, both = log_probabilities(student_logits, teacher_logits)
    return (log_p.exp() * (log_p - log_mixture(log_p, log_q, skew))).where(both, 0.0).sum(dim=-1)


def generalized_js(student_logits: Tensor, teacher_logits: Tensor, beta: float) -> Tensor:
    """Return beta KL(q || m) + (1 - beta) KL(p || m) of each row, m = beta q + (1 - beta) p, q the teacher.

    Args:
        student_logits: `[..., K]`.
        teacher_logits: `[..., K]`.
        beta: share of the teacher in the mixture, in (0, 1).

    Returns:
        `[...]`; a class that either model masks counts nothing.

    Example:
        >>> generalized_js(torch.zeros(1, 2), torch.tensor([[-1e4, 0.0]]), 0.5)
        tensor([0.2158])
    """
    log_p, log_q, both = log_probabilities(student_logits, teacher_logits)
    log_m = log_mixture(log_q, log_p, beta)
    parts = beta * log_q.exp() * (log_q - log_m) + (1 - beta) * log_p.exp() * (log_p - log_m)
    return parts.where(both, 0.0).sum(dim=-1)


def total_variation(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Return half the sum of absolute differences of probabilities of each row.

    Args:
        student_logits: `[..., K]`.
        teacher_logits: `[..., K]`.

    Returns:
        `[...]` in [0, 1]; a class that either model masks counts nothing.

    Example:
        >>> total_variation(torch.zeros(1, 2), torch.tensor([[-1e4, 0.0]]))
        tensor([0.5000])
    """
    log_p, log_q, both = log_probabilities(student_logits, teacher_logits)
    return 0.5 * (log_p.exp() - log_q.exp()).abs().where(both, 0.0).sum(dim=-1)
