# SPDX-License-Identifier: Apache-2.0
"""Towers of convolutions between a pyramid and the answers of a head, shared by its levels."""

import math
from collections.abc import Callable
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from tutelage.core.error import UserError, nearest

#: What normalises behind each convolution: groups of channels, the batch, or nothing.
Norm = Literal["group", "batch", "none"]
GROUPS = 32

M = TypeVar("M", bound=nn.Module)


def normalization(norm: Norm, option: str = "head_norm") -> Callable[[int], nn.Module] | None:
    """Return the maker of a normalisation of so many channels, or None.

    Args:
        norm: which.
        option: its name, for the message.

    Raises:
        UserError: on an unknown word.
    """
    if norm not in get_args(Norm):
        raise UserError(f"{option} {norm!r} is not known{nearest(str(norm), get_args(Norm))}")
    if norm == "group":
        return lambda width: nn.GroupNorm(math.gcd(GROUPS, width), width)
    return nn.BatchNorm2d if norm == "batch" else None


def tower(width_in: int, width: int, count: int, norm: Norm = "group") -> nn.Sequential:
    """Return so many 3x3 convolutions, each with its normalisation and a ReLU.

    Weights are drawn with deviation 0.01, as in published heads.

    Args:
        width_in: channels it takes.
        width: channels of every layer.
        count: of convolutions.
        norm: behind each of them; without one a convolution has a bias.

    Example:
        >>> [type(layer).__name__ for layer in tower(4, 8, 1)]
        ['Conv2d', 'GroupNorm', 'ReLU']
    """
    layer = normalization(norm)
    layers: list[nn.Module] = []
    for number in range(count):
        layers.append(nn.Conv2d(width if number else width_in, width, 3, padding=1, bias=layer is None))
        layers += [] if layer is None else [layer(width)]
        layers.append(nn.ReLU())
    return small(nn.Sequential(*layers))


def small(module: M, deviation: float = 0.01) -> M:
    """Draw the convolutions of a module anew, with a small deviation and without bias, and return it."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.normal_(part.weight, std=deviation)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    return module


def rarely(layer: M, probability: float = 0.01) -> M:
    """Let a layer of class logits begin with everything improbable, and return it.

    Reference: Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, section 3.3.
    """
    bias = layer.get_parameter("bias")
    nn.init.constant_(bias, -math.log((1 - probability) / probability))
    return layer


class Scale(nn.Module):
    """One learned factor, 1 at first."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """Return the input times the factor."""
        return x * self.weight
