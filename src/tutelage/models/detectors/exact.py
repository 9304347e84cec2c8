# SPDX-License-Identifier: Apache-2.0
"""Anchors and regions in fractions of pixels, where torchvision's parts round: what mmdetection's detectors learned on.

- anchors have sides of any length, and lie a stride apart, also where a map covers more than the image
- regions are read around the middles of pixels, at as many places as a cell has pixels
"""

import math
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign, roi_align

LEVEL_EPS = 1e-6  # in the choice of a level, as in torchvision


@final
class ExactAnchors(AnchorGenerator):
    """Anchors around the corners of cells, nothing rounded.

    Args:
        sides: of the anchors of each level, for a ratio of 1.
        ratios: height to width.
        strides: of the levels.

    Example:
        >>> anchors = ExactAnchors([[5.0]], [1.0], [4])
        >>> anchors([torch.zeros(1, 3, 4, 7)], [torch.zeros(1, 1, 1, 2)])[0].tolist()
        [[-2.5, -2.5, 2.5, 2.5], [1.5, -2.5, 6.5, 2.5]]
    """

    def __init__(self, sides: Sequence[Sequence[float]], ratios: Sequence[float], strides: Sequence[int]) -> None:
        super().__init__(tuple(map(tuple, sides)), (tuple(ratios),) * len(sides))
        self.strides = tuple(strides)

    def generate_anchors(
        self,
        scales: Any,
        aspect_ratios: Any,
        dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device("cpu"),  # noqa: B008  (as its parent has it)
    ) -> Tensor:
        """Return `[R S, 4]`, ratio by ratio."""
        ratios = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        sides = torch.as_tensor(scales, dtype=dtype, device=device)
        wide, tall = ((factor[:, None] * sides).flatten() / 2 for factor in (1 / ratios, ratios))
        return torch.stack([-wide, -tall, wide, tall], dim=1)

    def forward(self, image_list: Any, feature_maps: list[Tensor]) -> list[Tensor]:
        """Return the anchors `[A, 4]` of each image, which are all the same."""
        like = feature_maps[0]
        self.set_cell_anchors(like.dtype, like.device)
        steps = [[torch.full((), step, device=like.device)] * 2 for step in self.strides]
        whole = torch.cat(self.grid_anchors([[*one.shape[-2:]] for one in feature_maps], steps))
        return [whole for _ in getattr(image_list, "image_sizes", image_list)]


@final
class ExactRegions(MultiScaleRoIAlign):
    """Regions of several levels, read at the level of their size.

    Args:
        strides: of the levels, powers of two.
        size: cells a side.
    """

    aligned = True

    def __init__(self, strides: Sequence[int], size: int) -> None:
        super().__init__([str(number) for number in range(len(strides))], size, 0)
        self.strides = tuple(strides)

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: Any = None) -> Tensor:
        """Return `[N, C, size, size]` of the boxes of all images."""
        index = torch.cat([torch.full_like(one[:, :1], number) for number, one in enumerate(boxes)])
        whole = torch.cat([index, torch.cat(boxes)], dim=1)
        lowest, highest = (round(math.log2(stride)) for stride in (self.strides[0], self.strides[-1]))
        size = (whole[:, 3:] - whole[:, 1:3]).prod(dim=1).sqrt() / self.canonical_scale
        level = (self.canonical_level + size.log2() + LEVEL_EPS).floor().clamp(lowest, highest) - lowest
        maps = [x[name] for name in self.featmap_names]
        found = maps[0].new_zeros(len(whole), maps[0].shape[1], *self.output_size)
        for number, (one, stride) in enumerate(zip(maps, self.strides, strict=True)):
            (place,) = torch.where(level == number)
            read = roi_align(
                one, whole[place].to(one.dtype), self.output_size, 1 / stride, self.sampling_ratio, aligned=True
            )
            found = found.index_put((place,), read)
        return found
