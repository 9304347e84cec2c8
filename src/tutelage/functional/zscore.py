# SPDX-License-Identifier: Apache-2.0
"""Values with their mean taken off, in units of their standard deviation."""

import math

import torch
from torch import Tensor


def zscore(values: Tensor, dim: int | tuple[int, ...] = -1, *, correction: int = 1, eps: float = 1e-7) -> Tensor:
    """Return (values - mean) / (standard deviation + eps) along some dimensions.

    What is constant up to rounding, or a single value, has no deviation to be measured in: it becomes 0, without
    a slope.

    Args:
        values: any float tensor.
        dim: along which mean and deviation are taken.
        correction: 1 divides the sum of squares by n - 1, 0 by n.
        eps: added to the deviation.

    Example:
        >>> zscore(torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]]))
        tensor([[-1.0000,  0.0000,  1.0000],
                [ 0.0000,  0.0000,  0.0000]])
    """
    dims = (dim,) if isinstance(dim, int) else dim
    count = math.prod([values.shape[d] for d in dims])
    mean = values.mean(dims, keepdim=True)
    variance = (values - mean).square().sum(dims, keepdim=True) / max(count - correction, 1)
    least = eps + 8 * torch.finfo(values.dtype).eps * mean.detach().abs()
    constant = variance <= least.square()
    deviation = variance.where(~constant, 1.0).sqrt()
    return ((values - mean) / (deviation + eps)).where(~constant, 0.0)
