# SPDX-License-Identifier: Apache-2.0
"""One image with the things in it, as it changes on its way to a model."""

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F

from tutelage.data.annotations import Annotated


@final
@dataclass(frozen=True)
class Record:
    """One image with its things.

    Args:
        image: `[3, H, W]` uint8.
        boxes: `[n, 4]` x1, y1, x2, y2 in its pixels, crowd regions left out.
        labels: `[n]` int64.
        masks: `[n, H, W]` bool, or None.
        truth: the image as it was annotated, in its own pixels.
        labelled: whether its boxes are shown at all.
    """

    image: Tensor
    boxes: Tensor
    labels: Tensor
    masks: Tensor | None
    truth: Annotated
    labelled: bool = True

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) now."""
        return self.image.shape[1], self.image.shape[2]

    def keep(self, kept: Tensor) -> "Record":
        """Return the same with some of its things: `[n]` bool."""
        masks = None if self.masks is None else self.masks[kept]
        return replace(self, boxes=self.boxes[kept], labels=self.labels[kept], masks=masks)


def resized(record: Record, size: tuple[int, int]) -> Record:
    """Return a record in another size: pixels bilinear, masks by the nearest pixel."""
    from torchvision.transforms.v2 import functional as change

    if size == record.size:
        return record
    scale = torch.tensor([size[1] / record.size[1], size[0] / record.size[0]]).repeat(2)
    masks = record.masks
    if masks is not None:
        masks = (
            F.interpolate(masks[:, None].float(), size, mode="nearest-exact")[:, 0] > 0
            if len(masks)
            else masks.new_zeros(0, *size)
        )
    image: Tensor = change.resize(record.image, list(size), antialias=True)
    return replace(record, image=image, boxes=record.boxes * scale, masks=masks)
