# SPDX-License-Identifier: Apache-2.0
"""Tables of rows that are remembered from step to step: reading them as if written, and writing them."""

import torch
from torch import Tensor


def as_written(bank: Tensor, place: Tensor, index: Tensor, rows: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return rows of a bank as they would be after `write(bank, index, rows, valid)`, which is not done.

    Args:
        bank: `[N, ...]`.
        place: `[M]` int64, which rows to return.
        index: `[B]` int64, where rows would be written. Of several for one place the last one counts.
        rows: `[B, ...]`.
        valid: `[B]` bool, which of them would be written; all by default.

    Returns:
        `[M, ...]` in the type of the bank.

    Example:
        >>> bank = torch.zeros(3)
        >>> as_written(bank, torch.arange(3), torch.tensor([1, 1]), torch.tensor([5.0, 6.0]))
        tensor([0., 6., 0.])
    """
    if not len(index):
        return bank[place]
    writer = torch.arange(len(index), device=index.device)
    if valid is not None:
        writer = torch.where(valid, writer, -1)
    last = torch.full((len(bank),), -1, device=index.device).scatter_reduce(0, index, writer, "amax")[place]
    fresh = (last >= 0).view(-1, *[1] * (bank.ndim - 1))
    return torch.where(fresh, rows[last.clamp(min=0)].to(bank.dtype), bank[place])


def write(bank: Tensor, index: Tensor, rows: Tensor, valid: Tensor | None = None) -> None:
    """Write rows into a bank, in place: for each place the last valid one.

    Every writer of a place writes the same, so that the result is the same on every device and at every run.

    Args:
        bank: `[N, ...]`.
        index: `[B]` int64.
        rows: `[B, ...]`.
        valid: `[B]` bool; all by default.
    """
    bank.index_copy_(0, index, as_written(bank, index, index, rows, valid))
