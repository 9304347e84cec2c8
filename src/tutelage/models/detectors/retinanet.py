# SPDX-License-Identifier: Apache-2.0
"""RetinaNet: nine anchors a position, a focal loss over all of them.

The parts and their names are torchvision's, so that its published weights fit; nothing resizes within.

Reference: Lin et al., Focal Loss for Dense Object Detection, ICCV 2017.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, final, get_args

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import generalized_box_iou_loss

from tutelage.core import Tap
from tutelage.core.error import UserError, nearest
from tutelage.functional.precision import full_precision
from tutelage.models.detectors.dense import (
    TOWERS,
    Padded,
    Targets,
    apart,
    by_level,
    clipped,
    decode,
    encode,
    focal,
    matched,
    one_hot,
    overlap,
    picked,
    sizes,
    top,
)
from tutelage.models.detectors.exact import ExactAnchors
from tutelage.models.detectors.pyramid import Pyramid

SCALES = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))
RATIOS = (0.5, 1.0, 2.0)
#: By how boxes are learnt: the distance of their codes, or the generalised overlap.
BoxLoss = Literal["l1", "giou"]
HEAD_NORMS = {None: None, "batch": nn.BatchNorm2d, "group": partial(nn.GroupNorm, 32)}


@final
@dataclass(frozen=True)
class Answers:
    """What the network said of a batch.

    Args:
        logits: `[B, A, K]`, level after level.
        codes: `[B, A, 4]` shifts and growths of the anchors.
        anchors: `[A, 4]`.
        counts: anchors of each level.
        image_size: `[B, 2]` height and width without padding.
        threshold: score below which nothing was found.
        candidates: best scores of a level that are looked at.
        iou: overlap above which the lesser of two boxes goes.
        most: boxes an image.
        box_loss: how boxes are learnt.
    """

    logits: Tensor
    codes: Tensor
    anchors: Tensor
    counts: Sequence[int]
    image_size: Tensor
    threshold: float
    candidates: int
    iou: float
    most: int
    box_loss: BoxLoss = "l1"

    def rows(self, rows: Sequence[int]) -> "Answers":
        """Return the answers for some images."""
        place = torch.tensor(rows, device=self.logits.device)
        parts = {name: getattr(self, name)[place] for name in ("logits", "codes", "image_size")}
        return replace(self, **parts)

    def losses(self, targets: Targets) -> dict[str, Tensor]:
        """Return the focal loss of the classes, and the loss of the boxes.

        Each is summed over anchors, divided by the number that learn a box of the image, averaged over images.
        """
        return _losses(self.logits, self.codes, self.anchors, Padded.of(targets), self.box_loss)

    def detections(self) -> list[dict[str, Tensor]]:
        """Return what was found in each image, best first, in the pixels of the batch."""
        boxes, scores, labels = self.candidates_of()
        return apart(boxes, scores, labels, iou=self.iou, most=self.most)

    def candidates_of(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the best boxes `[B, N, 4]`, scores and labels `[B, N]` of all levels, overlaps among them."""
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        start = 0
        for count in self.counts:
            scores, place, labels = top(
                self.logits[:, start : start + count].float().sigmoid(), self.candidates, self.threshold
            )
            codes = self.codes[:, start : start + count].float()
            boxes = decode(picked(codes, place), self.anchors[start : start + count][place])
            found.append((clipped(boxes, self.image_size), scores, labels))
            start += count
        boxes, scores, labels = (torch.cat(rows, dim=1) for rows in zip(*found, strict=True))
        return boxes, scores, labels


@full_precision
def _losses(logits: Tensor, codes: Tensor, anchors: Tensor, known: Padded, box_loss: BoxLoss) -> dict[str, Tensor]:
    known, anchors = known.to(codes.dtype), anchors.to(codes.dtype)
    which = matched(overlap(known, anchors), 0.5, 0.4)
    goal, label = known.at(which)
    learns = which >= 0
    count = learns.sum(dim=1).clamp(min=1)
    target = one_hot(label, learns, logits.shape[2], logits.dtype)
    classes = focal(logits, target).sum(dim=2).where(which > -2, 0.0).sum(dim=1)
    if box_loss == "l1":
        rows = (codes - encode(goal, anchors)).abs().sum(dim=2)
    else:
        rows = generalized_box_iou_loss(decode(codes, anchors), goal)
    edges = rows.where(learns, 0.0).sum(dim=1)
    return {"classes": (classes / count).mean(), "boxes": (edges / count).mean()}


@final
class RetinaNet(nn.Module):
    """Pyramid, two towers of convolutions, a class and a box for each anchor.

    Args:
        num_classes: K.
        anchor: side of the smallest anchor, in strides.
        exact: anchors are not rounded, see `tutelage.models.detectors.exact`.
        head_norm: `batch` or `group` puts a norm behind each convolution of the towers.
        box_loss: of the boxes' codes (`l1`), or of the boxes (`giou`).
        threshold: score below which nothing was found.
        candidates: best scores of a level that are looked at.
        iou: overlap above which the lesser of two boxes of a class goes.
        most: boxes an image.
        options: of `Pyramid`.

    Example:
        >>> model = RetinaNet(3, backbone="tiny8", width=16)
        >>> found = model(torch.zeros(2, 3, 64, 64)).detections()
        >>> len(found), found[0]["boxes"].shape[1]
        (2, 4)
    """

    def __init__(
        self,
        num_classes: int,
        *,
        anchor: float = 4.0,
        exact: bool = False,
        head_norm: str | None = None,
        box_loss: BoxLoss = "l1",
        threshold: float = 0.05,
        candidates: int = 1000,
        iou: float = 0.5,
        most: int = 100,
        **options: Any,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.backbone = Pyramid(**options)
        sides = [[anchor * stride * scale for scale in SCALES] for stride in self.backbone.strides]
        whole = tuple(tuple(map(int, row)) for row in sides)
        self.anchor_generator = (
            ExactAnchors(sides, RATIOS, self.backbone.strides)
            if exact
            else AnchorGenerator(whole, (RATIOS,) * len(sides))
        )
        if head_norm not in HEAD_NORMS:
            raise UserError(f"head_norm {head_norm!r} is not known{nearest(str(head_norm), map(str, HEAD_NORMS))}")
        if box_loss not in get_args(BoxLoss):
            raise UserError(f"box_loss {box_loss!r} is not known{nearest(str(box_loss), get_args(BoxLoss))}")
        self.head = RetinaNetHead(
            self.backbone.width, len(SCALES) * len(RATIOS), num_classes, norm_layer=HEAD_NORMS[head_norm]
        )
        self.reading = partial(
            Answers, threshold=threshold, candidates=candidates, iou=iou, most=most, box_loss=box_loss
        )

    def forward(self, pixels: Tensor, image_size: Tensor | None = None) -> Answers:
        """Return the answers of all anchors.

        Args:
            pixels: `[B, 3, H, W]`, normalised.
            image_size: `[B, 2]` height and width without padding; without it nothing is padded.
        """
        maps = self.backbone(pixels, image_size)
        said = self.head(maps)
        size = sizes(pixels, image_size)
        [anchors] = self.anchor_generator(ImageList(pixels, [tuple(pixels.shape[-2:])]), maps)
        counts = [one.shape[2] * one.shape[3] * len(SCALES) * len(RATIOS) for one in maps]
        return self.reading(said["cls_logits"], said["bbox_regression"], anchors, counts, size)

    def roles(self) -> dict[str, Tap]:
        """Return the places of the maps and of the heads' answers, one for each level."""
        return self.backbone.roles() | by_level(TOWERS, len(self.backbone.strides))

    def lends(self) -> dict[str, str]:
        """Return the modules a teacher may lend: the last convolution of each tower."""
        return dict(TOWERS)

    def by_class(self) -> dict[str, tuple[int, int]]:
        """Return the parameters that have a row a class: groups before it, and numbers of one."""
        home = "head.classification_head.cls_logits"
        return {f"{home}.{name}": (len(SCALES) * len(RATIOS), 1) for name in ("weight", "bias")}


ARCHITECTURES = {"retinanet": RetinaNet}
#: What weights of mmdetection want.
MMDETECTION: dict[str, dict[str, Any]] = {"retinanet": {"extra": "p6p7_backbone", "between": "nothing", "exact": True}}
#: Detectors of torchvision that this is, with their options.
PUBLISHED = {
    "retinanet_resnet50_fpn": {
        "detector": "retinanet",
        "backbone": "torchvision:resnet50",
        "frozen_norm": True,
        "norm_eps": 0.0,
    },
    "retinanet_resnet50_fpn_v2": {
        "detector": "retinanet",
        "backbone": "torchvision:resnet50",
        "extra": "p6p7_backbone",
        "head_norm": "group",
        "box_loss": "giou",
    },
}
