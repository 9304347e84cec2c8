# SPDX-License-Identifier: Apache-2.0
"""torchvision's ResNets for small images: a 3x3 stem that keeps the resolution, no pooling after it.

Reference: He et al., Deep Residual Learning for Image Recognition, CVPR 2016; the stem is that of the usual CIFAR
codes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn


def resnet(depth: int, *, num_classes: int = 10, in_channels: int = 3, **options: Any) -> nn.Module:
    """Return torchvision's ResNet of a depth with a stem for small images.

    Args:
        depth: 18, 34, 50, 101 or 152.
        num_classes: K.
        in_channels: of the images.
        options: of torchvision's constructor.
    """
    from torchvision.models import get_model

    network: nn.Module = get_model(f"resnet{depth}", weights=None, num_classes=num_classes, **options)
    stem = nn.Conv2d(in_channels, 64, 3, 1, 1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    network.conv1, network.maxpool = stem, nn.Identity()
    return network


#: Constructors by name, for `tutelage:NAME`.
ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    f"resnet{depth}_cifar": partial(resnet, depth) for depth in (18, 34, 50, 101, 152)
}
