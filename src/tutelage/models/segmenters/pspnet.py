# SPDX-License-Identifier: Apache-2.0
"""PSPNet: what the whole image shows, pooled at several scales, beside each place of a backbone's last map.

Reference: Zhao et al., Pyramid Scene Parsing Network, CVPR 2017.
"""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tutelage.core.error import UserError
from tutelage.models.segmenters.body import Body, Headed, conv, second_head


class PyramidPooling(nn.Module):
    """A map beside what it shows at several coarse scales.

    Args:
        width_in: channels of the map.
        width: of each scale.
        bins: cells a side, for each scale.
    """

    def __init__(self, width_in: int, width: int, bins: Sequence[int]) -> None:
        super().__init__()
        self.bins = tuple(bins)
        self.scales = nn.ModuleList(conv(width_in, width, 1) for _ in bins)

    def forward(self, x: Tensor) -> Tensor:
        """Return `[B, width_in + len(bins) * width, H, W]`."""
        size = x.shape[2:]
        pooled = [
            F.interpolate(scale(F.adaptive_avg_pool2d(x, cells)), size, mode="bilinear", align_corners=True)
            for cells, scale in zip(self.bins, self.scales, strict=True)
        ]
        return torch.cat([x, *pooled], dim=1)


@final
class PSPNet(Headed):
    """Backbone, pyramid pooling, and one 3x3 convolution before the class scores.

    Args:
        num_classes: K.
        in_channels: of the images.
        backbone: of timm, such as `resnet50`; or `tiny16`, `tiny32x2` (width, blocks a stage).
        output_stride: of the scores: 8 as published, 16 or 32.
        width: channels of the head.
        bins: cells a side of the pooled scales; in training every batch needs two images, since the coarsest scale
            is one cell an image.
        dropout: of the channels before the scores.
        auxiliary: a second head on the last map but one, in training.
        pretrained: with timm's own weights of the backbone.

    Raises:
        UserError: as `Body` does.

    Example:
        >>> model = PSPNet(5, backbone="tiny8", width=16).eval()
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
        width: int = 512,
        bins: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
        auxiliary: bool = True,
        pretrained: bool = False,
    ) -> None:
        super().__init__()
        if width < len(bins) or not bins or min(bins) < 1:
            raise UserError(f"bins are cells a side, each at least 1, and width no fewer than they: {list(bins)}")
        self.backbone = Body(backbone, output_stride, in_channels, pretrained)
        deepest = self.backbone.widths[-1]
        self.pooling = PyramidPooling(deepest, max(deepest // len(bins), 1), bins)
        self.bottleneck = conv(deepest + len(bins) * max(deepest // len(bins), 1), width, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(width, num_classes, 1)
        self.auxiliary = second_head(self.backbone, num_classes, dropout) if auxiliary else None
        # taps stand on identities: a backbone of timm need not say where its maps are made
        self.stages = nn.ModuleList(nn.Identity() for _ in self.backbone.widths)

    def mapped(self, deepest: Tensor) -> Tensor:
        """Return the map that the scores are made from."""
        found: Tensor = self.dropout(self.bottleneck(self.pooling(deepest)))
        return found


ARCHITECTURES = {"pspnet": PSPNet}
