# SPDX-License-Identifier: Apache-2.0
"""GFL: one score for class and quality together, and a distribution over the place of each edge.

One position of each level answers at most for one box; which learn is decided by ATSS. The layout of the answers is
the one that `ld` and `crosskd` read.

Reference: Li et al., Generalized Focal Loss, NeurIPS 2020.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import generalized_box_iou_loss

from tutelage.core import Tap
from tutelage.core.error import UserError
from tutelage.functional.anchors import grid_anchors, levels, on_boxes, overlaps
from tutelage.functional.boxes import iou_of
from tutelage.functional.precision import full_precision
from tutelage.models.detectors.dense import Padded, Targets, apart, clipped, one_hot, sizes, top
from tutelage.models.detectors.pyramid import Pyramid
from tutelage.models.detectors.towers import Norm, Scale, rarely, small, tower

EDGES = 4
SCALE = 8.0  # side of an anchor, in strides
CANDIDATES = 9  # of each level, for ATSS
WEIGHTS = {"classes": 1.0, "boxes": 2.0, "edges": 0.25}
INNER = 0.1  # how far a distance stays below the last bin


@final
@dataclass(frozen=True)
class Answers:
    """What the network said of a batch.

    Args:
        logits: `[B, A, K]`, level after level.
        edges: `[B, A, 4, n + 1]` logits of the distances of left, top, right and bottom edge, in strides.
        anchors: `[A, 4]`, squares around the positions.
        strides: `[A]`.
        counts: positions of each level.
        image_size: `[B, 2]` height and width without padding.
        threshold: score below which nothing was found.
        candidates: best scores of a level that are looked at.
        iou: overlap above which the lesser of two boxes goes.
        most: boxes an image.
    """

    logits: Tensor
    edges: Tensor
    anchors: Tensor
    strides: Tensor
    counts: Sequence[int]
    image_size: Tensor
    threshold: float
    candidates: int
    iou: float
    most: int

    def losses(self, targets: Targets) -> dict[str, Tensor]:
        """Return the quality focal loss, the GIoU loss, and the focal loss of the distributions.

        The first is divided by the number of positions that learn a box, the others are means over these weighed by
        their best class score, all over the whole batch.
        """
        known = Padded.of(targets)
        return _losses(self.logits, self.edges, self.anchors, self.strides, self.counts, self.image_size, known)

    def rows(self, rows: Sequence[int]) -> "Answers":
        """Return what was said of some of the images."""
        index = torch.tensor(rows, device=self.logits.device)
        some = {name: getattr(self, name)[index] for name in ("logits", "edges", "image_size")}
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
            wanted = place[:, :, None, None].expand(-1, -1, *self.edges.shape[2:])
            edges = self.edges[:, here].float().gather(1, wanted)
            boxes = _boxes(edges, self.anchors[here][place], self.strides[here][place])
            found.append((clipped(boxes, self.image_size), scores, labels))
            start += count
        boxes, scores, labels = (torch.cat(rows, dim=1) for rows in zip(*found, strict=True))
        return boxes, scores, labels


def _boxes(edges: Tensor, anchors: Tensor, strides: Tensor) -> Tensor:
    """Return the boxes `[..., 4]` around the positions, their edges at the mean of their distributions."""
    bins = torch.arange(edges.shape[-1], device=edges.device, dtype=edges.dtype)
    distance = (edges.softmax(dim=-1) * bins).sum(dim=-1) * strides[..., None]
    centre = (anchors[..., :2] + anchors[..., 2:]) / 2
    return torch.cat([centre - distance[..., :2], centre + distance[..., 2:]], dim=-1)


@full_precision
def quality_focal(logits: Tensor, quality: Tensor, beta: float = 2.0) -> Tensor:
    """Return the cross-entropy with a quality in [0, 1], times its distance to the power of beta, unreduced.

    Example:
        >>> quality_focal(torch.tensor([0.0]), torch.tensor([1.0]))
        tensor([0.1733])
    """
    entropy = F.binary_cross_entropy_with_logits(logits, quality, reduction="none")
    return entropy * (logits.sigmoid() - quality).abs() ** beta


@full_precision
def distribution_focal(edges: Tensor, distance: Tensor) -> Tensor:
    """Return the cross-entropy with the two bins around a distance, each by its nearness.

    Args:
        edges: `[..., n + 1]` logits.
        distance: `[...]` in [0, n).

    Returns:
        `[...]`.

    Example:
        >>> distribution_focal(torch.zeros(1, 3), torch.tensor([0.25]))
        tensor([1.0986])
    """
    below = distance.floor()
    said = edges.log_softmax(dim=-1)
    low, high = (said.gather(-1, (below.long() + step)[..., None])[..., 0] for step in (0, 1))
    return -(low * (below + 1 - distance) + high * (distance - below))


@full_precision
def _losses(
    logits: Tensor,
    edges: Tensor,
    anchors: Tensor,
    strides: Tensor,
    counts: Sequence[int],
    image_size: Tensor,
    known: Padded,
) -> dict[str, Tensor]:
    known, anchors, strides = known.to(edges.dtype), anchors.to(edges.dtype), strides.to(edges.dtype)
    flat = known.boxes.flatten(0, 1)
    learnable = on_boxes(flat, anchors, counts, CANDIDATES).view(*known.valid.shape, -1) & known.valid[..., None]
    shared = overlaps(flat, anchors)[0].view_as(learnable).where(learnable, -1.0)
    best, which = shared.max(dim=1)
    goal, label = known.at(which)
    learns = best >= 0
    boxes = _boxes(edges, anchors, strides)
    quality = one_hot(label, learns, logits.shape[2], logits.dtype) * iou_of(boxes.detach(), goal)[..., None]
    centre = (anchors[:, :2] + anchors[:, 2:]) / 2
    seen = (centre < image_size.flip(1)[:, None].to(centre.dtype)).all(dim=2)
    classes = quality_focal(logits, quality).sum(dim=2).where(seen, 0.0).sum() / learns.sum().clamp(min=1)
    sure = logits.detach().sigmoid().amax(dim=2).where(learns, 0.0)
    apart_by = generalized_box_iou_loss(boxes, goal, reduction="none")
    distance = torch.cat([centre - goal[..., :2], goal[..., 2:] - centre], dim=2) / strides[:, None]
    inner = distance.clamp(0, edges.shape[-1] - 1 - INNER)
    spread = distribution_focal(edges, inner).mean(dim=2)
    whole = sure.sum().clamp(min=1)
    return {
        "classes": WEIGHTS["classes"] * classes,
        "boxes": WEIGHTS["boxes"] * (sure * apart_by).sum() / whole,
        "edges": WEIGHTS["edges"] * (sure * spread).sum() / whole,
    }


class Head(nn.Module):
    """Two towers; class logits and distributions of edges for each position.

    `cls` and `box` hold the last layer of a tower and what answers, which CrossKD runs on a student's features; of a
    tower of one layer what answers alone.

    Args:
        width: channels of the pyramid, and of the towers.
        num_classes: K.
        bins: n, the largest distance in strides.
        levels: of the pyramid: each scales the logits of its edges by a factor of its own.
        convolutions: of a tower.
        norm: behind each.
    """

    def __init__(self, width: int, num_classes: int, bins: int, levels: int, convolutions: int, norm: Norm) -> None:
        super().__init__()
        reused = 1 if convolutions > 1 else 0
        self.cls_tower = tower(width, width, convolutions - reused, norm)
        self.box_tower = tower(width, width, convolutions - reused, norm)
        scores = rarely(small(nn.Conv2d(width, num_classes, 3, padding=1)))
        edges = small(nn.Conv2d(width, EDGES * (bins + 1), 3, padding=1))
        self.cls = nn.Sequential(*tower(width, width, reused, norm), scores)
        self.box = nn.Sequential(*tower(width, width, reused, norm), edges)
        self.scales = nn.ModuleList([Scale() for _ in range(levels)])

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return `[B, K, H, W]` and `[B, 4 (n + 1), H, W]` of each level."""
        scores = [self.cls(self.cls_tower(one)) for one in maps]
        boxes = [scale(self.box(self.box_tower(one))) for scale, one in zip(self.scales, maps, strict=True)]
        return scores, boxes


@final
class GFL(nn.Module):
    """Pyramid, two towers, a class score and a distribution for each edge at each position.

    Args:
        num_classes: K.
        bins: n (`reg_max`), the largest distance of an edge, in strides.
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
        >>> model = GFL(3, backbone="tiny8", width=16)
        >>> found = model(torch.zeros(2, 3, 64, 64)).detections()
        >>> len(found), found[0]["boxes"].shape[1]
        (2, 4)
    """

    def __init__(
        self,
        num_classes: int,
        *,
        bins: int = 16,
        convolutions: int = 4,
        head_norm: Norm = "group",
        threshold: float = 0.05,
        candidates: int = 1000,
        iou: float = 0.6,
        most: int = 100,
        **options: Any,
    ) -> None:
        super().__init__()
        if bins < 1 or convolutions < 1:
            raise UserError(f"bins and convolutions are at least 1, not {bins} and {convolutions}")
        self.num_classes, self.bins = num_classes, bins
        self.backbone = Pyramid(**options)
        levels = len(self.backbone.strides)
        self.head = Head(self.backbone.width, num_classes, bins, levels, convolutions, head_norm)
        self.reading = partial(Answers, threshold=threshold, candidates=candidates, iou=iou, most=most)

    def forward(self, pixels: Tensor, image_size: Tensor | None = None) -> Answers:
        """Return the answers of all positions.

        Args:
            pixels: `[B, 3, H, W]`, normalised.
            image_size: `[B, 2]` height and width without padding; without it nothing is padded.
        """
        maps = self.backbone(pixels, image_size)
        scores, boxes = self.head(maps)
        size = sizes(pixels, image_size)
        anchors, strides, counts = [], [], []
        for one, stride in zip(maps, self.backbone.strides, strict=True):
            rows, columns = one.shape[2:]
            anchors.append(grid_anchors([(rows, columns)], (rows * stride, columns * stride), pixels.float(), SCALE))
            strides.append(torch.full_like(anchors[-1][:, 0], stride))
            counts.append(rows * columns)
        return self.reading(
            levels(scores).squeeze(2), levels(boxes, EDGES), torch.cat(anchors), torch.cat(strides), counts, size
        )

    def roles(self) -> dict[str, Tap]:
        """Return the places of the maps, of the answers, and of the towers' features.

        `head.cls[i].pre` and `head.box[i].pre` lie before the ReLU of a tower's last layer but one.
        """
        found = self.backbone.roles()
        for level in range(len(self.backbone.strides)):
            found[f"head.cls[{level}]"] = Tap("head.cls", call=level)
            found[f"head.box[{level}]"] = Tap(f"head.scales.{level}")
            for role, path in (("head.cls", "cls_tower"), ("head.box", "box_tower")):
                last = len(getattr(self.head, path)) - 2
                found[f"{role}[{level}].pre"] = Tap(f"head.{path}.{last}", call=level)
        return found

    def lends(self) -> dict[str, str]:
        """Return the modules a teacher may lend: from the tapped features on, and the scale of each level's edges."""
        scales = {f"head.box[{level}]": f"head.scales.{level}" for level in range(len(self.head.scales))}
        return {"head.cls": "head.cls", "head.box": "head.box", **scales}

    def by_class(self) -> dict[str, tuple[int, int]]:
        """Return the parameters with a row a class; see `tutelage.models.detection.fit`."""
        last = len(self.head.cls) - 1
        return {f"head.cls.{last}.weight": (1, 1), f"head.cls.{last}.bias": (1, 1)}


ARCHITECTURES = {"gfl": GFL}
#: What weights of mmdetection want.
MMDETECTION: dict[str, dict[str, Any]] = {"gfl": {"between": "nothing"}}
