# SPDX-License-Identifier: Apache-2.0
"""Relations between the tokens of a text, from vectors of queries, keys and values."""

import math

import torch
from torch import Tensor


def head_scores(left: Tensor, right: Tensor, heads: int) -> Tensor:
    """Return the scaled products of the vectors of all pairs of tokens, head by head.

    Args:
        left: `[B, L, D]`, heads side by side.
        right: `[B, L, D]`.
        heads: into which D is cut.

    Returns:
        `[B, A, L, L]`: left_i . right_j / sqrt(D / A), before any softmax.

    Example:
        >>> head_scores(torch.ones(1, 2, 4), torch.ones(1, 2, 4), 1)
        tensor([[[[2., 2.],
                  [2., 2.]]]])
    """
    rows, length, width = left.shape
    one, other = (side.view(rows, length, heads, width // heads).transpose(1, 2) for side in (left, right))
    return one @ other.transpose(2, 3) / math.sqrt(width // heads)


def pairs_of(mask: Tensor) -> Tensor:
    """Return `[B, L, L]` bool: both tokens of a pair count."""
    return mask[:, :, None] & mask[:, None, :]


def mean_of_each(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of each row over what counts in it, 0 where nothing does.

    Args:
        values: `[B, ...]`.
        mask: `[B, ...]` bool, of a shape that broadcasts to that of the values.

    Returns:
        `[B]`.
    """
    mask = mask.expand_as(values)
    total = values.where(mask, 0.0).flatten(1).sum(1)
    return total / mask.flatten(1).sum(1).clamp(min=1)


def blanked(states: Tensor, mask: Tensor) -> Tensor:
    """Return vectors `[B, L, D]` that are 0 where a token does not count: infinities there spoil no gradient."""
    return torch.where(mask[:, :, None], states, 0.0)
