# SPDX-License-Identifier: Apache-2.0
"""What heads over all positions of a pyramid share: padded targets, focal loss, and boxes out of scores.

Everything runs over all images of a batch at once, without a loop over boxes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import batched_nms, box_iou, nms

from tutelage.core import Tap
from tutelage.functional.constant import constant

#: One per image: `boxes` [n, 4] x1, y1, x2, y2; `labels` [n] int64; perhaps `masks` [n, H, W].
Targets = Sequence[Mapping[str, Tensor]]
LARGEST = math.log(1000.0 / 16)  # of the logarithm of a box's growth, as in torchvision


@final
@dataclass(frozen=True)
class Padded:
    """Targets of all images in tensors of one size.

    Args:
        boxes: `[B, N, 4]`, at least one row.
        labels: `[B, N]`.
        valid: `[B, N]` bool, False where a row only fills up.
    """

    boxes: Tensor
    labels: Tensor
    valid: Tensor

    @classmethod
    def of(cls, targets: Targets) -> "Padded":
        """Return the boxes and labels of targets, padded.

        Example:
            >>> none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
            >>> Padded.of([none, none]).valid
            tensor([[False],
                    [False]])
        """
        boxes = [F.pad(one["boxes"], (0, 0, 0, 1)) for one in targets]  # one more, so that no image is empty
        labels = [F.pad(one["labels"], (0, 1)) for one in targets]
        valid = [F.pad(torch.ones_like(one["labels"], dtype=torch.bool), (0, 1)) for one in targets]
        return cls(*(pad_sequence(rows, batch_first=True) for rows in (boxes, labels, valid)))

    def to(self, dtype: torch.dtype) -> "Padded":
        """Return the same with boxes of another type."""
        return replace(self, boxes=self.boxes.to(dtype))

    def at(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the box `[B, A, 4]` and label `[B, A]` of numbers `[B, A]`; numbers below 0 count as 0."""
        place = index.clamp(min=0)
        return self.boxes.gather(1, place[..., None].expand(-1, -1, 4)), self.labels.gather(1, place)


def overlap(boxes: Padded, anchors: Tensor) -> Tensor:
    """Return the IoU `[B, N, A]` of every box and anchor, -1 where a row only fills up."""
    flat: Tensor = box_iou(boxes.boxes.flatten(0, 1), anchors).view(*boxes.valid.shape, len(anchors))
    return flat.where(boxes.valid[..., None], -1.0)


def matched(iou: Tensor, high: float, low: float, *, own: bool = False) -> Tensor:
    """Return which box each anchor learns: -1 for the background, -2 for neither.

    An anchor learns the box with which it overlaps most, if by `high` at least; below `low` it is background. The
    anchors that overlap most with a box learn, however little that is, what they overlap most with; with `own` the
    first of them learns that very box.

    Args:
        iou: `[B, N, A]`, negative in rows without a box.
        high: IoU from which an anchor learns a box.
        low: IoU below which it is background.
        own: see above.

    Returns:
        `[B, A]` int64.
    """
    best, which = iou.max(dim=1)
    found = which.where(best >= high, -2).where(best >= low, -1)
    if own:
        most, place = iou.max(dim=2)
        anchors = iou.shape[2]
        number = torch.arange(iou.shape[1], device=iou.device).expand_as(place)
        place = place.where(most >= 0, anchors)  # rows without a box fall behind the last anchor
        forced = torch.full_like(found[:, :1], -1).expand(-1, anchors + 1)
        forced = forced.scatter_reduce(1, place, number, "amax")[:, :anchors]
        return forced.where(forced >= 0, found)
    most = iou.amax(dim=2, keepdim=True)
    return which.where(((iou == most) & (most > 0)).any(dim=1), found)


def one_hot(labels: Tensor, learns: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """Return `[B, A, K]`: 1 at the label of each anchor that learns a box.

    Example:
        >>> one_hot(torch.tensor([[1, 1]]), torch.tensor([[True, False]]), 2, torch.float32)
        tensor([[[0., 1.],
                 [0., 0.]]])
    """
    learned: Tensor = F.one_hot(labels, num_classes) * learns[..., None]
    return learned.to(dtype)


def focal(logits: Tensor, target: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Return the focal loss of each class, unreduced.

    Args:
        logits: of any shape.
        target: of the same shape, in [0, 1].
        alpha: weight of the positive.
        gamma: how much certain answers count less.

    Reference: Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, eq. 5.
    """
    p = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    right = p * target + (1 - p) * (1 - target)
    return (alpha * target + (1 - alpha) * (1 - target)) * (1 - right) ** gamma * entropy


def encode(boxes: Tensor, anchors: Tensor, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """Return boxes as shifts and growths of their anchors: `[..., 4]` dx, dy, dw, dh.

    Reference: Girshick et al., Rich Feature Hierarchies, CVPR 2014, appendix C.
    """
    size, goal = anchors[..., 2:] - anchors[..., :2], boxes[..., 2:] - boxes[..., :2]
    shift = ((boxes[..., :2] + boxes[..., 2:]) - (anchors[..., :2] + anchors[..., 2:])) / 2 / size
    tiny = torch.finfo(boxes.dtype).tiny
    return torch.cat([shift, (goal / size).clamp(min=tiny).log()], dim=-1) * constant(weights, boxes)


def decode(codes: Tensor, anchors: Tensor, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """Return the boxes that shifts and growths of anchors stand for: the inverse of `encode`.

    Example:
        >>> anchor, box = torch.tensor([[0.0, 0.0, 4.0, 4.0]]), torch.tensor([[1.0, 0.0, 3.0, 8.0]])
        >>> decode(encode(box, anchor), anchor)
        tensor([[1., 0., 3., 8.]])
    """
    codes = codes / constant(weights, codes)
    size = anchors[..., 2:] - anchors[..., :2]
    centre = (anchors[..., :2] + anchors[..., 2:]) / 2 + codes[..., :2] * size
    half = codes[..., 2:].clamp(max=LARGEST).exp() * size / 2
    return torch.cat([centre - half, centre + half], dim=-1)


#: Where torchvision's heads of two towers end, by role.
TOWERS = {"head.cls": "head.classification_head.cls_logits", "head.box": "head.regression_head.bbox_reg"}


def by_level(heads: Mapping[str, str], levels: int) -> dict[str, Tap]:
    """Return the taps of modules that run once for each level of a pyramid, by `role[level]`.

    Args:
        heads: path of the module, by role.
        levels: of the pyramid.
    """
    return {f"{role}[{level}]": Tap(path, call=level) for role, path in heads.items() for level in range(levels)}


def sizes(pixels: Tensor, image_size: Tensor | None) -> Tensor:
    """Return `[B, 2]` heights and widths without padding: those given, or those of the whole batch."""
    if image_size is not None:
        return image_size
    height, width = pixels.shape[-2:]
    return constant((height, width), pixels).expand(len(pixels), 2)


def clipped(boxes: Tensor, image_size: Tensor) -> Tensor:
    """Return boxes cut at the edges of their images.

    Args:
        boxes: `[B, N, 4]`.
        image_size: `[B, 2]` height and width.
    """
    edge = image_size.flip(1).repeat(1, 2)[:, None].to(boxes.dtype)
    return boxes.clamp(min=0).minimum(edge)


def top(scores: Tensor, count: int, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best scores of one level, with the position and class of each.

    Args:
        scores: `[B, A, K]`.
        count: so many at most.
        threshold: scores at or below it become 0, which stands for nothing found.

    Returns:
        scores, positions and classes, `[B, count]` each.
    """
    classes = scores.shape[2]
    best, place = scores.flatten(1).topk(min(count, scores.shape[1] * classes), dim=1)
    return best.where(best > threshold, 0.0), place // classes, place % classes


def picked(values: Tensor, place: Tensor) -> Tensor:
    """Return the rows `[B, N, D]` of values `[B, A, D]` at positions `[B, N]`."""
    return values.gather(1, place[..., None].expand(-1, -1, values.shape[2]))


def apart(
    boxes: Tensor, scores: Tensor, labels: Tensor, *, iou: float, most: int, **more: Any
) -> list[dict[str, Tensor]]:
    """Return what is left of each image's boxes once lesser ones of the same class over better ones are gone.

    Args:
        boxes: `[B, N, 4]`.
        scores: `[B, N]`; those of 0 stand for nothing.
        labels: `[B, N]`.
        iou: overlap above which the lesser goes.
        most: boxes an image.
        more: further `[B, N, ...]` that are picked alike.

    Returns:
        One per image: `boxes` [n, 4], `scores` [n] descending, `labels` [n], and what else was given.
    """
    found = []
    for number in range(len(boxes)):  # images differ in what they hold
        there = (scores[number] > 0).nonzero().flatten()
        rows = {"boxes": boxes, "scores": scores, "labels": labels, **more}
        picked = {name: value[number, there] for name, value in rows.items()}
        kept = batched_nms(picked["boxes"].float(), picked["scores"].float(), picked["labels"], iou)[:most]
        found.append({name: value[kept] for name, value in picked.items()})
    return found


def settled(
    boxes: Tensor, scores: Tensor, labels: Tensor, *, iou: float | None, most: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `apart` keeps of one image, in tensors of one size: for exported copies.

    Args:
        boxes: `[N, 4]`.
        scores: `[N]`; those of 0 stand for nothing.
        labels: `[N]`.
        iou: overlap above which the lesser goes, or None if all stay.
        most: boxes.

    Returns:
        `[most, 4]`, `[most]` descending, and `[most]`; rows with score 0 stand for nothing, and are 0.
    """
    if iou is not None:
        side = boxes.max() + 1  # boxes of other classes are moved out of each other's way
        kept = nms(boxes + (labels.to(boxes.dtype) * side)[:, None], scores, iou)
        scores = scores * torch.zeros_like(scores).scatter(0, kept, torch.ones_like(kept, dtype=scores.dtype))
    best, place = scores.topk(min(most, len(scores)))
    there = best > 0  # else any of them might be named
    return boxes[place] * there[:, None], best, labels[place] * there
