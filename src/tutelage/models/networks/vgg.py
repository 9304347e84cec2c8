# SPDX-License-Identifier: Apache-2.0
"""VGG networks of small images: five groups of normalised 3x3 convolutions, one linear layer.

Reference: Simonyan and Zisserman, Very Deep Convolutional Networks, ICLR 2015; the variants for 32x32 images
follow Tian et al., Contrastive Representation Distillation, ICLR 2020.
"""

from collections.abc import Callable
from functools import partial
from typing import final

from torch import Tensor, nn

#: Convolutions in each of the five groups, by depth of the published name.
GROUPS = {8: (1, 1, 1, 1, 1), 11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
WIDTHS = (64, 128, 256, 512, 512)


@final
class VGG(nn.Module):
    """Five groups at 32, 16, 8, 4 and 4 pixels a side of a 32x32 image.

    Args:
        depth: 8, 11, 13, 16 or 19.
        num_classes: K.
        in_channels: of the images.
    """

    def __init__(self, depth: int, *, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        inputs = in_channels
        for number, (width, convolutions) in enumerate(zip(WIDTHS, GROUPS[depth], strict=True)):
            layers: list[nn.Module] = [nn.MaxPool2d(2)] if number in (1, 2, 3) else []
            for _ in range(convolutions):
                layers += [nn.Conv2d(inputs, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU()]
                inputs = width
            setattr(self, f"group{number}", nn.Sequential(*layers))
        self.pool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.linear = nn.Linear(WIDTHS[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits `[B, K]` of images `[B, C, H, W]`."""
        for number in range(len(WIDTHS)):
            x = getattr(self, f"group{number}")(x)
        return self.linear(self.flatten(self.pool(x)))  # type: ignore[no-any-return]


#: Constructors by name, for `tutelage:NAME`.
ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {f"vgg{depth}": partial(VGG, depth) for depth in GROUPS}
