# SPDX-License-Identifier: Apache-2.0
"""The class of each row, and logits without it: what splits an answer into target and non-target."""

import torch
from torch import Tensor


def class_index(target: Tensor, labelled: Tensor | None, teacher_logits: Tensor) -> Tensor:
    """Return one class a row: its label, the largest of its soft labels, or what the teacher says.

    Args:
        target: `[B]` classes (anything where unlabelled) or `[B, K]` soft labels.
        labelled: `[B]` bool; all rows by default.
        teacher_logits: `[B, K]`; their largest class stands in for a missing label.

    Returns:
        `[B]` int64; of equal values the lower class.

    Example:
        >>> teacher = torch.tensor([[0.0, 1.0, 2.0], [3.0, 1.0, 2.0]])
        >>> class_index(torch.tensor([1, -1]), torch.tensor([True, False]), teacher)
        tensor([1, 0])
    """
    given = target.argmax(dim=1) if target.ndim == 2 else target
    return given if labelled is None else torch.where(labelled, given, teacher_logits.argmax(dim=1))


def without(logits: Tensor, index: Tensor) -> Tensor:
    """Return logits whose softmax gives one class of each row no mass: minus infinity in its place.

    Args:
        logits: `[B, K]`.
        index: `[B]` the classes left out.

    Example:
        >>> without(torch.zeros(1, 3), torch.tensor([1])).softmax(1)
        tensor([[0.5000, 0.0000, 0.5000]])
    """
    return logits.scatter(1, index[:, None], -torch.inf)
