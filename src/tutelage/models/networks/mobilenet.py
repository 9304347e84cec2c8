# SPDX-License-Identifier: Apache-2.0
"""MobileNetV2 for small images, at half width as the CIFAR-100 tables have it.

Reference: Sandler et al., MobileNetV2: Inverted Residuals and Linear Bottlenecks, CVPR 2018; the variant for 32x32
images follows Tian et al., Contrastive Representation Distillation, ICLR 2020.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import final

from torch import Tensor, nn

#: Expansion (0: the constructor's), channels at full width, blocks and first stride of each row.
ROWS = ((1, 16, 1, 1), (0, 24, 2, 1), (0, 32, 3, 2), (0, 64, 4, 2), (0, 96, 3, 1), (0, 160, 3, 2), (0, 320, 1, 1))


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Return a normalised, activated convolution."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [layer, nn.BatchNorm2d(outputs), nn.ReLU()]


class Inverted(nn.Module):
    """Expand, filter by depth, project; added to the input where shapes agree."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.body = nn.Sequential(
            *convolution(inputs, wide, 1),
            *convolution(wide, wide, 3, stride, groups=wide),
            nn.Conv2d(wide, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's map."""
        y: Tensor = self.body(x)
        return x + y if self.adds else y


@final
class MobileNetV2(nn.Module):
    """MobileNetV2 whose stem strides once, for 32x32 images.

    Args:
        num_classes: K.
        in_channels: of the images.
        width: factor on the channels.
        expansion: of the inverted blocks.
    """

    def __init__(self, *, num_classes: int = 10, in_channels: int = 3, width: float = 0.5, expansion: int = 6) -> None:
        super().__init__()
        inputs = int(32 * width)
        self.stem = nn.Sequential(*convolution(in_channels, inputs, 3, 2))
        for number, (own, channels, blocks, stride) in enumerate(ROWS):
            outputs = int(channels * width)
            row: list[nn.Module] = []
            for block in range(blocks):
                row.append(Inverted(inputs, outputs, stride if block == 0 else 1, own or expansion))
                inputs = outputs
            setattr(self, f"row{number}", nn.Sequential(*row))
        last = int(1280 * max(width, 1.0))
        self.head = nn.Sequential(*convolution(inputs, last, 1))
        self.pool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.linear = nn.Linear(last, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                area = module.kernel_size[0] * module.kernel_size[1]
                nn.init.normal_(module.weight, std=math.sqrt(2 / (area * module.out_channels)))
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits `[B, K]` of images `[B, C, H, W]`."""
        x = self.stem(x)
        for number in range(len(ROWS)):
            x = getattr(self, f"row{number}")(x)
        return self.linear(self.flatten(self.pool(self.head(x))))  # type: ignore[no-any-return]


#: Constructors by name, for `tutelage:NAME`.
ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {"mobilenetv2_half": partial(MobileNetV2, width=0.5)}
