# SPDX-License-Identifier: Apache-2.0
"""Rows of all processes, with gradients that find their way back."""

from typing import Any

import torch
from torch import Tensor, distributed


class _Gather(torch.autograd.Function):
    """Gather rows of every rank; backward adds up what every rank wants of this rank's rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: tuple[int, ...]) -> Tensor:
        """Return the rows of all ranks, in rank order; `counts` says how many each has."""
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        distributed.all_gather(parts, padded)
        start = sum(counts[: distributed.get_rank()])
        ctx.own = slice(start, start + len(rows))
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Return this rank's rows of the gradients of all ranks, summed."""
        summed = gradients[0].contiguous()
        distributed.all_reduce(summed)
        return summed[ctx.own], None


def gather_rows(rows: Tensor) -> tuple[Tensor, int]:
    """Return the rows of all processes in rank order, and where this process's own begin.

    Gradients flow back to the process that a row came from. If each process returns the mean over its own
    rows of a comparison with all rows, the mean of the processes, and of their gradients, is that of one
    process with the whole batch. Processes may hold different numbers of rows; finding these out waits for
    the device.

    Args:
        rows: `[B, ...]`, of the same shape from the second dimension on in every process.

    Returns:
        `[sum of B, ...]` and an offset; the tensor itself and 0 in a single process.

    Example:
        >>> rows, start = gather_rows(torch.zeros(2, 3))
        >>> rows.shape, start
        (torch.Size([2, 3]), 0)
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return rows, 0
    lengths = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(distributed.get_world_size())]
    distributed.all_gather(lengths, torch.tensor([len(rows)], device=rows.device))
    counts = tuple(torch.cat(lengths).tolist())
    everyone: Tensor = _Gather.apply(rows, counts)
    return everyone, sum(counts[: distributed.get_rank()])
