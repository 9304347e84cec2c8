# SPDX-License-Identifier: Apache-2.0
"""How alike the positions of a map are: learned from instances, and used to carry scores from one to the other.

Reference: Wang et al., P2Seg: Pointly-supervised Segmentation via Mutual Distillation, ICLR 2024.
"""

import torch
from torch import Tensor


def affinity(features: Tensor) -> Tensor:
    """Return sigmoid(f_i . f_j) of every pair of positions.

    Args:
        features: `[B, D, P]`.

    Returns:
        `[B, P, P]` in (0, 1).

    Example:
        >>> affinity(torch.tensor([[[0.0, 1.0]]]))
        tensor([[[0.5000, 0.5000],
                 [0.5000, 0.7311]]])
    """
    return torch.sigmoid(features.mT @ features)


def together(masks: Tensor) -> Tensor:
    """Return which pairs of positions lie in a common mask.

    Args:
        masks: `[B, N, P]` bool, or 0 and 1; they may overlap.

    Returns:
        `[B, P, P]` bool.

    Example:
        >>> together(torch.tensor([[[1, 1, 0]]])).int()
        tensor([[[1, 1, 0],
                 [1, 1, 0],
                 [0, 0, 0]]], dtype=torch.int32)
    """
    inside = masks.float()
    return inside.mT @ inside > 0


def affinity_loss(likeness: Tensor, target: Tensor) -> Tensor:
    """Return how far affinities are from 1 in pairs that belong together and from 0 in others, of each image.

        1/2 sum_pos (1 - a) / (n_pos + 1) + 1/2 sum_neg a / (n_neg + 1)

    Args:
        likeness: `[B, P, P]` in [0, 1].
        target: `[B, P, P]` bool.

    Returns:
        `[B]`.

    Example:
        >>> affinity_loss(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.ones(1, 2, 2, dtype=torch.bool))
        tensor([0.2000])
    """
    alike = (1 - likeness).where(target, 0.0).sum((1, 2)) / (target.sum((1, 2)) + 1)
    apart = likeness.where(~target, 0.0).sum((1, 2)) / ((~target).sum((1, 2)) + 1)
    return (alike + apart) / 2


def random_walk(scores: Tensor, likeness: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return class probabilities after one step along affinities: softmax(scores) times the affinity of sum 1 a row.

    A position receives from position i the share a_ij / sum_j a_ij of what i believes: what comes out at a
    position need not add up to 1.

    Args:
        scores: `[B, K, P]` logits.
        likeness: `[B, P, P]`, not negative; rows may be zero.
        valid: `[B, K]` bool, the classes an image can have; all by default. Others keep probability 0.

    Returns:
        `[B, K, P]`.

    Example:
        >>> scores = torch.tensor([[[1e4, -1e4], [-1e4, 1e4]]])
        >>> random_walk(scores, torch.tensor([[[1.0, 1.0], [0.0, 1.0]]]))
        tensor([[[0.5000, 0.5000],
                 [0.0000, 1.0000]]])
    """
    if valid is not None:
        scores = scores.masked_fill(~valid[..., None], torch.finfo(scores.dtype).min)
    probabilities = scores.softmax(dim=1)
    if valid is not None:
        probabilities = probabilities.where(valid[..., None], 0.0)
    mass = likeness.sum(dim=2, keepdim=True)
    return probabilities @ (likeness / mass.clamp(min=torch.finfo(likeness.dtype).tiny))
