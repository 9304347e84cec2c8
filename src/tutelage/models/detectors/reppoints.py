# SPDX-License-Identifier: Apache-2.0
"""RepPoints: each position places nine points on its object, looks there, and places them better.

The box around points is their mean and deviation (moment transform). The first points are learned by the position
nearest to the middle of a box on the level of its size, the second ones by positions whose first box overlaps enough.

Reference: Yang et al., RepPoints: Point Set Representation for Object Detection, ICCV 2019.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import DeformConv2d

from tutelage.core import Tap
from tutelage.core.error import UserError
from tutelage.functional.anchors import levels
from tutelage.functional.boxes import iou_of
from tutelage.functional.precision import full_precision
from tutelage.models.detectors.deformable import looked
from tutelage.models.detectors.dense import (
    Padded,
    Targets,
    apart,
    by_level,
    clipped,
    focal,
    matched,
    one_hot,
    sizes,
    top,
)
from tutelage.models.detectors.pyramid import Pyramid
from tutelage.models.detectors.towers import Norm, rarely, small, tower

POINTS = 9  # of a position: those of a 3x3 kernel
BASE = 4.0  # side of an object that belongs to a level, in strides, and what distances are divided by
POSITIVE, NEGATIVE = 0.5, 0.4  # overlaps that tell objects from background
SLOW = 0.1  # share of the second stage's gradient that reaches the first points
MOMENT = 0.01  # share of the gradient that reaches the factors of the moment transform
BETA = 1 / 9  # of the smooth L1 loss
WEIGHTS = {"classes": 1.0, "first": 0.5, "boxes": 1.0}


@final
@dataclass(frozen=True)
class Answers:
    """What the network said of a batch.

    Args:
        logits: `[B, A, K]`, level after level.
        first: `[B, A, 4]` boxes around the first points.
        boxes: `[B, A, 4]` boxes around the second points.
        places: `[A, 2]` x and y.
        strides: `[A]`.
        counts: positions of each level.
        image_size: `[B, 2]` height and width without padding.
        threshold: score below which nothing was found.
        candidates: best scores of a level that are looked at.
        iou: overlap above which the lesser of two boxes goes.
        most: boxes an image.
    """

    logits: Tensor
    first: Tensor
    boxes: Tensor
    places: Tensor
    strides: Tensor
    counts: Sequence[int]
    image_size: Tensor
    threshold: float
    candidates: int
    iou: float
    most: int

    def losses(self, targets: Targets) -> dict[str, Tensor]:
        """Return the focal loss, and the smooth L1 losses of the first and of the second boxes.

        Each is summed over positions and divided by the number that learn a box there, over the whole batch.
        """
        known = Padded.of(targets)
        return _losses(self.logits, self.first, self.boxes, self.places, self.strides, self.image_size, known)

    def rows(self, rows: Sequence[int]) -> "Answers":
        """Return what was said of some of the images."""
        index = torch.tensor(rows, device=self.logits.device)
        some = {name: getattr(self, name)[index] for name in ("logits", "first", "boxes", "image_size")}
        return replace(self, **some)

    def detections(self) -> list[dict[str, Tensor]]:
        """Return what was found in each image, best first, in the pixels of the batch."""
        boxes, scores, labels = self.candidates_of()
        return apart(boxes, scores, labels, iou=self.iou, most=self.most)

    def candidates_of(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the best boxes `[B, N, 4]`, scores and labels `[B, N]` of all levels, overlaps among them."""
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        start = 0
        for count in self.counts:
            here = slice(start, start + count)
            scores, place, labels = top(self.logits[:, here].float().sigmoid(), self.candidates, self.threshold)
            boxes = self.boxes[:, here].float().gather(1, place[..., None].expand(-1, -1, 4))
            found.append((clipped(boxes, self.image_size), scores, labels))
            start += count
        boxes, scores, labels = (torch.cat(rows, dim=1) for rows in zip(*found, strict=True))
        return boxes, scores, labels


@torch.no_grad()
def nearest_points(places: Tensor, strides: Tensor, known: Padded) -> Tensor:
    """Return which box each position learns at first, -1 for none: `[B, A]`.

    A box belongs to the level whose stride fits its size, and is learned by the position of that level nearest to
    its middle, in units of its sides; a position learns the nearest of its boxes.

    Args:
        places: `[A, 2]`.
        strides: `[A]`, powers of two.
        known: the targets.
    """
    size = (known.boxes[..., 2:] - known.boxes[..., :2]).clamp(min=1e-6)
    middle = (known.boxes[..., :2] + known.boxes[..., 2:]) / 2
    level = strides.log2()
    wanted = ((size / BASE).log2().sum(dim=2) / 2).trunc().clamp(level.min(), level.max())
    away = ((places - middle[:, :, None]) / size[:, :, None]).square().sum(dim=3).sqrt()
    away = away.where((level == wanted[..., None]) & known.valid[..., None], math.inf)
    nearest = F.one_hot(away.argmin(dim=2), len(places)).bool() & known.valid[..., None]
    least, which = away.where(nearest, math.inf).min(dim=1)
    return which.where(least.isfinite(), -1)


@full_precision
def _losses(
    logits: Tensor, first: Tensor, boxes: Tensor, places: Tensor, strides: Tensor, image_size: Tensor, known: Padded
) -> dict[str, Tensor]:
    known, places, strides = known.to(boxes.dtype), places.to(boxes.dtype), strides.to(boxes.dtype)
    unit = BASE * strides[:, None]

    def distance(said: Tensor, which: Tensor) -> Tensor:
        goal, _ = known.at(which)
        learns = which >= 0
        apart_by = F.smooth_l1_loss(said / unit, goal / unit, reduction="none", beta=BETA).sum(dim=2)
        return apart_by.where(learns, 0.0).sum() / learns.sum().clamp(min=1)

    overlap = iou_of(known.boxes[:, :, None], first.detach()[:, None]).where(known.valid[..., None], -1.0)
    which = matched(overlap, POSITIVE, NEGATIVE)
    learns = which >= 0
    target = one_hot(known.at(which)[1], learns, logits.shape[2], logits.dtype)
    seen = (places < image_size.flip(1)[:, None].to(places.dtype)).all(dim=2) & (which > -2)
    classes = focal(logits, target).sum(dim=2).where(seen, 0.0).sum() / learns.sum().clamp(min=1)
    return {
        "classes": WEIGHTS["classes"] * classes,
        "first": WEIGHTS["first"] * distance(first, nearest_points(places, strides, known)),
        "boxes": WEIGHTS["boxes"] * distance(boxes, which),
    }


class Head(nn.Module):
    """Two towers; points, then class logits and better points by what is seen at them.

    Args:
        width: channels of the pyramid, and of every layer.
        num_classes: K.
        convolutions: of a tower.
        norm: behind each.
    """

    def __init__(self, width: int, num_classes: int, convolutions: int, norm: Norm) -> None:
        super().__init__()
        self.cls_tower = tower(width, width, convolutions, norm)
        self.box_tower = tower(width, width, convolutions, norm)
        self.first = small(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 2 * POINTS, 1))
        )
        self.cls_look = DeformConv2d(width, width, 3, padding=1)
        self.box_look = DeformConv2d(width, width, 3, padding=1)
        for look in (self.cls_look, self.box_look):
            nn.init.normal_(look.weight, std=0.01)
            assert look.bias is not None
            nn.init.zeros_(look.bias)
        self.cls = rarely(small(nn.Conv2d(width, num_classes, 1)))
        self.box = small(nn.Conv2d(width, 2 * POINTS, 1))
        self.moment = nn.Parameter(torch.zeros(2))
        self.points = nn.Identity()  # the second points, where taps stand
        y, x = (
            axis.flatten() for axis in torch.meshgrid(torch.arange(-1.0, 2.0), torch.arange(-1.0, 2.0), indexing="ij")
        )
        self.grid: Tensor
        self.register_buffer("grid", torch.stack([y, x], dim=1).view(1, 2 * POINTS, 1, 1), persistent=False)

    def forward(self, one: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return class logits `[B, K, H, W]`, first and second points `[B, 18, H, W]` (y, x, ... in strides)."""
        kinds, places = self.cls_tower(one), self.box_tower(one)
        first = self.first(places)
        slow = (1 - SLOW) * first.detach() + SLOW * first
        offset = slow - self.grid
        scores = self.cls(F.relu(looked(self.cls_look, kinds, offset)))
        second = self.points(self.box(F.relu(looked(self.box_look, places, offset))) + first.detach())
        return scores, first, second

    def around(self, points: Tensor, places: Tensor, strides: Tensor) -> Tensor:
        """Return the boxes `[B, A, 4]` of points `[B, A, 9, 2]` (y, x in strides) around positions."""
        points = points.float().flip(3) * strides[:, None, None] + places[:, None]
        factor = (MOMENT * self.moment + (1 - MOMENT) * self.moment.detach()).exp()
        mean = points.mean(dim=2)
        # the least deviation keeps the root's gradient finite where all points are one
        half = ((points - mean[:, :, None]).square().mean(dim=2) * (POINTS / (POINTS - 1)) + 1e-12).sqrt() * factor
        return torch.cat([mean - half, mean + half], dim=2)


@final
class RepPoints(nn.Module):
    """Pyramid, two towers, points in two stages, a class at each position.

    Published with group norms in pyramid and head: `norm: group`, `head_norm: group`.

    Args:
        num_classes: K.
        convolutions: of a tower.
        head_norm: behind each: `group`, `batch` or `none`.
        threshold: score below which nothing was found.
        candidates: best scores of a level that are looked at.
        iou: overlap above which the lesser of two boxes of a class goes.
        most: boxes an image.
        options: of `Pyramid`.

    Raises:
        UserError: if an option makes no sense.

    Example:
        >>> model = RepPoints(3, backbone="tiny8", width=16)
        >>> found = model(torch.zeros(2, 3, 64, 64)).detections()
        >>> len(found), found[0]["boxes"].shape[1]
        (2, 4)
    """

    def __init__(
        self,
        num_classes: int,
        *,
        convolutions: int = 3,
        head_norm: Norm = "group",
        threshold: float = 0.05,
        candidates: int = 1000,
        iou: float = 0.5,
        most: int = 100,
        **options: Any,
    ) -> None:
        super().__init__()
        if convolutions < 1:
            raise UserError(f"convolutions are at least 1, not {convolutions}")
        self.num_classes = num_classes
        self.backbone = Pyramid(**{"extra": "p6p7_backbone", **options})
        self.head = Head(self.backbone.width, num_classes, convolutions, head_norm)
        self.reading = partial(Answers, threshold=threshold, candidates=candidates, iou=iou, most=most)

    def forward(self, pixels: Tensor, image_size: Tensor | None = None) -> Answers:
        """Return the answers of all positions.

        Args:
            pixels: `[B, 3, H, W]`, normalised.
            image_size: `[B, 2]` height and width without padding; without it nothing is padded.
        """
        maps = self.backbone(pixels, image_size)
        scores, first, second = zip(*(self.head(one) for one in maps), strict=True)
        size = sizes(pixels, image_size)
        places, strides, counts = [], [], []
        for one, stride in zip(maps, self.backbone.strides, strict=True):
            y, x = (torch.arange(side, device=one.device, dtype=torch.float32) for side in one.shape[2:])
            places.append(torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=2).flatten(0, 1) * stride)
            strides.append(torch.full_like(places[-1][:, 0], stride))
            counts.append(len(places[-1]))
        place, step = torch.cat(places), torch.cat(strides)
        boxes = [self.head.around(levels(points, POINTS), place, step) for points in (first, second)]
        return self.reading(levels(scores).squeeze(2), boxes[0], boxes[1], place, step, counts, size)

    def roles(self) -> dict[str, Tap]:
        """Return the places of the maps and of the answers: class logits, and the second points."""
        heads = {"head.cls": "head.cls", "head.box": "head.points"}
        return self.backbone.roles() | by_level(heads, len(self.backbone.strides))

    def lends(self) -> dict[str, str]:
        """Return the modules a teacher may lend: the last convolution of each side."""
        return {"head.cls": "head.cls", "head.box": "head.box"}

    def by_class(self) -> dict[str, tuple[int, int]]:
        """Return the parameters with a row a class; see `tutelage.models.detection.fit`."""
        return {"head.cls.weight": (1, 1), "head.cls.bias": (1, 1)}


ARCHITECTURES = {"reppoints": RepPoints}
#: What weights of mmdetection want.
MMDETECTION: dict[str, dict[str, Any]] = {"reppoints": {"norm": "group", "head_norm": "group", "between": "norm"}}
