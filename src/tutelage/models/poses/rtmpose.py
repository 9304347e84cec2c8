# SPDX-License-Identifier: Apache-2.0
"""RTMPose: a CSPNeXt backbone with the RTMCC head, in five sizes; or any backbone with that head."""

from functools import partial
from typing import final

import torch
from torch import Tensor, nn

from tutelage.functional.simcc import bins
from tutelage.models.poses.cspnext import FACTORS, CSPNeXt
from tutelage.models.poses.rtmcc import RTMCC


@final
class RTMPose(nn.Module):
    """A backbone whose last map the head reads.

    Args:
        backbone: gives `[B, C, h, w]`, or a sequence whose last map counts.
        num_keypoints: K.
        image_size: (height, width) of the input, which the head is made for.
        in_channels: of the images.
        split: bins a pixel.
        hidden: see :class:`RTMCC`.
        s: see :class:`RTMCC`.
        expansion: see :class:`RTMCC`.
        kernel: see :class:`RTMCC`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_keypoints: int,
        image_size: tuple[int, int],
        *,
        in_channels: int = 3,
        split: float = 2.0,
        hidden: int = 256,
        s: int = 128,
        expansion: float = 2.0,
        kernel: int = 7,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.image_size = image_size
        mode = backbone.training
        with torch.no_grad():
            seen = last_map(backbone.eval()(torch.zeros(1, in_channels, *image_size)))
        backbone.train(mode)
        self.head = RTMCC(
            seen.shape[1],
            num_keypoints,
            (seen.shape[2], seen.shape[3]),
            bins(image_size, split),
            hidden=hidden,
            s=s,
            expansion=expansion,
            kernel=kernel,
        )

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of x, `[B, K, Wx]`, and of y, `[B, K, Wy]`."""
        logits: tuple[Tensor, Tensor] = self.head(last_map(self.backbone(pixels)))
        return logits


def last_map(found: Tensor | list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """Return the last of a backbone's maps."""
    return found if isinstance(found, Tensor) else found[-1]


def _sized(
    num_keypoints: int,
    image_size: tuple[int, int],
    *,
    deepen: float,
    widen: float,
    in_channels: int = 3,
    split: float = 2.0,
    hidden: int = 256,
    s: int = 128,
    expansion: float = 2.0,
    kernel: int = 7,
    stages: int = 4,
) -> RTMPose:
    """Return RTMPose of one size."""
    backbone = CSPNeXt(deepen, widen, in_channels, stages)
    options = {"in_channels": in_channels, "split": split, "hidden": hidden, "s": s, "kernel": kernel}
    return RTMPose(backbone, num_keypoints, image_size, expansion=expansion, **options)  # type: ignore[arg-type]


#: Constructors by name; `deepen`, `widen` and `stages` may be given anew.
ARCHITECTURES = {
    f"rtmpose_{name}": partial(_sized, deepen=deepen, widen=widen) for name, (deepen, widen) in FACTORS.items()
}
