# SPDX-License-Identifier: Apache-2.0
"""ShuffleNet V1 and V2 for small images.

References: Zhang et al., ShuffleNet, CVPR 2018; Ma et al., ShuffleNet V2, ECCV 2018; the variants for 32x32 images
follow Tian et al., Contrastive Representation Distillation, ICLR 2020.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import final

import torch
from torch import Tensor, nn


class Shuffle(nn.Module):
    """Deal the channels of g groups out in turn."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """Return the channels in another order."""
        batch, channels, height, width = x.shape
        dealt = x.view(batch, self.groups, channels // self.groups, height, width).transpose(1, 2)
        return dealt.reshape(batch, channels, height, width)


def normalised(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Return a convolution with batch norm."""
    return [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]


class Grouped(nn.Module):
    """The unit of V1: grouped 1x1, shuffle, depthwise 3x3, grouped 1x1."""

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int) -> None:
        super().__init__()
        added = outputs - inputs if stride == 2 else outputs
        first = 1 if inputs == 24 else groups
        middle = added // 4
        self.body = nn.Sequential(
            *normalised(inputs, middle, groups=first),
            nn.ReLU(),
            Shuffle(first),
            *normalised(middle, middle, 3, stride, groups=middle),
            nn.ReLU(),
            *normalised(middle, added, groups=groups),
        )
        self.pool = nn.AvgPool2d(3, 2, 1) if stride == 2 else None
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return the unit's map."""
        y = self.body(x)
        joined = x + y if self.pool is None else torch.cat([y, self.pool(x)], dim=1)
        return self.act(joined)  # type: ignore[no-any-return]


class Split(nn.Module):
    """The basic unit of V2: one half passes, the other is filtered."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.passing = half
        self.body = nn.Sequential(
            *normalised(half, half),
            nn.ReLU(),
            *normalised(half, half, 3, groups=half),
            *normalised(half, half),
            nn.ReLU(),
        )
        self.shuffle = Shuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the unit's map."""
        kept, changed = x.split([self.passing, x.shape[1] - self.passing], dim=1)
        return self.shuffle(torch.cat([kept, self.body(changed)], dim=1))  # type: ignore[no-any-return]


class Down(nn.Module):
    """The striding unit of V2: both halves are filtered."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.left = nn.Sequential(*normalised(inputs, inputs, 3, 2, inputs), *normalised(inputs, half), nn.ReLU())
        self.right = nn.Sequential(
            *normalised(inputs, half),
            nn.ReLU(),
            *normalised(half, half, 3, 2, half),
            *normalised(half, half),
            nn.ReLU(),
        )
        self.shuffle = Shuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the unit's map."""
        return self.shuffle(torch.cat([self.left(x), self.right(x)], dim=1))  # type: ignore[no-any-return]


@final
class ShuffleNetV1(nn.Module):
    """ShuffleNet with three groups; the stem keeps the resolution.

    Args:
        num_classes: K.
        in_channels: of the images.
        channels: of the three stages.
        blocks: units of each.
        groups: of the 1x1 convolutions.
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        channels: tuple[int, int, int] = (240, 480, 960),
        blocks: tuple[int, int, int] = (4, 8, 4),
        groups: int = 3,
    ) -> None:
        super().__init__()
        inputs = 24
        self.stem = nn.Sequential(*normalised(in_channels, inputs), nn.ReLU())
        for number, (outputs, units) in enumerate(zip(channels, blocks, strict=True), 1):
            first = Grouped(inputs, outputs, 2, groups)
            rest = [Grouped(outputs, outputs, 1, groups) for _ in range(units - 1)]
            setattr(self, f"layer{number}", nn.Sequential(first, *rest))
            inputs = outputs
        self.pool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.linear = nn.Linear(inputs, num_classes)

    def stages(self) -> Iterator[nn.Module]:
        """Yield the three stages."""
        return (self.get_submodule(f"layer{number}") for number in (1, 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits `[B, K]` of images `[B, C, H, W]`."""
        x = self.stem(x)
        for stage in self.stages():
            x = stage(x)
        return self.linear(self.flatten(self.pool(x)))  # type: ignore[no-any-return]


@final
class ShuffleNetV2(nn.Module):
    """ShuffleNet V2; the stem keeps the resolution.

    Args:
        num_classes: K.
        in_channels: of the images.
        channels: of the three stages and of the last convolution.
        blocks: basic units after the striding one of each stage.
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        channels: tuple[int, int, int, int] = (116, 232, 464, 1024),
        blocks: tuple[int, int, int] = (3, 7, 3),
    ) -> None:
        super().__init__()
        inputs = 24
        self.stem = nn.Sequential(*normalised(in_channels, inputs), nn.ReLU())
        for number, (outputs, units) in enumerate(zip(channels[:3], blocks, strict=True), 1):
            rest = [Split(outputs) for _ in range(units)]
            setattr(self, f"layer{number}", nn.Sequential(Down(inputs, outputs), *rest))
            inputs = outputs
        self.head = nn.Sequential(*normalised(inputs, channels[3]), nn.ReLU())
        self.pool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.linear = nn.Linear(channels[3], num_classes)

    def stages(self) -> Iterator[nn.Module]:
        """Yield the three stages."""
        return (self.get_submodule(f"layer{number}") for number in (1, 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits `[B, K]` of images `[B, C, H, W]`."""
        x = self.stem(x)
        for stage in self.stages():
            x = stage(x)
        return self.linear(self.flatten(self.pool(self.head(x))))  # type: ignore[no-any-return]


#: Constructors by name, for `tutelage:NAME`.
ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "shufflenetv1": ShuffleNetV1,
    "shufflenetv2": ShuffleNetV2,
    "shufflenetv2_x1_5": partial(ShuffleNetV2, channels=(176, 352, 704, 1024)),
}
