# SPDX-License-Identifier: Apache-2.0
"""The processes that train together: nothing to do when there is only one."""

import torch
from torch import Tensor, distributed


def world_size() -> int:
    """Return how many processes train together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Return this process's number, from 0."""
    return distributed.get_rank() if world_size() > 1 else 0


def mean(value: Tensor) -> Tensor:
    """Return a tensor averaged over the ranks."""
    if world_size() == 1:
        return value
    value = value.clone()
    distributed.all_reduce(value)
    return value / world_size()


def gather(value: Tensor) -> Tensor:
    """Return the rows of all ranks, in rank order; ranks may hold different numbers of rows."""
    if world_size() == 1:
        return value
    lengths = [torch.zeros(1, dtype=torch.int64, device=value.device) for _ in range(world_size())]
    distributed.all_gather(lengths, torch.tensor([len(value)], device=value.device))
    longest = int(torch.cat(lengths).max())
    padded = value.new_zeros(longest, *value.shape[1:])
    padded[: len(value)] = value
    parts = [torch.empty_like(padded) for _ in lengths]
    distributed.all_gather(parts, padded)
    return torch.cat([part[: int(length)] for part, length in zip(parts, lengths, strict=True)])
