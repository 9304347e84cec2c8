# SPDX-License-Identifier: Apache-2.0
"""Numbers on a device, without asking it to wait."""

from collections.abc import Sequence

import torch
from torch import Tensor


def constant(values: Sequence[float], like: Tensor) -> Tensor:
    """Return a few numbers as `[N]`, on the device and in the dtype of a tensor.

    They are written on the device one by one: a copy of a list from the host would wait for all that the device has
    still to do.

    Example:
        >>> constant((1, 2.5), torch.zeros(1))
        tensor([1.0000, 2.5000])
    """
    return torch.stack([like.new_full((), value) for value in values])
