# SPDX-License-Identifier: Apache-2.0
"""ESPNet: a third of a million weights, dilated convolutions side by side; names as in the authors' weights.

Reference: Mehta et al., ESPNet: Efficient Spatial Pyramid of Dilated Convolutions for Semantic Segmentation, ECCV 2018.
"""

from collections import OrderedDict
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tutelage.core import Tap

EPS = 1e-3  # of every batch norm
DILATIONS = (1, 2, 4, 8, 16)


def _named(width_in: int, width: int, size: int, *, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    """Return a convolution without bias, under the name `conv`."""
    padding = size // 2 * dilation
    layer = nn.Conv2d(width_in, width, size, stride, padding, dilation, bias=False)
    return nn.Sequential(OrderedDict(conv=layer))


def _active(width: int) -> OrderedDict[str, nn.Module]:
    return OrderedDict(bn=nn.BatchNorm2d(width, eps=EPS), act=nn.PReLU(width))


class Spatial(nn.Module):
    """Five dilated convolutions of one narrow map, added up from the narrowest view to the widest, side by side.

    Args:
        width_in: channels.
        width: channels of the result.
        stride: of the first convolution: 2 halves the map, and then it is 3x3.
        shortcut: add the input.
        nested: norm and activation stand within `bn`.
    """

    def __init__(
        self, width_in: int, width: int, *, stride: int = 1, shortcut: bool = False, nested: bool = True
    ) -> None:
        super().__init__()
        narrow = width // len(DILATIONS)
        self.c1 = _named(width_in, narrow, 3 if stride > 1 else 1, stride=stride)
        for dilation in DILATIONS:
            own = width - (len(DILATIONS) - 1) * narrow if dilation == 1 else narrow
            setattr(self, f"d{dilation}", _named(narrow, own, 3, dilation=dilation))
        self.shortcut = shortcut
        active = _active(width)
        if nested:
            self.bn: nn.Module = nn.Sequential(active)
        else:
            self.bn, self.act = active["bn"], active["act"]
        self.nested = nested

    def forward(self, x: Tensor) -> Tensor:
        """Return `[B, width, H / stride, W / stride]`."""
        narrow = self.c1(x)
        first, *others = (getattr(self, f"d{dilation}")(narrow) for dilation in DILATIONS)
        sums = [others[0]]
        for other in others[1:]:  # without these sums wide dilations leave a grid in the map
            sums.append(sums[-1] + other)
        joined = torch.cat([first, *sums], dim=1)
        merged: Tensor = self.bn(joined + x if self.shortcut else joined)
        if not self.nested:
            merged = self.act(merged)
        return merged


class Encoder(nn.Module):
    """Maps of strides 2, 4 and 8, each with the image at its size beside it.

    Args:
        num_classes: of the scores at stride 8.
        p: blocks at stride 4.
        q: blocks at stride 8.
    """

    def __init__(self, num_classes: int, p: int, q: int) -> None:
        super().__init__()
        first = OrderedDict(conv=nn.Conv2d(3, 16, 3, 2, 1, bias=False), **_active(16))
        self.level1 = nn.Sequential(first)
        self.b1 = nn.Sequential(_active(19))
        self.level2_0 = Spatial(19, 64, stride=2, nested=False)
        self.level2 = nn.Sequential(*(Spatial(64, 64, shortcut=True) for _ in range(p)))
        self.b2 = nn.Sequential(_active(131))
        self.level3_0 = Spatial(131, 128, stride=2, nested=False)
        self.level3 = nn.Sequential(*(Spatial(128, 128, shortcut=True) for _ in range(q)))
        self.b3 = nn.Sequential(_active(256))
        self.classifier = _named(256, num_classes, 1)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return maps of strides 2 and 4, and scores at stride 8."""
        half = F.avg_pool2d(pixels, 3, 2, 1)
        quarter = F.avg_pool2d(half, 3, 2, 1)
        one = self.b1(torch.cat([self.level1(pixels), half], dim=1))
        two = self.level2_0(one)
        second = self.b2(torch.cat([self.level2(two), two, quarter], dim=1))
        three = self.level3_0(second)
        return one, second, self.classifier(self.b3(torch.cat([three, self.level3(three)], dim=1)))


@final
class ESPNet(nn.Module):
    """Encoder and a light decoder up to the pixels.

    Args:
        num_classes: K.
        in_channels: of the images: 3.
        p: blocks at stride 4.
        q: blocks at stride 8 (3 to 8 in the paper).

    Raises:
        TypeError: on images of other channels.

    Example:
        >>> ESPNet(5, p=1, q=1).eval()(torch.zeros(1, 3, 32, 48)).shape
        torch.Size([1, 5, 32, 48])
    """

    def __init__(self, num_classes: int = 20, in_channels: int = 3, *, p: int = 2, q: int = 8) -> None:
        super().__init__()
        if in_channels != 3:
            raise TypeError("images have 3 channels here")
        self.encoder = Encoder(num_classes, p, q)
        self.level3_C = _named(131, num_classes, 1)
        self.br = nn.BatchNorm2d(num_classes, eps=EPS)
        self.conv = nn.Sequential(
            OrderedDict(conv=nn.Conv2d(19 + num_classes, num_classes, 3, padding=1, bias=False), **_active(num_classes))
        )
        self.up_l3 = nn.Sequential(_up(num_classes))
        self.combine_l2_l3 = nn.Sequential(
            nn.Sequential(_active(2 * num_classes)), Spatial(2 * num_classes, num_classes)
        )
        self.up_l2 = nn.Sequential(_up(num_classes), nn.Sequential(_active(num_classes)))
        self.classifier = _up(num_classes)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return `[B, K, H, W]` scores; sides must be multiples of 8."""
        one, second, coarse = self.encoder(pixels)
        deep = self.up_l3(self.br(coarse))
        middle = self.up_l2(self.combine_l2_l3(torch.cat([self.level3_C(second), deep], dim=1)))
        scores: Tensor = self.classifier(self.conv(torch.cat([middle, one], dim=1)))
        return scores

    @property
    def places(self) -> dict[str, Tap]:
        """Taps by role: `map` is the encoder's last map, of stride 8."""
        stages = {f"stages[{number}]": Tap(f"encoder.b{number + 1}") for number in range(3)}
        return {**stages, "map": stages["stages[2]"]}

    @property
    def lent(self) -> dict[str, str]:
        """Paths of modules by role."""
        return {"classifier": "classifier"}


def _up(width: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(width, width, 2, 2, bias=False)


ARCHITECTURES = {"espnet": ESPNet}
