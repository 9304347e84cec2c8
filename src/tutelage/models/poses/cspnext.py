# SPDX-License-Identifier: Apache-2.0
"""CSPNeXt, the backbone of RTMPose: cross-stage partial blocks with large depthwise kernels and channel attention.

Modules are named as in the published checkpoints. Batch norm has PyTorch's own epsilon and momentum, as the pose
configurations leave it.
"""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

#: Width and blocks of each stage before scaling, and whether its blocks add their input.
STAGES = ((128, 3, True), (256, 6, True), (512, 6, True), (1024, 3, False))
#: Factors of depth and width by name.
FACTORS = {"t": (0.167, 0.375), "s": (0.33, 0.5), "m": (0.67, 0.75), "l": (1.0, 1.0), "x": (1.33, 1.25)}


class ConvModule(nn.Module):
    """A convolution without bias, batch norm, SiLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        padding = kernel // 2
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return `[B, C, H, W]`."""
        out: Tensor = self.act(self.bn(self.conv(x)))
        return out


class Separable(nn.Module):
    """A depthwise 5x5 and a pointwise convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise_conv = ConvModule(channels, channels, 5, groups=channels)
        self.pointwise_conv = ConvModule(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same shape."""
        out: Tensor = self.pointwise_conv(self.depthwise_conv(x))
        return out


class Block(nn.Module):
    """A 3x3 convolution and a separable 5x5 one."""

    def __init__(self, channels: int, *, shortcut: bool) -> None:
        super().__init__()
        self.conv1 = ConvModule(channels, channels, 3)
        self.conv2 = Separable(channels)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same shape."""
        out: Tensor = self.conv2(self.conv1(x))
        return x + out if self.shortcut else out


class ChannelAttention(nn.Module):
    """A weight in [0, 1] for each channel, from the pooled map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Conv2d(channels, channels, 1)
        self.act = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same shape."""
        weight: Tensor = self.act(self.fc(x.mean((2, 3), keepdim=True)))
        return x * weight


class CSPLayer(nn.Module):
    """Blocks on one half of the channels, nothing on the other; both joined, weighted and mixed."""

    def __init__(self, channels: int, blocks: int, *, shortcut: bool) -> None:
        super().__init__()
        half = channels // 2
        self.main_conv = ConvModule(channels, half, 1)
        self.short_conv = ConvModule(channels, half, 1)
        self.final_conv = ConvModule(2 * half, channels, 1)
        self.blocks = nn.Sequential(*(Block(half, shortcut=shortcut) for _ in range(blocks)))
        self.attention = ChannelAttention(2 * half)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same shape."""
        both = torch.cat((self.blocks(self.main_conv(x)), self.short_conv(x)), 1)
        out: Tensor = self.final_conv(self.attention(both))
        return out


class Pyramid(nn.Module):
    """Spatial pyramid pooling: maxima over 5, 9 and 13 pixels beside the map itself."""

    def __init__(self, channels: int, kernels: Sequence[int] = (5, 9, 13)) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = ConvModule(channels, half, 1)
        self.poolings = nn.ModuleList(nn.MaxPool2d(kernel, 1, kernel // 2) for kernel in kernels)
        self.conv2 = ConvModule(half * (len(kernels) + 1), channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same shape."""
        x = self.conv1(x)
        out: Tensor = self.conv2(torch.cat([x, *(pool(x) for pool in self.poolings)], 1))
        return out


@final
class CSPNeXt(nn.Module):
    """The backbone: a stem of stride 2 and four stages of stride 2 each.

    Args:
        deepen: factor of the number of blocks.
        widen: factor of the widths.
        in_channels: of the images.
        stages: so many of the four, for small images: three give maps of stride 16.

    Reference: Lyu et al., RTMDet: An Empirical Study of Designing Real-Time Object Detectors, arXiv 2212.07784.
    """

    def __init__(self, deepen: float = 1.0, widen: float = 1.0, in_channels: int = 3, stages: int = 4) -> None:
        super().__init__()
        self.stages = stages
        width = int(64 * widen)
        half = int(64 * widen // 2)
        self.stem = nn.Sequential(
            ConvModule(in_channels, half, 3, stride=2), ConvModule(half, half, 3), ConvModule(half, width, 3)
        )
        for number, (channels, count, shortcut) in enumerate(STAGES[:stages], 1):
            goal, blocks = int(channels * widen), max(round(count * deepen), 1)
            layers: list[nn.Module] = [ConvModule(width, goal, 3, stride=2)]
            layers += [Pyramid(goal)] if number == stages else []
            self.add_module(f"stage{number}", nn.Sequential(*layers, CSPLayer(goal, blocks, shortcut=shortcut)))
            width = goal
        self.channels = width

    def forward(self, x: Tensor) -> Tensor:
        """Return the last map, of stride 32 with four stages."""
        x = self.stem(x)
        for number in range(1, self.stages + 1):
            x = self.get_submodule(f"stage{number}")(x)
        return x
