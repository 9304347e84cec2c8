# SPDX-License-Identifier: Apache-2.0
"""The residual networks of small images: three stages at full, half and quarter resolution.

Their key layout (`conv1, bn1, layer1.N.{conv1,bn1,conv2,bn2}, linear`) is that of the widely shared CIFAR-10
weights, which therefore load. Any input size works; on 8x8 digits the stages have 8, 4 and 2 pixels a side.

Reference: He et al., Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2; the wider
stages of resnet8x4 and resnet32x4: Tian et al., Contrastive Representation Distillation, ICLR 2020.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, final

from torch import Tensor, nn
from torch.nn import functional as F

from tutelage.core.error import UserError

Shortcut = Literal["A", "B"]


class Pad(nn.Module):
    """A shortcut without parameters (option A): every second pixel, zeros for the new channels."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.channels, self.stride = channels, stride

    def forward(self, x: Tensor) -> Tensor:
        """Return `[B, channels, H / stride, W / stride]`, the given channels in the middle."""
        more = self.channels - x.shape[1]
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, more // 2, more - more // 2))


class Basic(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            if shortcut == "A" and outputs >= inputs:
                self.shortcut = nn.Sequential(Pad(outputs, stride))
            else:
                convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
                self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(outputs))
        self.act2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's map, after its last activation."""
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y)) + self.shortcut(x)
        return self.act2(y)  # type: ignore[no-any-return]


def stage(inputs: int, outputs: int, stride: int, blocks: int, shortcut: Shortcut) -> nn.Sequential:
    """Return a row of blocks, the first of which may stride."""
    rest = [Basic(outputs, outputs, 1, shortcut) for _ in range(blocks - 1)]
    return nn.Sequential(Basic(inputs, outputs, stride, shortcut), *rest)


@final
class ResNet(nn.Module):
    """A residual network of 6n + 2 layers.

    Args:
        depth: 6n + 2.
        num_classes: K.
        in_channels: of the images.
        channels: of the stem and of the three stages, before `width`.
        width: factor on all of them.
        shortcut: `A` (no parameters) or `B` (1x1 convolution and batch norm) where shapes change.

    Raises:
        UserError: if the depth is not 6n + 2.

    Example:
        >>> import torch
        >>> ResNet(8, num_classes=10, in_channels=1)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        depth: int,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        channels: tuple[int, int, int, int] = (16, 16, 32, 64),
        width: float = 1.0,
        shortcut: Shortcut = "A",
    ) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise UserError(f"a CIFAR ResNet has 6n + 2 layers (8, 14, 20, 26, 32, ...), not {depth}")
        if shortcut not in ("A", "B"):
            raise UserError(f"shortcut {shortcut!r} is not known; valid: A, B")
        stem, *wide = (max(1, round(count * width)) for count in channels)
        self.conv1 = nn.Conv2d(in_channels, stem, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.act1 = nn.ReLU()
        blocks = (depth - 2) // 6
        self.layer1 = stage(stem, wide[0], 1, blocks, shortcut)
        self.layer2 = stage(wide[0], wide[1], 2, blocks, shortcut)
        self.layer3 = stage(wide[1], wide[2], 2, blocks, shortcut)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(wide[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits `[B, K]` of images `[B, C, H, W]`."""
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.flatten(self.pool(x)))  # type: ignore[no-any-return]


#: Constructors by name, for `tutelage:NAME`.
ARCHITECTURES: dict[str, Callable[..., ResNet]] = {
    **{f"resnet{depth}": partial(ResNet, depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{n}x4": partial(ResNet, n, channels=(32, 64, 128, 256), shortcut="B") for n in (8, 32)},
}
