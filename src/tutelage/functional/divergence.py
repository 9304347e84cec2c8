# SPDX-License-Identifier: Apache-2.0
"""Divergences between rows of logits: one convention for direction and reduction.

The student comes first, the teacher second; every function returns one value a row (`[B]`, or the leading shape
of its inputs): the caller divides. Classes masked in both (minus infinity) count nothing.
"""

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
