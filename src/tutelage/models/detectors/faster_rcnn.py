# SPDX-License-Identifier: Apache-2.0
"""Faster R-CNN and Mask R-CNN: regions are proposed, then each is looked at on its own.

The parts and their names are torchvision's, so that its published weights fit; nothing resizes within. What depends
on proposals runs only when losses or detections are asked for: a teacher whose maps alone are read does not pay.

References: Ren et al., Faster R-CNN, NeurIPS 2015; He et al., Mask R-CNN, ICCV 2017.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, final, get_args

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import (
    RoIHeads,
    fastrcnn_loss,
    maskrcnn_inference,
    maskrcnn_loss,
    paste_masks_in_image,
)
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead, concat_box_prediction_layers
from torchvision.ops import MultiScaleRoIAlign, roi_align

from tutelage.core import Tap
from tutelage.core.error import UserError, nearest
from tutelage.models.detectors.dense import Targets, clipped, decode, settled, sizes, top
from tutelage.models.detectors.exact import LEVEL_EPS, ExactAnchors, ExactRegions
from tutelage.models.detectors.pyramid import Pyramid

RATIOS = (0.5, 1.0, 2.0)
#: How regions are read: two layers, or four convolutions and a layer with batch norms (torchvision's second version).
BoxHead = Literal["layers", "convolutions"]
EXTRA = {"pool": 1, "none": 0}
SMALLEST = 0.01  # pixels a side of a box, as in torchvision
MOST = 1000  # scores of an exported copy that are looked at


@final
@dataclass(frozen=True)
class Answers:
    """What the network said of a batch, up to the proposals' scores.

    Args:
        net: whose heads look at the proposals.
        maps: of the pyramid.
        objectness: one `[B, R, H, W]` a level.
        codes: one `[B, 4 R, H, W]` a level.
        size: padded (height, width) of the batch.
        image_size: `[B, 2]` height and width without padding.
    """

    net: "FasterRCNN"
    maps: list[Tensor]
    objectness: list[Tensor]
    codes: list[Tensor]
    size: tuple[int, int]
    image_size: Tensor

    def rows(self, rows: Sequence[int]) -> "Answers":
        """Return the answers for some images."""
        place = torch.tensor(rows, device=self.image_size.device)
        maps, objectness, codes = ([one[place] for one in part] for part in (self.maps, self.objectness, self.codes))
        return replace(self, maps=maps, objectness=objectness, codes=codes, image_size=self.image_size[place])

    def _proposed(self, sizes: list[tuple[int, int]]) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
        """Return the proposals of each image, the anchors, and scores and codes of all anchors."""
        rpn = self.net.rpn
        anchors = rpn.anchor_generator(ImageList(self.maps[0].new_zeros(1, 1, *self.size), sizes), self.maps)
        counts = [one.shape[1] * one.shape[2] * one.shape[3] for one in self.objectness]
        scores, codes = concat_box_prediction_layers(list(self.objectness), list(self.codes))
        scores, codes = scores.float(), codes.float()
        boxes = rpn.box_coder.decode(codes.detach(), anchors).view(len(sizes), -1, 4)
        proposals, _ = rpn.filter_proposals(boxes, scores, sizes, counts)
        return proposals, anchors, scores, codes

    def losses(self, targets: Targets) -> dict[str, Tensor]:
        """Return the losses of proposals, of classes and boxes, and of masks where the network has them.

        Regions are drawn from torch's generator; each loss is a mean over the regions that were drawn.

        Raises:
            UserError: if the network learns masks and the data has none.
        """
        rpn, heads = self.net.rpn, self.net.roi_heads
        if heads.has_mask() and not all("masks" in one for one in targets):
            raise UserError("mask_rcnn learns masks, and the data gives none: set data.detection.masks to true")
        sizes = _pairs(self.image_size)
        goal: list[dict[str, Tensor]] = [
            {**one, "boxes": one["boxes"].float(), "labels": one["labels"] + 1} for one in targets
        ]
        proposals, anchors, scores, codes = self._proposed(sizes)
        labels, matched = rpn.assign_targets_to_anchors(anchors, goal)
        objectness, proposed = rpn.compute_loss(scores, codes, labels, rpn.box_coder.encode(matched, anchors))
        regions, which, labels, wanted = heads.select_training_samples(proposals, goal)
        logits, boxes = self._looked(regions, sizes)
        classes, placed = fastrcnn_loss(logits, boxes, labels, wanted)
        losses = {"objectness": objectness, "proposals": proposed, "classes": classes, "boxes": placed}
        if heads.has_mask():
            things = [label > 0 for label in labels]
            inner = [region[thing] for region, thing in zip(regions, things, strict=True)]
            index = [number[thing] for number, thing in zip(which, things, strict=True)]
            masks = self._masked(inner, sizes)
            losses["masks"] = maskrcnn_loss(
                masks, inner, [one["masks"] for one in goal], [one["labels"] for one in goal], index
            )
        return losses

    def detections(self) -> list[dict[str, Tensor]]:
        """Return what was found in each image, best first, in the pixels of the batch."""
        heads = self.net.roi_heads
        sizes = _pairs(self.image_size)
        proposals, *_ = self._proposed(sizes)
        logits, codes = self._looked(proposals, sizes)
        found = heads.postprocess_detections(logits, codes, proposals, sizes)
        rows = [
            {"boxes": boxes, "scores": scores, "labels": labels - 1}
            for boxes, scores, labels in zip(*found, strict=True)
        ]
        if heads.has_mask():
            masks = maskrcnn_inference(self._masked(found[0], sizes), found[2])
            for row, mask in zip(rows, masks, strict=True):
                row["masks"] = paste_masks_in_image(mask, row["boxes"], self.size)[:, 0] > 0.5
        return rows

    def exported(self) -> tuple[Tensor, ...]:
        """Return boxes, scores, labels and perhaps masks of the first image, in tensors of one size.

        Returns:
            `[most, 4]`, `[most]`, `[most]`, and `[most, 28, 28]` shares of each box; rows with score 0 are for nothing.
        """
        heads = self.net.roi_heads
        regions, there = self.regions()
        logits, boxes = heads.box_predictor(heads.box_head(self.read(heads.box_roi_pool, regions)))
        boxes = decode(boxes.view(len(regions), -1, 4), regions[:, None], heads.box_coder.weights)
        told = self.settle(heads, logits.softmax(dim=1), boxes, there)
        if not heads.has_mask():
            return told
        masks = heads.mask_predictor(heads.mask_head(self.read(heads.mask_roi_pool, told[0])))
        return *told, masks_of(masks.sigmoid(), told[2])

    def regions(self) -> tuple[Tensor, Tensor]:
        """Return the proposals of the first image, `[N, 4]`, and their scores: those of 0 stand for nothing."""
        rpn = self.net.rpn
        images = ImageList(self.maps[0].new_zeros(1, 1, *self.size), [self.size])
        [anchors] = rpn.anchor_generator(images, self.maps)
        counts = [one.shape[1] * one.shape[2] * one.shape[3] for one in self.objectness]
        scores, codes = concat_box_prediction_layers(list(self.objectness), list(self.codes))
        found, start = [], 0
        for level, count in enumerate(counts):
            best, place = scores[start : start + count, 0].topk(min(count, rpn._pre_nms_top_n["testing"]))
            boxes = decode(codes[start : start + count][place], anchors[start : start + count][place])
            boxes = clipped(boxes[None], self.image_size[:1])[0]
            large = ((boxes[:, 2:] - boxes[:, :2]) >= rpn.min_size).all(dim=1)
            found.append((boxes, best.sigmoid() * large, torch.full_like(place, level)))
            start += count
        whole = (torch.cat(rows) for rows in zip(*found, strict=True))
        regions, there, _ = settled(*whole, iou=rpn.nms_thresh, most=rpn._post_nms_top_n["testing"])
        return regions, there

    def settle(self, heads: RoIHeads, chance: Tensor, boxes: Tensor, there: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what heads find in the regions of the first image: boxes, scores and labels of one size.

        Args:
            heads: say how many, and what goes.
            chance: `[N, K + 1]`, the first for nothing.
            boxes: `[N, K + 1, 4]`.
            there: `[N]`, 0 where a region stands for nothing.
        """
        classes = chance.shape[1] - 1
        boxes = clipped(boxes[:, 1:].reshape(1, -1, 4), self.image_size[:1])[0]
        chance = chance[:, 1:] * (there > 0)[:, None]
        large = ((boxes[:, 2:] - boxes[:, :2]) >= SMALLEST).all(dim=1)
        best, place, labels = top(chance[None], MOST, heads.score_thresh)
        box = place[0] * classes + labels[0]
        return settled(boxes[box], best[0] * large[box], labels[0], iou=heads.nms_thresh, most=heads.detections_per_img)

    def read(self, pool: MultiScaleRoIAlign, regions: Tensor) -> Tensor:
        """Return what is read of each region of the first image, at the level of its size.

        Regions are read from every level, of which the right one is kept: so nothing depends on what is seen.
        """
        area = (regions[:, 2:] - regions[:, :2]).prod(dim=1)
        scales = [2.0 ** round(math.log2(one.shape[-2] / self.size[0])) for one in self.maps[: len(pool.featmap_names)]]
        lowest, highest = (-round(math.log2(scale)) for scale in (scales[0], scales[-1]))
        size = area.sqrt() / pool.canonical_scale
        level = (pool.canonical_level + size.log2() + LEVEL_EPS).floor().clamp(lowest, highest) - lowest
        read = [
            roi_align(
                *(one[:1], [regions], pool.output_size, scale, pool.sampling_ratio), aligned=hasattr(pool, "aligned")
            )
            for one, scale in zip(self.maps, scales, strict=False)
        ]
        found: Tensor = read[0]
        for number, one in enumerate(read[1:], start=1):
            found = torch.where((level == number)[:, None, None, None], one, found)
        return found

    def _features(self) -> "OrderedDict[str, Tensor]":
        return OrderedDict((str(number), one.float()) for number, one in enumerate(self.maps))

    def _looked(self, regions: list[Tensor], sizes: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        heads = self.net.roi_heads
        logits, codes = heads.box_predictor(heads.box_head(heads.box_roi_pool(self._features(), regions, sizes)))
        return logits.float(), codes.float()

    def _masked(self, regions: list[Tensor], sizes: list[tuple[int, int]]) -> Tensor:
        heads = self.net.roi_heads
        logits: Tensor = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(self._features(), regions, sizes)))
        return logits.float()


def pool(backbone: Pyramid, size: int, *, exact: bool) -> MultiScaleRoIAlign:
    """Return what reads regions, so many cells a side, of the levels that stand on the backbone's maps."""
    count = len(backbone.places)
    if exact:
        return ExactRegions(backbone.strides[:count], size)
    return MultiScaleRoIAlign([str(number) for number in range(count)], size, 2)


def masks_of(masks: Tensor, labels: Tensor) -> Tensor:
    """Return of `[N, K + 1, h, w]` masks, the first for nothing, those `[N, h, w]` of labels `[N]`."""
    return masks.gather(1, (labels + 1)[:, None, None, None].expand(-1, 1, *masks.shape[2:]))[:, 0]


def _pairs(image_size: Tensor) -> list[tuple[int, int]]:
    return [(int(height), int(width)) for height, width in image_size.tolist()]


@final
class FasterRCNN(nn.Module):
    """Pyramid, proposals, and heads over regions: class and box, and a mask where `masks` asks for it.

    Args:
        num_classes: K.
        masks: tell masks as well (Mask R-CNN).
        anchor: side of an anchor, in strides.
        exact: nothing is rounded, see `tutelage.models.detectors.exact`.
        box_head: see `BoxHead`.
        proposal_depth: convolutions before proposals.
        head_width: of the layers over regions.
        regions: drawn of an image to learn from.
        proposed: drawn anchors of an image that learn to propose.
        proposals: of an image that are kept, (in training, else).
        threshold: score below which nothing was found.
        iou: overlap above which the lesser of two boxes of a class goes.
        most: boxes an image.
        options: of `Pyramid`; its levels are those of the backbone, and a further one by subsampling.

    Raises:
        UserError: on an option that makes no sense.

    Example:
        >>> net = FasterRCNN(3, backbone="tiny8", width=16, head_width=32).eval()
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
        anchor: float = 8.0,
        exact: bool = False,
        box_head: BoxHead = "layers",
        proposal_depth: int = 1,
        head_width: int = 1024,
        regions: int = 512,
        proposed: int = 256,
        proposals: tuple[int, int] = (2000, 1000),
        threshold: float = 0.05,
        iou: float = 0.5,
        most: int = 100,
        **options: Any,
    ) -> None:
        super().__init__()
        if box_head not in get_args(BoxHead):
            raise UserError(f"box_head {box_head!r} is not known{nearest(str(box_head), get_args(BoxHead))}")
        if options.get("extra", "pool") not in EXTRA:
            raise UserError(f"faster_rcnn: extra is {' or '.join(EXTRA)}, not {options['extra']!r}")
        self.num_classes = num_classes
        self.backbone = Pyramid(**{"levels": (4, 8, 16, 32), "extra": "pool", **options})
        width, strides = self.backbone.width, self.backbone.strides
        sides = tuple((int(anchor * stride),) for stride in strides)
        generator = (
            ExactAnchors([[anchor * stride] for stride in strides], RATIOS, strides)
            if exact
            else AnchorGenerator(sides, (RATIOS,) * len(sides))
        )
        train, test = proposals
        kept = {"training": train, "testing": test}
        self.rpn = RegionProposalNetwork(
            generator, RPNHead(width, len(RATIOS), conv_depth=proposal_depth), 0.7, 0.3, proposed, 0.5, kept, kept, 0.7
        )
        head = (
            TwoMLPHead(width * 7**2, head_width)
            if box_head == "layers"
            else FastRCNNConvFCHead((width, 7, 7), [width] * 4, [head_width], norm_layer=nn.BatchNorm2d)
        )
        more: dict[str, Any] = {}
        if masks:
            layer = nn.BatchNorm2d if box_head == "convolutions" else None
            more = {
                "mask_roi_pool": pool(self.backbone, 14, exact=exact),
                "mask_head": MaskRCNNHeads(width, [width] * 4, 1, norm_layer=layer),
                "mask_predictor": MaskRCNNPredictor(width, width, num_classes + 1),
            }
        self.roi_heads = RoIHeads(
            *(pool(self.backbone, 7, exact=exact), head, FastRCNNPredictor(head_width, num_classes + 1)),
            *(0.5, 0.5, regions, 0.25, None, threshold, iou, most),
            **more,
        )

    def forward(self, pixels: Tensor, image_size: Tensor | None = None) -> Answers:
        """Return the maps and the scores of proposals.

        Args:
            pixels: `[B, 3, H, W]`, normalised.
            image_size: `[B, 2]` height and width without padding; without it nothing is padded.
        """
        maps = self.backbone(pixels, image_size)
        objectness, codes = self.rpn.head(maps)
        height, width = pixels.shape[-2:]
        size = sizes(pixels, image_size)
        return Answers(self, maps, objectness, codes, (height, width), size)

    def roles(self) -> dict[str, Tap]:
        """Return the places of the maps and of the proposals' scores and codes, one for each level."""
        heads = {"head.cls": "rpn.head.cls_logits", "head.box": "rpn.head.bbox_pred"}
        levels = range(len(self.backbone.strides))
        return self.backbone.roles() | {
            f"{role}[{level}]": Tap(path, call=level) for role, path in heads.items() for level in levels
        }

    def lends(self) -> dict[str, str]:
        """Return the modules a teacher may lend."""
        return {"head.cls": "rpn.head.cls_logits", "head.box": "rpn.head.bbox_pred"}

    def by_class(self) -> dict[str, tuple[int, int]]:
        """Return the parameters that have a row a class: groups before it, and numbers of one."""
        rows = {"roi_heads.box_predictor.cls_score": (1, 1), "roi_heads.box_predictor.bbox_pred": (1, 4)}
        if self.roi_heads.has_mask():
            rows["roi_heads.mask_predictor.mask_fcn_logits"] = (1, 1)
        return {f"{path}.{name}": shape for path, shape in rows.items() for name in ("weight", "bias")}


ARCHITECTURES = {"faster_rcnn": FasterRCNN}
#: What weights of mmdetection want.
MMDETECTION: dict[str, dict[str, Any]] = {"faster_rcnn": {"exact": True}}
FIRST = {"backbone": "torchvision:resnet50", "frozen_norm": True, "norm_eps": 0.0}
SECOND = {"backbone": "torchvision:resnet50", "norm": "batch", "box_head": "convolutions", "proposal_depth": 2}
#: Detectors of torchvision that this is, with their options.
PUBLISHED = {
    "fasterrcnn_resnet50_fpn": {"detector": "faster_rcnn", "proposals": (2000, 1000), **FIRST},
    "fasterrcnn_resnet50_fpn_v2": {"detector": "faster_rcnn", **SECOND},
}
