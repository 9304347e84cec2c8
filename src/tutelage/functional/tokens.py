# SPDX-License-Identifier: Apache-2.0
"""Means over the tokens that count, and comparisons over a large vocabulary in bounded memory."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

#: Logits of one model that are compared at a time, unless said otherwise: 64 MB in float32.
AT_ONCE = 2**24

#: Rows of logits `[N, V]` and of what they are compared with to one value a row `[N]`.
Rows = Callable[[Tensor, Tensor], Tensor]


def token_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of values over the tokens that count, or a connected zero if there are none.

    Args:
        values: `[...]`.
        mask: `[...]` bool, true where a token counts.

    Example:
        >>> token_mean(torch.tensor([1.0, 3.0, 100.0]), torch.tensor([True, True, False]))
        tensor(2.)
    """
    return values.where(mask, 0.0).sum() / mask.sum().clamp(min=1)


def over_tokens(rows: Rows, student_logits: Tensor, other: Tensor, mask: Tensor, *, chunk: int | None = None) -> Tensor:
    """Return a divergence of each token, 0 where the token does not count.

    Tokens are compared in chunks. What a chunk needs beside the logits is made again in the backward pass and
    not kept, so that memory does not grow with the number of tokens; a single chunk is compared plainly. What
    stands in tokens that do not count reaches neither value nor gradient, infinities and nans included.

    Args:
        rows: the divergence, `[N, V]` and `[N, K]` to `[N]`.
        student_logits: `[..., V]`.
        other: `[..., K]`: the teacher's logits, or whatever the student's are compared with.
        mask: `[...]` bool.
        chunk: tokens at a time; by default as many as hold `AT_ONCE` logits.

    Returns:
        `[...]`.
    """
    vocabulary = student_logits.shape[-1]
    size = max(1, AT_ONCE // max(vocabulary, 1)) if chunk is None else chunk

    def counted(student: Tensor, compared: Tensor, kept: Tensor) -> Tensor:
        left_out = ~kept[:, None]
        return rows(student.masked_fill(left_out, 0), compared.masked_fill(left_out, 0)).where(kept, 0.0)

    flat = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (student_logits, other))
    given = (*flat, mask.reshape(-1))
    if mask.numel() <= size:
        return counted(*given).view(mask.shape)
    parts = [
        checkpoint(counted, *part, use_reentrant=False, preserve_rng_state=False)
        for part in zip(*(whole.split(size) for whole in given), strict=True)
    ]
    return torch.cat(parts).view(mask.shape)
