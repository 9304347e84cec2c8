# SPDX-License-Identifier: Apache-2.0
"""Sums over pairs, a block of rows at a time: memory grows with the batch, not with its square."""

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.utils.checkpoint import checkpoint

#: Elements of the largest tensor of one block, 16 MiB of float32: what fits is computed at once.
SIZE = 2**22

Piece = tuple[int, ...]


def spans(rows: int, width: int, size: int | None = None) -> list[tuple[int, int]]:
    """Return consecutive spans (start, stop) of rows; a span times the width of a row is at most `size`.

    Args:
        rows: how many.
        width: elements a row needs.
        size: elements of a block, `SIZE` by default; a span has at least one row.

    Example:
        >>> spans(5, 10, size=20)
        [(0, 2), (2, 4), (4, 5)]
    """
    step = max(1, (SIZE if size is None else size) // max(width, 1))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def sum_over(pieces: Sequence[Piece], compare: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Return the sum of `compare(*piece, *tensors)` over all pieces.

    A single piece is computed as it stands. Of several, each is computed again in backward, so that between
    forward and backward nothing of them is kept.

    Args:
        pieces: integers that say which part to compute, such as a span of rows; at least one.
        compare: returns the 0-d sum over one piece; it may use nothing that changes until backward.
        tensors: what it reads.

    Example:
        >>> import torch
        >>> x = torch.arange(5.0)
        >>> sum_over(spans(5, 1, size=2), lambda start, stop, x: x[start:stop].sum(), x)
        tensor(10.)
    """
    if len(pieces) == 1:
        return compare(*pieces[0], *tensors)
    total: Tensor | None = None
    for piece in pieces:
        part: Tensor = checkpoint(compare, *piece, *tensors, use_reentrant=False, preserve_rng_state=False)
        total = part if total is None else total + part
    assert total is not None
    return total
