# SPDX-License-Identifier: Apache-2.0
"""SSD: default boxes of many shapes on maps of several sizes, the hardest of the background among what is learnt.

Over VGG-16 as published (`vgg16`), or over a pyramid with any backbone. The parts and their names are torchvision's;
nothing resizes within: the published network wants images of 300 x 300 pixels, `data.image_size: 300`.

Reference: Liu et al., SSD: Single Shot MultiBox Detector, ECCV 2016.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSDHead

from tutelage.core import InputSpec, Tap
from tutelage.functional.precision import full_precision
from tutelage.models.detectors.dense import (
    Padded,
    Targets,
    apart,
    clipped,
    decode,
    encode,
    matched,
    overlap,
    picked,
    sizes,
    top,
)
from tutelage.models.detectors.pyramid import Pyramid, blacked

WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # of the codes
NEGATIVES = 3  # of the background that are learnt, to one that learns a box
#: Of VGG-16 as SSD uses it: pixels in [0, 255], less a mean.
VGG = InputSpec(mean=(0.48235, 0.45882, 0.40784), std=(1.0 / 255.0,) * 3)
VGG_RATIOS = [[2], [2, 3], [2, 3], [2, 3], [2], [2]]
VGG_SCALES = [0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05]
VGG_STEPS = [8, 16, 32, 64, 100, 300]
SMALLEST, LARGEST = 0.1, 0.9  # of the default boxes over a pyramid, as shares of the image


@final
@dataclass(frozen=True)
class Answers:
    """What the network said of a batch.

    Args:
        logits: `[B, A, 1 + K]`, nothing first.
        codes: `[B, A, 4]` shifts and growths of the default boxes.
        defaults: `[A, 4]`.
        image_size: `[B, 2]` height and width without padding.
        threshold: score below which nothing was found.
        candidates: best scores of an image that are looked at.
        iou: overlap above which the lesser of two boxes goes.
        most: boxes an image.
    """

    logits: Tensor
    codes: Tensor
    defaults: Tensor
    image_size: Tensor
    threshold: float
    candidates: int
    iou: float
    most: int

    def rows(self, rows: Sequence[int]) -> "Answers":
        """Return the answers for some images."""
        place = torch.tensor(rows, device=self.logits.device)
        return replace(self, **{name: getattr(self, name)[place] for name in ("logits", "codes", "image_size")})

    def losses(self, targets: Targets) -> dict[str, Tensor]:
        """Return the cross-entropy and the smooth L1 loss, both divided by the boxes learnt in the batch."""
        return _losses(self.logits, self.codes, self.defaults, Padded.of(targets))

    def candidates_of(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the best boxes `[B, N, 4]`, scores and labels `[B, N]`, overlaps among them."""
        scores = self.logits.float().softmax(dim=2)[..., 1:]
        best, place, labels = top(scores, self.candidates, self.threshold)
        codes = picked(self.codes.float(), place)
        boxes = decode(codes, self.defaults[place], WEIGHTS)
        return clipped(boxes, self.image_size), best, labels

    def detections(self) -> list[dict[str, Tensor]]:
        """Return what was found in each image, best first, in the pixels of the batch."""
        boxes, scores, labels = self.candidates_of()
        return apart(boxes, scores, labels, iou=self.iou, most=self.most)


@full_precision
def _losses(logits: Tensor, codes: Tensor, defaults: Tensor, known: Padded) -> dict[str, Tensor]:
    known, defaults = known.to(codes.dtype), defaults.to(codes.dtype)
    which = matched(overlap(known, defaults), 0.5, 0.5, own=True)
    goal, label = known.at(which)
    learns = which >= 0
    count = learns.sum().clamp(min=1)
    boxes = F.smooth_l1_loss(codes, encode(goal, defaults, WEIGHTS), reduction="none").sum(dim=2)
    entropy = F.cross_entropy(logits.transpose(1, 2), (label + 1).where(learns, 0), reduction="none")
    hardness = entropy.detach().masked_fill(learns, -torch.inf)
    rank = hardness.argsort(dim=1, descending=True).argsort(dim=1)
    negative = rank < NEGATIVES * learns.sum(dim=1, keepdim=True)
    return {
        "classes": entropy.where(learns | negative, 0.0).sum() / count,
        "boxes": boxes.where(learns, 0.0).sum() / count,
    }


@final
class SSD(nn.Module):
    """Maps of several sizes, and for each default box a class and a place.

    Args:
        num_classes: K.
        threshold: score below which nothing was found.
        candidates: best scores of an image that are looked at.
        iou: overlap above which the lesser of two boxes of a class goes.
        most: boxes an image.
        backbone: `vgg16`, the published one; else of `Pyramid`.
        options: of `Pyramid`.
    """

    #: the first output is for nothing
    background = True

    def __init__(
        self,
        num_classes: int,
        *,
        threshold: float = 0.01,
        candidates: int = 1000,
        iou: float = 0.45,
        most: int = 200,
        backbone: str = "vgg16",
        **options: Any,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        if backbone == "vgg16":
            from torchvision.models.detection import ssd300_vgg16

            whole = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=num_classes + 1, **options)
            self.backbone, self.head, self.pixels = whole.backbone, whole.head, VGG
            self.anchor_generator = DefaultBoxGenerator(VGG_RATIOS, scales=VGG_SCALES, steps=VGG_STEPS)
        else:
            self.backbone = Pyramid(backbone, **options)
            count = len(self.backbone.strides)
            self.anchor_generator = DefaultBoxGenerator([[2, 3]] * count, min_ratio=SMALLEST, max_ratio=LARGEST)
            self.head = SSDHead(
                [self.backbone.width] * count, self.anchor_generator.num_anchors_per_location(), num_classes + 1
            )
        count = len(self.head.classification_head.module_list)
        self.levels = nn.ModuleList([nn.Identity() for _ in range(count)])
        self.reading = partial(Answers, threshold=threshold, candidates=candidates, iou=iou, most=most)

    def forward(self, pixels: Tensor, image_size: Tensor | None = None) -> Answers:
        """Return the answers of all default boxes.

        Args:
            pixels: `[B, 3, H, W]`, normalised.
            image_size: `[B, 2]` height and width without padding; without it nothing is padded.
        """
        if image_size is not None:
            pixels = blacked(pixels, image_size)
        found = self.backbone(pixels)
        given = found.values() if isinstance(found, dict) else found
        maps = [level(one) for level, one in zip(self.levels, given, strict=True)]
        said = self.head(maps)
        size = sizes(pixels, image_size)
        [defaults] = self.anchor_generator(ImageList(pixels, [tuple(pixels.shape[-2:])]), maps)
        return self.reading(said["cls_logits"], said["bbox_regression"], defaults, size)

    def roles(self) -> dict[str, Tap]:
        """Return the places of the maps and of the heads' answers, one for each level."""
        found = self.backbone.roles() if isinstance(self.backbone, Pyramid) else {}
        for level in range(len(self.levels)):
            found[f"fpn[{level}]"] = Tap(f"levels.{level}")
            found[f"head.cls[{level}]"] = Tap(f"head.classification_head.module_list.{level}")
            found[f"head.box[{level}]"] = Tap(f"head.regression_head.module_list.{level}")
        return found

    def by_class(self) -> dict[str, tuple[int, int]]:
        """Return the parameters that have a row a class: groups before it, and numbers of one."""
        counts = self.anchor_generator.num_anchors_per_location()
        return {
            f"head.classification_head.module_list.{level}.{name}": (count, 1)
            for level, count in enumerate(counts)
            for name in ("weight", "bias")
        }


ARCHITECTURES = {"ssd": SSD}
#: Detectors of torchvision that this is, with their options.
PUBLISHED = {"ssd300_vgg16": {"detector": "ssd", "backbone": "vgg16"}}
