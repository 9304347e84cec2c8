# SPDX-License-Identifier: Apache-2.0
"""Wide residual networks of small images: activation before convolution, three stages.

Reference: Zagoruyko and Komodakis, Wide Residual Networks, BMVC 2016.
"""

from collections.abc import Callable
from functools import partial
from typing import final

from torch import Tensor, nn

from tutelage.core.error import UserError


class Block(nn.Module):
    """Two activated 3x3 convolutions; where the shape changes, the shortcut starts from the activated input."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1, self.act1 = nn.BatchNorm2d(inputs), nn.ReLU()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2, self.act2 = nn.BatchNorm2d(outputs), nn.ReLU()
        self.drop = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's map, before any activation."""
        active = self.act1(self.bn1(x))
        y: Tensor = self.conv2(self.drop(self.act2(self.bn2(self.conv1(active)))))
        shortcut: Tensor = x if isinstance(self.shortcut, nn.Identity) else self.shortcut(active)
        return shortcut + y


@final
class WideResNet(nn.Module):
    """A wide residual network of 6n + 4 layers.

    Args:
        depth: 6n + 4.
        widening: factor on the 16, 32 and 64 channels of the stages.
        num_classes: K.
        in_channels: of the images.
        dropout: inside each block.

    Raises:
        UserError: if the depth is not 6n + 4.
    """

    def __init__(
        self, depth: int, widening: int, *, num_classes: int = 10, in_channels: int = 3, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if depth < 10 or depth % 6 != 4:
            raise UserError(f"a wide ResNet has 6n + 4 layers (10, 16, 22, 28, 40), not {depth}")
        wide = (16, 16 * widening, 32 * widening, 64 * widening)
        self.conv1 = nn.Conv2d(in_channels, wide[0], 3, 1, 1, bias=False)
        for number in (1, 2, 3):
            stride = 1 if number == 1 else 2
            first = Block(wide[number - 1], wide[number], stride, dropout)
            rest = [Block(wide[number], wide[number], 1, dropout) for _ in range((depth - 4) // 6 - 1)]
            setattr(self, f"layer{number}", nn.Sequential(first, *rest))
        self.bn, self.act = nn.BatchNorm2d(wide[3]), nn.ReLU()
        self.pool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.linear = nn.Linear(wide[3], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits `[B, K]` of images `[B, C, H, W]`."""
        x = self.conv1(x)
        for number in (1, 2, 3):
            x = self.get_submodule(f"layer{number}")(x)
        return self.linear(self.flatten(self.pool(self.act(self.bn(x)))))  # type: ignore[no-any-return]


#: Constructors by name, for `tutelage:NAME`.
ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    f"wrn_{depth}_{widening}": partial(WideResNet, depth, widening)
    for depth, widening in ((16, 1), (16, 2), (28, 10), (40, 1), (40, 2))
}
