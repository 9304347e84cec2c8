# SPDX-License-Identifier: Apache-2.0
"""Class probabilities kept as the few largest, and made whole again."""

from torch import Tensor


def largest(probs: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest entries of each row and where they stand, in falling order; of equal ones the lower.

    Args:
        probs: `[B, K]`.
        k: how many; all K where there are fewer.

    Returns:
        index `[B, k]` int64 and value `[B, k]`.

    Example:
        >>> import torch
        >>> largest(torch.tensor([[0.2, 0.5, 0.2, 0.1]]), 2)
        (tensor([[1, 0]]), tensor([[0.5000, 0.2000]]))
    """
    # topk leaves the order of ties open
    ranked = probs.sort(dim=1, descending=True, stable=True)
    return ranked.indices[:, :k], ranked.values[:, :k]


def spread(index: Tensor, value: Tensor, num_classes: int, *, clamped: bool = True) -> Tensor:
    """Return dense rows: the values at their places, what is missing to 1 shared equally by the other classes.

    Args:
        index: `[B, k]` places.
        value: `[B, k]`.
        num_classes: K.
        clamped: share nothing where rounded values sum to more than 1; otherwise the share is negative there.

    Example:
        >>> import torch
        >>> spread(torch.tensor([[1, 0]]), torch.tensor([[0.5, 0.2]]), 4)
        tensor([[0.2000, 0.5000, 0.1500, 0.1500]])
    """
    missing = 1 - value.sum(dim=1, keepdim=True)
    if clamped:
        missing = missing.clamp(min=0)
    share = missing / max(num_classes - index.shape[1], 1)
    return share.expand(-1, num_classes).scatter(1, index, value)
