# SPDX-License-Identifier: Apache-2.0
"""Convolutions that look at displaced places.

Reference: Dai et al., Deformable Convolutional Networks, ICCV 2017.
"""

from typing import final

import torch
from torch import Tensor, nn
from torchvision.ops import DeformConv2d

from tutelage.functional.precision import full_precision


@full_precision
def looked(layer: DeformConv2d, one: Tensor, offset: Tensor) -> Tensor:
    """Return a convolution at displaced places, which knows no half precision on every device.

    Args:
        layer: the convolution.
        one: `[B, C, H, W]`.
        offset: `[B, 2 k k, H', W']`: y and x of each place of the kernel, in cells.
    """
    out: Tensor = DeformConv2d.forward(layer, one.to(layer.weight.dtype), offset.to(layer.weight.dtype))
    return out


@final
class Deformed(DeformConv2d):
    """A convolution that tells from the map itself where to look; the plain one at first.

    Names of its weights are the plain convolution's.

    Args:
        plain: square, whose size, stride, padding, groups and weights it takes.
    """

    def __init__(self, plain: nn.Conv2d) -> None:
        size, stride, padding = (int(pair[0]) for pair in (plain.kernel_size, plain.stride, plain.padding))
        bias = plain.bias is not None
        super().__init__(plain.in_channels, plain.out_channels, size, stride, padding, groups=plain.groups, bias=bias)
        self.offset = nn.Conv2d(plain.in_channels, 2 * size * size, size, stride, padding)
        nn.init.zeros_(self.offset.weight)
        assert self.offset.bias is not None
        nn.init.zeros_(self.offset.bias)
        with torch.no_grad():
            self.weight.copy_(plain.weight)
            if self.bias is not None and plain.bias is not None:
                self.bias.copy_(plain.bias)

    def forward(self, one: Tensor) -> Tensor:
        """Return `[B, C', H', W']`."""
        return looked(self, one, self.offset(one))


def deform(stage: nn.Module) -> int:
    """Replace the 3x3 convolutions within a stage of a residual network; return how many there were."""
    count = 0
    for name, child in list(stage.named_children()):
        if isinstance(child, nn.Conv2d) and child.kernel_size == (3, 3):
            setattr(stage, name, Deformed(child))
            count += 1
        else:
            count += deform(child)
    return count
