# SPDX-License-Identifier: Apache-2.0
"""Vectors and the relations between pairs of them."""

import torch
from torch import Tensor


def unit(vectors: Tensor, dim: int = -1, floor: float = 1e-12, order: float = 2.0) -> Tensor:
    """Return vectors of length one; those shorter than `floor` become 0 and get no gradient.

    Dividing by the floor instead, as is usual, gives vectors of zeros gradients of 1e12.

    Args:
        vectors: of any shape.
        dim: along which a vector lies.
        floor: the length below which a vector has no direction.
        order: of the norm that measures the length.

    Example:
        >>> unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    length = torch.linalg.vector_norm(vectors, order, dim=dim, keepdim=True)
    return torch.where(length > floor, vectors / length.clamp(min=floor), 0.0)


def distances(rows: Tensor, others: Tensor) -> Tensor:
    """Return the Euclidean distance of each row to each other one, `[N, D]` and `[M, D]` to `[N, M]`.

    Differences are taken before squaring: the difference of near rows keeps its digits, as it does not with
    the Gram matrix. Equal rows have distance 0 and no gradient.

    Example:
        >>> distances(torch.zeros(1, 2), torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[5., 0.]])
    """
    return torch.cdist(rows, others, compute_mode="donot_use_mm_for_euclid_dist")
