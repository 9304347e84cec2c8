# SPDX-License-Identifier: Apache-2.0
"""What a method's `golden()` says of losses of the classic layout, with their gradients."""

from collections.abc import Container, Mapping

import torch
from torch import Tensor


def with_gradients(
    losses: Mapping[str, Tensor], free: Mapping[str, Tensor], asked: Container[str], primary: str = "loss"
) -> dict[str, Tensor]:
    """Return the losses, and their gradients under the names that the case holds.

    Args:
        losses: by name; the gradients of `primary` have no suffix.
        free: inputs and weights by name.
        asked: names of the case.
    """
    answer = dict(losses)
    for name, loss in losses.items():
        suffix = "" if name == primary else f"__{name}"
        sought = {f"grad_{own}{suffix}": tensor for own, tensor in free.items()}
        sought = {own: tensor for own, tensor in sought.items() if own in asked}
        if not sought:
            continue
        found = torch.autograd.grad(loss, list(sought.values()), retain_graph=True, allow_unused=True)
        answer |= {
            own: torch.zeros_like(tensor) if grad is None else grad
            for (own, tensor), grad in zip(sought.items(), found, strict=True)
        }
    return answer
