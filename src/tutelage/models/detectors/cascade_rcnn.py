# SPDX-License-Identifier: Apache-2.0
"""Cascade R-CNN: three heads over regions, each over the boxes of the one before and stricter about overlap.

References: Cai and Vasconcelos, Cascade R-CNN: Delving into High Quality Object Detection, CVPR 2018; with masks: the
same, Cascade R-CNN: High Quality Object Detection and Instance Segmentation, TPAMI 2019.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss, maskrcnn_loss, paste_masks_in_image
from torchvision.ops import clip_boxes_to_image

from tutelage.core import Tap
from tutelage.core.error import UserError
from tutelage.models.detectors.dense import Targets, clipped, decode
from tutelage.models.detectors.faster_rcnn import Answers as Proposed
from tutelage.models.detectors.faster_rcnn import FasterRCNN, masks_of, pool

OVERLAPS = (0.5, 0.6, 0.7)  # from which a region learns a box, of each head
EXACT = tuple(
    tuple(1 / part for part in row)
    for row in ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
)
CODES = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
WEIGHTS = (1.0, 0.5, 0.25)  # of the heads' losses
POSITIVE = 0.25  # share of the regions to learn from that may hold something


class Predictor(nn.Module):
    """Class logits, and one box for all classes, told for each of them as torchvision's parts expect it."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(width, classes)
        self.bbox_pred = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return `[N, K + 1]` and `[N, 4 (K + 1)]`."""
        x = x.flatten(1)
        logits = self.cls_score(x)
        return logits, self.bbox_pred(x).repeat(1, logits.shape[1])


@final
@dataclass(frozen=True)
class Answers:
    """What the network said of a batch, up to the proposals' scores.

    Args:
        heads: over regions, one after the other.
        proposed: maps and scores of proposals.
    """

    heads: Sequence[RoIHeads]
    proposed: Proposed

    def rows(self, rows: Sequence[int]) -> "Answers":
        """Return the answers for some images."""
        return replace(self, proposed=self.proposed.rows(rows))

    def losses(self, targets: Targets) -> dict[str, Tensor]:
        """Return the losses of proposals, and of classes, boxes and masks summed over the weighed heads.

        Regions are drawn from torch's generator; each loss is a mean over the regions that were drawn.

        Raises:
            UserError: if the network learns masks and the data has none.
        """
        rpn = self.proposed.net.rpn
        masks = self.heads[0].has_mask()
        if masks and not all("masks" in one for one in targets):
            raise UserError("cascade_mask_rcnn learns masks, and the data gives none: set data.detection.masks to true")
        goal: list[dict[str, Tensor]] = [
            {**one, "boxes": one["boxes"].float(), "labels": one["labels"] + 1} for one in targets
        ]
        sizes = self._sizes()
        regions, anchors, scores, codes = self.proposed._proposed(sizes)
        labels, matched = rpn.assign_targets_to_anchors(anchors, goal)
        objectness, proposals = rpn.compute_loss(scores, codes, labels, rpn.box_coder.encode(matched, anchors))
        losses = {"objectness": objectness, "proposals": proposals}
        for heads, weight in zip(self.heads, WEIGHTS, strict=True):
            regions, which, labels, wanted = heads.select_training_samples(regions, goal)
            logits, boxes = self._looked(heads, regions)
            classes, placed = fastrcnn_loss(logits, boxes, labels, wanted)
            parts = {"classes": classes, "boxes": placed}
            if masks:
                things = [label > 0 for label in labels]
                inner = [region[thing] for region, thing in zip(regions, things, strict=True)]
                index = [number[thing] for number, thing in zip(which, things, strict=True)]
                drawn = self._masked(heads, inner)
                true = [one["masks"] for one in goal]
                parts["masks"] = maskrcnn_loss(drawn, inner, true, [one["labels"] for one in goal], index)
            for name, part in parts.items():
                losses[name] = losses.get(name, 0.0) + weight * part
            regions = self._refined(heads, boxes.detach(), regions)
        return losses

    def detections(self) -> list[dict[str, Tensor]]:
        """Return what was found in each image, best first, in the pixels of the batch.

        Scores are the mean over the heads, boxes the last one's; masks the mean of the heads' probabilities.
        """
        sizes = self._sizes()
        regions, *_ = self.proposed._proposed(sizes)
        said, last = [], self.heads[-1]
        before = regions
        for heads in self.heads:
            logits, codes = self._looked(heads, regions)
            said.append(logits.softmax(dim=1))
            before, regions = regions, self._refined(heads, codes, regions)
        mean = torch.stack(said).mean(dim=0).clamp(min=torch.finfo(torch.float32).tiny)
        found = last.postprocess_detections(mean.log(), codes, before, sizes)
        rows = [
            {"boxes": boxes, "scores": scores, "labels": labels - 1}
            for boxes, scores, labels in zip(*found, strict=True)
        ]
        if last.has_mask():
            counts = [len(boxes) for boxes in found[0]]
            drawn = torch.stack([self._masked(heads, found[0]).sigmoid() for heads in self.heads]).mean(dim=0)
            label = torch.cat(found[2])
            own = drawn[torch.arange(len(label), device=label.device), label][:, None]
            for row, masks in zip(rows, own.split(counts), strict=True):
                row["masks"] = paste_masks_in_image(masks, row["boxes"], self.proposed.size)[:, 0] > 0.5
        return rows

    def exported(self) -> tuple[Tensor, ...]:
        """Return boxes, scores, labels and perhaps masks of the first image, in tensors of one size.

        Returns:
            `[most, 4]`, `[most]`, `[most]`, and `[most, 28, 28]` shares of each box; rows with score 0 are for nothing.
        """
        regions, there = self.proposed.regions()
        said = []
        for heads in self.heads:
            logits, codes = heads.box_predictor(heads.box_head(self.proposed.read(heads.box_roi_pool, regions)))
            said.append(logits.softmax(dim=1))
            boxes = decode(codes[:, :4], regions, heads.box_coder.weights)
            regions = clipped(boxes[None], self.proposed.image_size[:1])[0]
        last, mean = self.heads[-1], torch.stack(said).mean(dim=0)
        told = self.proposed.settle(last, mean, boxes[:, None].expand(-1, mean.shape[1], -1), there)
        if not last.has_mask():
            return told
        read = [
            heads.mask_predictor(heads.mask_head(self.proposed.read(heads.mask_roi_pool, told[0]))).sigmoid()
            for heads in self.heads
        ]
        return *told, masks_of(torch.stack(read).mean(dim=0), told[2])

    def _sizes(self) -> list[tuple[int, int]]:
        return [(int(height), int(width)) for height, width in self.proposed.image_size.tolist()]

    def _features(self) -> "OrderedDict[str, Tensor]":
        return OrderedDict((str(number), one.float()) for number, one in enumerate(self.proposed.maps))

    def _looked(self, heads: RoIHeads, regions: list[Tensor]) -> tuple[Tensor, Tensor]:
        read = heads.box_roi_pool(self._features(), regions, self._sizes())
        logits, codes = heads.box_predictor(heads.box_head(read))
        return logits.float(), codes.float()

    def _masked(self, heads: RoIHeads, regions: list[Tensor]) -> Tensor:
        read = heads.mask_roi_pool(self._features(), regions, self._sizes())
        logits: Tensor = heads.mask_predictor(heads.mask_head(read))
        return logits.float()

    def _refined(self, heads: RoIHeads, codes: Tensor, regions: list[Tensor]) -> list[Tensor]:
        """Return the regions as the head corrects them, within their images."""
        boxes = heads.box_coder.decode(codes[:, :4], regions)[:, 0]
        parts = boxes.split([len(one) for one in regions])
        return [clip_boxes_to_image(one, size) for one, size in zip(parts, self._sizes(), strict=True)]


@final
class CascadeRCNN(nn.Module):
    """Faster R-CNN with two further heads over regions, perhaps with masks: a teacher.

    Args:
        num_classes: K.
        masks: tell masks as well, with each head.
        exact: nothing is rounded, see `tutelage.models.detectors.exact`; but for the last head's codes, which are
            those of mmdetection.
        head_width: of the layers over regions.
        regions: drawn of an image to learn from, by each head.
        threshold: score below which nothing was found.
        iou: overlap above which the lesser of two boxes of a class goes.
        most: boxes an image.
        options: of `FasterRCNN`, and of `Pyramid`.

    Example:
        >>> net = CascadeRCNN(3, backbone="tiny8", width=16, head_width=32).eval()
        >>> len(net(torch.zeros(2, 3, 64, 64)).detections())
        2
    """

    #: the first output is for nothing
    background = True

    def __init__(
        self,
        num_classes: int,
        *,
        masks: bool = False,
        exact: bool = False,
        head_width: int = 1024,
        regions: int = 512,
        threshold: float = 0.05,
        iou: float = 0.5,
        most: int = 100,
        **options: Any,
    ) -> None:
        super().__init__()
        shared: dict[str, Any] = {
            "masks": masks,
            "exact": exact,
            "head_width": head_width,
            "regions": regions,
            "threshold": threshold,
            "iou": iou,
        }
        self.first = FasterRCNN(num_classes, most=most, **shared, **options)
        self.num_classes = num_classes
        self.tells_masks = masks
        self.first.roi_heads.box_predictor = Predictor(head_width, num_classes + 1)
        width = self.first.backbone.width
        backbone, further = self.first.backbone, []
        for overlap, codes in zip(OVERLAPS[1:], (EXACT if exact else CODES)[1:], strict=True):
            more: dict[str, Any] = {}
            if masks:
                more = {
                    "mask_roi_pool": pool(backbone, 14, exact=exact),
                    "mask_head": MaskRCNNHeads(width, [width] * 4, 1),
                    "mask_predictor": MaskRCNNPredictor(width, width, num_classes + 1),
                }
            head = TwoMLPHead(width * 7**2, head_width)
            parts = (pool(backbone, 7, exact=exact), head, Predictor(head_width, num_classes + 1))
            further.append(RoIHeads(*parts, overlap, overlap, regions, POSITIVE, codes, threshold, iou, most, **more))
        self.further = nn.ModuleList(further)

    def forward(self, pixels: Tensor, image_size: Tensor | None = None) -> Answers:
        """Return the maps and the scores of proposals.

        Args:
            pixels: `[B, 3, H, W]`, normalised.
            image_size: `[B, 2]` height and width without padding; without it nothing is padded.
        """
        heads: Any = [self.first.roi_heads, *self.further]
        return Answers(heads, self.first(pixels, image_size))

    def roles(self) -> dict[str, Tap]:
        """Return the places of the maps and of the proposals' scores and codes, one for each level."""
        return {role: replace(tap, where=f"first.{tap.where}") for role, tap in self.first.roles().items()}

    def by_class(self) -> dict[str, tuple[int, int]]:
        """Return the parameters that have a row a class: groups before it, and numbers of one."""
        heads = ["first.roi_heads", *(f"further.{number}" for number in range(len(self.further)))]
        rows = ["box_predictor.cls_score"]
        rows += ["mask_predictor.mask_fcn_logits"] if self.first.roi_heads.has_mask() else []
        return {f"{head}.{row}.{name}": (1, 1) for head in heads for row in rows for name in ("weight", "bias")}


ARCHITECTURES = {"cascade_rcnn": CascadeRCNN, "cascade_mask_rcnn": partial(CascadeRCNN, masks=True)}
#: What weights of mmdetection want.
MMDETECTION: dict[str, dict[str, Any]] = {"cascade_rcnn": {"exact": True}, "cascade_mask_rcnn": {"exact": True}}
