# SPDX-License-Identifier: Apache-2.0
"""FCOS: every position inside a box tells how far its four edges are; no anchors.

The parts and their names are torchvision's, so that its published weights fit; nothing resizes within.

References: Tian et al., FCOS: Fully Convolutional One-Stage Object Detection, ICCV 2019; the same, FCOS: A Simple and
Strong Anchor-free Object Detector, TPAMI 2022.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, final, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import generalized_box_iou_loss

from tutelage.core import Tap
from tutelage.core.error import UserError, nearest
from tutelage.functional.anchors import levels
from tutelage.functional.precision import full_precision
from tutelage.models.detectors.dense import (
    TOWERS,
    Padded,
    Targets,
    apart,
    by_level,
    clipped,
    focal,
    one_hot,
    picked,
    sizes,
    top,
)
from tutelage.models.detectors.exact import ExactAnchors
from tutelage.models.detectors.pyramid import Pyramid
from tutelage.models.detectors.towers import Scale

#: Which paper: in the later one distances are in strides, and centredness stands beside them; in the first one they
#: are exponentials of what each level scales for itself, in pixels, and centredness stands beside the classes. There
#: positions lie in the middles of cells, here, as in torchvision, at their corners.
Form = Literal["tpami", "iccv"]
GROUPS = 32  # of the norms in the towers
RANGE = (4.0, 8.0)  # how far the farthest edge may be, in strides, for a level to answer for it


@final
@dataclass(frozen=True)
class Answers:
    """What the network said of a batch.

    Args:
        logits: `[B, A, K]`, level after level.
        distances: `[B, A, 4]` to the left, upper, right and lower edge, in strides.
        centreness: `[B, A]` logits.
        squares: `[A, 4]` a square of one stride around each position.
        counts: positions of each level.
        image_size: `[B, 2]` height and width without padding.
        radius: how near to a box's centre a position must be to learn it, in strides.
        threshold: score below which nothing was found.
        candidates: best scores of a level that are looked at.
        iou: overlap above which the lesser of two boxes goes.
        most: boxes an image.
    """

    logits: Tensor
    distances: Tensor
    centreness: Tensor
    squares: Tensor
    counts: Sequence[int]
    image_size: Tensor
    radius: float
    threshold: float
    candidates: int
    iou: float
    most: int

    def rows(self, rows: Sequence[int]) -> "Answers":
        """Return the answers for some images."""
        place = torch.tensor(rows, device=self.logits.device)
        parts = ("logits", "distances", "centreness", "image_size")
        return replace(self, **{name: getattr(self, name)[place] for name in parts})

    def losses(self, targets: Targets) -> dict[str, Tensor]:
        """Return the focal loss, the loss of the boxes' overlap, and the cross-entropy of the centreness.

        All are divided by the number of positions of the batch that learn a box.
        """
        return _losses(
            self.logits, self.distances, self.centreness, self.squares, self.counts, Padded.of(targets), self.radius
        )

    def candidates_of(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the best boxes `[B, N, 4]`, scores and labels `[B, N]` of all levels, overlaps among them."""
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        spans = zip(*(part.split(list(self.counts), dim=1) for part in (self.logits, self.centreness)), strict=True)
        start = 0
        for logits, centreness in spans:
            scores = (logits.float().sigmoid() * centreness.float().sigmoid()[..., None]).sqrt()
            best, place, labels = top(scores, self.candidates, self.threshold)
            distances = picked(self.distances[:, start : start + logits.shape[1]].float(), place)
            squares = self.squares[start : start + logits.shape[1]][place]
            found.append((clipped(edges(distances, squares), self.image_size), best, labels))
            start += logits.shape[1]
        boxes, scores, labels = (torch.cat(rows, dim=1) for rows in zip(*found, strict=True))
        return boxes, scores, labels

    def detections(self) -> list[dict[str, Tensor]]:
        """Return what was found in each image, best first, in the pixels of the batch."""
        boxes, scores, labels = self.candidates_of()
        return apart(boxes, scores, labels, iou=self.iou, most=self.most)


def edges(distances: Tensor, squares: Tensor) -> Tensor:
    """Return boxes from the distances of their edges to a position, in units of its square."""
    centre = (squares[..., :2] + squares[..., 2:]) / 2
    stride = squares[..., 2:] - squares[..., :2]
    return torch.cat([centre - distances[..., :2] * stride, centre + distances[..., 2:] * stride], dim=-1)


def assigned(known: Padded, squares: Tensor, counts: Sequence[int], radius: float) -> Tensor:
    """Return which box each position learns, or -1.

    A position learns the smallest box that it lies in and to whose centre it is near, if the farthest edge lies
    within the range of its level. (torchvision compares areas after a subtraction in float32, which makes those
    equal that differ by less than 8 square pixels.)

    Args:
        known: the boxes.
        squares: `[A, 4]`.
        counts: positions of each level.
        radius: in strides.

    Returns:
        `[B, A]` int64.
    """
    boxes = known.boxes[:, :, None]
    centre = (squares[:, :2] + squares[:, 2:]) / 2
    side = squares[:, 2] - squares[:, 0]
    near = ((boxes[..., :2] + boxes[..., 2:]) / 2 - centre).abs().amax(dim=3) < radius * side
    distance = torch.cat([centre - boxes[..., :2], boxes[..., 2:] - centre], dim=3)
    low, high = side * RANGE[0], side * RANGE[1]
    low[: counts[0]] = 0
    high[-counts[-1] :] = torch.inf
    far = distance.amax(dim=3)
    learns = near & (distance.amin(dim=3) > 0) & (far > low) & (far < high) & known.valid[..., None]
    area = (known.boxes[..., 2:] - known.boxes[..., :2]).prod(dim=2)
    least, which = area[..., None].where(learns, torch.inf).min(dim=1)
    return which.where(least.isfinite(), -1)


@full_precision
def _losses(
    logits: Tensor,
    distances: Tensor,
    centreness: Tensor,
    squares: Tensor,
    counts: Sequence[int],
    known: Padded,
    radius: float,
) -> dict[str, Tensor]:
    known, squares = known.to(distances.dtype), squares.to(distances.dtype)
    which = assigned(known, squares, counts, radius)
    goal, label = known.at(which)
    learns = which >= 0
    count = learns.sum().clamp(min=1)
    classes = focal(logits, one_hot(label, learns, logits.shape[2], logits.dtype)).sum()
    goal = goal.where(learns[..., None], squares)
    overlap = generalized_box_iou_loss(edges(distances, squares), goal).where(learns, 0.0).sum()
    centre = (squares[:, :2] + squares[:, 2:]) / 2
    sides = torch.stack([centre - goal[..., :2], goal[..., 2:] - centre], dim=3)
    ratio = (sides.amin(dim=3) / sides.amax(dim=3)).clamp(min=0)
    central = F.binary_cross_entropy_with_logits(centreness, ratio.prod(dim=2).sqrt(), reduction="none")
    return {
        "classes": classes / count,
        "boxes": overlap / count,
        "centreness": central.where(learns, 0.0).sum() / count,
    }


@final
class FCOS(nn.Module):
    """Pyramid, two towers of convolutions; class, distances and centreness of each position.

    Args:
        num_classes: K.
        form: see `Form`.
        radius: how near to a box's centre a position must be to learn it, in strides.
        threshold: score below which nothing was found.
        candidates: best scores of a level that are looked at.
        iou: overlap above which the lesser of two boxes of a class goes.
        most: boxes an image.
        options: of `Pyramid`; `width` is a multiple of 32.

    Raises:
        UserError: if the width is no multiple of 32, or the form is not known.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        form: Form = "tpami",
        radius: float = 1.5,
        threshold: float = 0.2,
        candidates: int = 1000,
        iou: float = 0.6,
        most: int = 100,
        **options: Any,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.backbone = Pyramid(**options)
        if self.backbone.width % GROUPS:
            raise UserError(f"fcos: width is a multiple of {GROUPS}, not {self.backbone.width}")
        if form not in get_args(Form):
            raise UserError(f"form {form!r} is not known{nearest(str(form), get_args(Form))}")
        strides = self.backbone.strides
        sides = tuple((stride,) for stride in strides)
        self.anchor_generator = (
            ExactAnchors([[float(stride)] for stride in strides], [1.0], strides)
            if form == "iccv"
            else AnchorGenerator(sides, ((1.0,),) * len(sides))
        )
        self.head = FCOSHead(self.backbone.width, 1, num_classes)
        self.scales = nn.ModuleList([Scale() for _ in self.backbone.strides] if form == "iccv" else [])
        self.reading = partial(Answers, radius=radius, threshold=threshold, candidates=candidates, iou=iou, most=most)

    def forward(self, pixels: Tensor, image_size: Tensor | None = None) -> Answers:
        """Return the answers of all positions.

        Args:
            pixels: `[B, 3, H, W]`, normalised.
            image_size: `[B, 2]` height and width without padding; without it nothing is padded.
        """
        maps = self.backbone(pixels, image_size)
        logits, distances, centreness = self._first_form(maps) if self.scales else self._said(maps)
        size = sizes(pixels, image_size)
        [squares] = self.anchor_generator(ImageList(pixels, [tuple(pixels.shape[-2:])]), maps)
        if self.scales:
            squares = squares + (squares[:, 2:] - squares[:, :2]).repeat(1, 2) / 2
        counts = [one.shape[2] * one.shape[3] for one in maps]
        return self.reading(logits, distances, centreness, squares, counts, size)

    def _said(self, maps: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        said = self.head(maps)
        return said["cls_logits"], said["bbox_regression"], said["bbox_ctrness"][..., 0]

    def _first_form(self, maps: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        kinds, places = self.head.classification_head, self.head.regression_head
        logits, distances, centreness = [], [], []
        for one, stride, scale in zip(maps, self.backbone.strides, self.scales, strict=True):
            seen = kinds.conv(one)
            logits.append(kinds.cls_logits(seen))
            distances.append(scale(places.bbox_reg(places.conv(one))).float().exp() / stride)
            centreness.append(places.bbox_ctrness(seen))
        return levels(logits).squeeze(2), levels(distances).squeeze(2), levels(centreness).squeeze(2).squeeze(2)

    def roles(self) -> dict[str, Tap]:
        """Return the places of the maps and of the heads' answers, one for each level."""
        return self.backbone.roles() | by_level(TOWERS, len(self.backbone.strides))

    def lends(self) -> dict[str, str]:
        """Return the modules a teacher may lend: the last convolution of each tower."""
        return dict(TOWERS)

    def by_class(self) -> dict[str, tuple[int, int]]:
        """Return the parameters that have a row a class: groups before it, and numbers of one."""
        return {f"head.classification_head.cls_logits.{name}": (1, 1) for name in ("weight", "bias")}


ARCHITECTURES = {"fcos": FCOS}
#: What weights of mmdetection want.
MMDETECTION: dict[str, dict[str, Any]] = {"fcos": {"form": "iccv", "threshold": 0.05, "iou": 0.5}}
#: Detectors of torchvision that this is, with their options.
PUBLISHED = {"fcos_resnet50_fpn": {"detector": "fcos", "backbone": "torchvision:resnet50", "frozen_norm": True}}
