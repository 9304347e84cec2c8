# SPDX-License-Identifier: Apache-2.0
"""DeepLabV3 on any backbone: dilated convolutions of several rates side by side, and what the whole image shows.

Reference: Chen et al., Rethinking Atrous Convolution for Semantic Image Segmentation, 2017.
"""

from collections.abc import Sequence
from typing import final

from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import ASPP

from tutelage.models.segmenters.body import Body, Headed, conv, second_head


@final
class DeepLabV3(Headed):
    """Backbone, convolutions of several dilations, and one 3x3 convolution before the class scores.

    Args:
        num_classes: K.
        in_channels: of the images.
        backbone: of timm, such as `resnet50`; or `tiny16`, `tiny32x2` (width, blocks a stage).
        output_stride: of the scores: 8, 16 or 32.
        width: channels of the head.
        rates: dilations of the convolutions: 12, 24, 36 at an output stride of 8.
        auxiliary: a second head on the last map but one, in training.
        pretrained: with timm's own weights of the backbone.

    Raises:
        UserError: as `Body` does.

    Example:
        >>> import torch
        >>> model = DeepLabV3(5, backbone="tiny8", width=16).eval()
        >>> model(torch.zeros(2, 3, 64, 96)).shape
        torch.Size([2, 5, 8, 12])
    """

    def __init__(
        self,
        num_classes: int = 21,
        in_channels: int = 3,
        *,
        backbone: str = "resnet50",
        output_stride: int = 8,
        width: int = 256,
        rates: Sequence[int] = (12, 24, 36),
        auxiliary: bool = True,
        pretrained: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = Body(backbone, output_stride, in_channels, pretrained)
        self.pyramid = ASPP(self.backbone.widths[-1], list(rates), width)
        self.bottleneck = conv(width, width, 3)
        self.classifier = nn.Conv2d(width, num_classes, 1)
        self.auxiliary = second_head(self.backbone, num_classes, 0.1) if auxiliary else None
        self.stages = nn.ModuleList(nn.Identity() for _ in self.backbone.widths)

    def mapped(self, deepest: Tensor) -> Tensor:
        """Return the map that the scores are made from."""
        found: Tensor = self.bottleneck(self.pyramid(deepest))
        return found


ARCHITECTURES = {"deeplabv3": DeepLabV3}
