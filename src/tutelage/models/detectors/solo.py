# SPDX-License-Identifier: Apache-2.0
"""SOLO: instance masks without boxes: each cell of a grid names the object whose middle it holds, and draws it.

Objects are divided among the levels by their size; a cell at a middle has a channel of its own for its mask.

Reference: Wang et al., SOLO: Segmenting Objects by Locations, ECCV 2020; matrix suppression: Wang et al., SOLOv2:
Dynamic and Fast Instance Segmentation, NeurIPS 2020, section 3.4.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tutelage.core import Tap
from tutelage.core.error import UserError
from tutelage.functional.precision import full_precision
from tutelage.models.detectors.dense import Padded, Targets, focal, one_hot, sizes
from tutelage.models.detectors.pyramid import Pyramid
from tutelage.models.detectors.towers import Norm, rarely, small, tower

GRIDS = (40, 36, 24, 16, 12)
RANGES = ((1, 96), (48, 192), (96, 384), (192, 768), (384, 2048))  # of an object's size, in pixels
MIDDLE = 0.2  # of a box: the share around its centre whose cells learn the object
NEAR = 1  # at most so many cells from the centre's
DICE = 3.0  # weight of the masks' loss
EPS = 1e-3


@final
@dataclass(frozen=True)
class Answers:
    """What the network said of a batch.

    Args:
        logits: `[B, K, S, S]` of each level: the class of the object in the middle of each cell.
        masks: `[B, S S, h, w]` logits of each level: where the object of each cell is.
        size: padded (height, width) that the masks cover.
        pixels: (height, width) of the batch.
        ranges: least and largest size of the objects of each level.
        image_size: `[B, 2]` height and width without padding.
        threshold: score below which nothing was found.
        last: the same after suppression.
        inside: probability from which a pixel is of the object.
        candidates: best cells that are looked at.
        sigma: of the suppression: how fast a lesser mask over a better one loses its score.
        most: objects an image.
    """

    logits: Sequence[Tensor]
    masks: Sequence[Tensor]
    size: tuple[int, int]
    pixels: tuple[int, int]
    ranges: Sequence[tuple[float, float]]
    image_size: Tensor
    threshold: float
    last: float
    inside: float
    candidates: int
    sigma: float
    most: int

    def losses(self, targets: Targets) -> dict[str, Tensor]:
        """Return the focal loss of the cells, and the dice loss of the masks of cells that learn an object.

        The first is divided by the number of these cells plus one, the second is a mean over them, over the whole
        batch.

        Raises:
            UserError: if the targets have no masks.
        """
        if any("masks" not in one for one in targets):
            raise UserError("solo learns from instance masks, and this data has boxes only: use another detector")
        known = Padded.of(targets)
        height, width = self.size
        shapes = [
            F.pad(one["masks"], (0, width - one["masks"].shape[2], 0, height - one["masks"].shape[1]))
            for one in targets
        ]
        rows = known.valid.shape[1]
        shapes = [F.pad(one, (0, 0, 0, 0, 0, rows - len(one))) for one in shapes]
        return _losses(self.logits, self.masks, self.ranges, torch.stack(shapes).float(), known)

    def rows(self, rows: Sequence[int]) -> "Answers":
        """Return what was said of some of the images."""
        index = torch.tensor(rows, device=self.image_size.device)
        return replace(
            self,
            logits=[one[index] for one in self.logits],
            masks=[one[index] for one in self.masks],
            image_size=self.image_size[index],
        )

    def detections(self) -> list[dict[str, Tensor]]:
        """Return the objects of each image, best first, with masks in the pixels of the batch and boxes around them."""
        found = []
        for image in range(len(self.image_size)):  # images differ in what they hold
            boxes, scores, labels, masks = self._told(image)
            there = scores > 0
            rows = {"boxes": boxes, "scores": scores, "labels": labels, "masks": masks}
            found.append({name: value[there] for name, value in rows.items()})
        return found

    def exported(self) -> tuple[Tensor, ...]:
        """Return boxes, scores, labels and masks of the first image, in tensors of one size.

        Returns:
            `[most, 4]`, `[most]`, `[most]` and `[most, H, W]` in the pixels of the image; rows with score 0 stand for
            nothing.
        """
        boxes, scores, labels, masks = self._told(0)
        return boxes, scores, labels, masks.float()

    def _told(self, image: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return boxes, scores, labels and masks of an image; rows with score 0 stand for nothing."""
        scores = torch.cat([_peaks(one[image].float().sigmoid()[None]).flatten(2)[0].T for one in self.logits])
        classes = scores.shape[1]
        best, place = scores.flatten().topk(min(self.candidates, scores.numel()))
        best, cells, labels = best.where(best > self.threshold, 0.0), place // classes, place % classes
        fine = (self.masks[0].shape[2], self.masks[0].shape[3])
        maps = best.new_zeros(len(best), *fine)
        least = torch.zeros_like(best)  # pixels of a mask: one stride of its level's map
        start = 0
        for one in self.masks:
            end = start + one.shape[1]
            own = (cells >= start) & (cells < end)
            drawn = one[image, (cells - start).clamp(0, one.shape[1] - 1)].float().sigmoid()
            drawn = F.interpolate(drawn[:, None], fine, mode="bilinear", align_corners=False)[:, 0]
            maps = torch.where(own[:, None, None], drawn, maps)
            least = least.where(~own, 2.0 * self.size[0] / one.shape[2])
            start = end
        inner = (maps > self.inside).to(maps.dtype)
        area = inner.sum((1, 2))
        best = (best * (maps * inner).sum((1, 2)) / area.clamp(min=1)).where(area > least, 0.0)
        best, order = best.topk(len(best))
        best = best * decay(inner[order], labels[order], self.sigma)
        best, again = best.where(best > self.last, 0.0).topk(min(self.most, len(best)))
        order = order[again]
        whole = F.interpolate(maps[order][:, None], self.size, mode="bilinear", align_corners=False)[:, 0]
        masks = (whole > self.inside)[:, : self.pixels[0], : self.pixels[1]]
        rows, columns = (
            torch.arange(side, device=masks.device) < self.image_size[image, axis]
            for axis, side in enumerate(self.pixels)
        )
        masks = masks & rows[:, None] & columns
        return around(masks), best.where(masks.flatten(1).any(dim=1), 0.0), labels[order], masks


def around(masks: Tensor) -> Tensor:
    """Return the boxes `[n, 4]` around masks `[n, H, W]`, from edge to edge of their pixels.

    Example:
        >>> around(torch.tensor([[[False, False, False], [False, True, True]]]))
        tensor([[1., 1., 3., 2.]])
    """
    edges = []
    for axis in (1, 2):  # columns, rows
        there = masks.any(dim=axis).to(torch.uint8)
        edges.append((there.argmax(dim=1), there.shape[1] - there.flip(1).argmax(dim=1)))
    (left, right), (upper, lower) = edges
    return torch.stack([left, upper, right, lower], dim=1).float()


def _peaks(scores: Tensor) -> Tensor:
    """Return scores that are 0 where the cell above, to the left or between has a higher one."""
    most = F.max_pool2d(scores, 2, stride=1, padding=1)[:, :, :-1, :-1]
    return scores.where(scores == most, 0.0)


def decay(masks: Tensor, labels: Tensor, sigma: float = 2.0) -> Tensor:
    """Return what is left of the score of each mask for those of its class that are better and lie over it.

    f = min over better i of exp( -sigma ( iou_ij^2 - iou_i^2 ) ), iou_i the largest overlap of i with a better one.

    Args:
        masks: `[n, H, W]` of 0 and 1, best first.
        labels: `[n]`.
        sigma: how fast scores fall.

    Returns:
        `[n]` in [0, 1].

    Example:
        >>> one = torch.tensor([[[1.0, 1.0, 0.0]], [[1.0, 1.0, 0.0]], [[0.0, 0.0, 1.0]]])
        >>> decay(one, torch.zeros(3))
        tensor([1.0000, 0.1353, 1.0000])
    """
    if not len(masks):
        return masks.new_zeros(0)
    flat = masks.flatten(1)
    inter, area = flat @ flat.T, flat.sum(dim=1)
    iou = inter / (area[:, None] + area - inter).clamp(min=1)
    iou = iou.where(labels[:, None] == labels, 0.0).triu(diagonal=1)
    already = iou.amax(dim=0)[:, None]
    left: Tensor = (-sigma * (iou.square() - already.square())).exp().amin(dim=0)
    return left


@torch.no_grad()
def cells(masks: Tensor, known: Padded, grid: int, within: tuple[float, float]) -> tuple[Tensor, Tensor, Tensor]:
    """Return which object each cell of one level learns.

    An object of the level's sizes is learned by the cells over the inner part of its box around its centre of mass,
    at most one cell from the centre's; of several the last.

    Args:
        masks: `[B, N, H, W]` of 0 and 1.
        known: boxes of the objects.
        grid: S.
        within: least and largest size, the root of the box's area.

    Returns:
        `[B, S S]` number of the object, -1 for none; for each object nine cells, `[B, N, 9]`, and which of these
        learn it, bool.
    """
    area = masks.sum((2, 3))
    sides = known.boxes[..., 2:] - known.boxes[..., :2]
    size = sides.clamp(min=0).prod(dim=2).sqrt()
    learned = known.valid & (area > 0) & (size >= within[0]) & (size <= within[1])
    index, fine = [], []
    for axis, extent in ((0, masks.shape[2]), (1, masks.shape[3])):
        place = torch.arange(extent, device=masks.device, dtype=masks.dtype)
        centre = (masks.sum(3 - axis) * place).sum(dim=2) / area.clamp(min=1)
        half = MIDDLE / 2 * sides[..., 1 - axis]
        low, own, high = ((c / extent * grid).floor() for c in (centre - half, centre, centre + half))
        steps = own[..., None] + torch.arange(-NEAR, NEAR + 1, device=masks.device)
        fine.append((steps >= low.clamp(min=0)[..., None]) & (steps <= high.clamp(max=grid - 1)[..., None]))
        index.append(steps.clamp(0, grid - 1).long())
    cell = (index[0][..., :, None] * grid + index[1][..., None, :]).flatten(2)
    there = (fine[0][..., :, None] & fine[1][..., None, :]).flatten(2) & learned[..., None]
    number = torch.arange(masks.shape[1], device=masks.device)[:, None].expand_as(cell)
    which = torch.full((len(masks), grid * grid), -1, device=masks.device)
    which = which.scatter_reduce(1, cell.flatten(1), number.where(there, -1).flatten(1), "amax")
    return which, cell, there & (which.gather(1, cell.flatten(1)).view_as(cell) == number)


@full_precision
def _losses(
    logits: Sequence[Tensor],
    masks: Sequence[Tensor],
    ranges: Sequence[tuple[float, float]],
    shapes: Tensor,
    known: Padded,
) -> dict[str, Tensor]:
    known, shapes = known.to(masks[0].dtype), shapes.to(masks[0].dtype)
    classes, dice, count = [], [], []
    for scores, drawn, within in zip(logits, masks, ranges, strict=True):
        which, cell, learned = cells(shapes, known, scores.shape[2], within)
        _, label = known.at(which)
        target = one_hot(label, which >= 0, scores.shape[1], scores.dtype)
        classes.append(focal(scores.flatten(2).transpose(1, 2), target).sum())
        # nine places an object, filled or not: what is gathered does not depend on how many learn
        flat, slots = drawn.flatten(2), cell.flatten(1)
        said = flat.gather(1, slots[..., None].expand(-1, -1, flat.shape[2])).sigmoid().unflatten(1, cell.shape[1:])
        true = (F.interpolate(shapes, drawn.shape[2:], mode="bilinear", align_corners=False) >= 0.5).to(said.dtype)
        true = true.flatten(2)
        both = torch.einsum("bngx,bnx->bng", said, true)
        apart = 1 - 2 * both / (said.square().sum(dim=3) + true.sum(dim=2)[..., None] + 2 * EPS)
        dice.append(apart.where(learned, 0.0).sum())
        count.append(learned.sum())
    learning = torch.stack(count).sum()
    return {
        "classes": torch.stack(classes).sum() / (learning + 1),
        "masks": DICE * torch.stack(dice).sum() / learning.clamp(min=1),
    }


class Head(nn.Module):
    """A tower over the cells of a grid for classes; one over the map, which knows its coordinates, for masks.

    Args:
        width: channels of the pyramid.
        num_classes: K.
        grids: cells a side, of each level.
        convolutions: of a tower.
        hidden: channels of the towers.
        norm: behind each convolution.
    """

    def __init__(
        self, width: int, num_classes: int, grids: Sequence[int], convolutions: int, hidden: int, norm: Norm
    ) -> None:
        super().__init__()
        self.grids = tuple(grids)
        self.cls_tower = tower(width, hidden, convolutions, norm)
        self.mask_tower = tower(width + 2, hidden, convolutions, norm)
        self.cls = rarely(small(nn.Conv2d(hidden, num_classes, 3, padding=1)))
        self.masks = small(nn.ModuleList([nn.Conv2d(hidden, grid * grid, 1) for grid in grids]))

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return `[B, K, S, S]` and `[B, S S, 2 h, 2 w]` of each level."""
        scores, masks = [], []
        for one, grid, draw in zip(maps, self.grids, self.masks, strict=True):
            scores.append(self.cls(self.cls_tower(_sized(one, (grid, grid)))))
            y, x = (torch.linspace(-1, 1, side, device=one.device, dtype=one.dtype) for side in one.shape[2:])
            places = torch.stack(torch.meshgrid(x, y, indexing="xy")).expand(len(one), -1, -1, -1)
            seen = self.mask_tower(torch.cat([one, places], dim=1))
            masks.append(draw(_sized(seen, (2 * one.shape[2], 2 * one.shape[3]))))
        return scores, masks


def _sized(one: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(one, size, mode="bilinear", align_corners=False)


@final
class SOLO(nn.Module):
    """Pyramid, a tower for classes and one for masks, shared by five levels.

    The finest map is halved and the coarsest brought to the size of the one before it, as published.

    Args:
        num_classes: K.
        grids: cells a side, of each level.
        ranges: least and largest size of the objects of each level, in pixels.
        convolutions: of a tower.
        hidden: channels of the towers.
        head_norm: behind each convolution: `group`, `batch` or `none`.
        threshold: score below which nothing was found.
        last: the same after suppression.
        inside: probability from which a pixel is of the object.
        candidates: best cells of an image that are looked at.
        sigma: how fast a lesser mask over a better one loses its score.
        most: objects an image.
        options: of `Pyramid`.

    Raises:
        UserError: if grids, ranges and levels are not equally many.

    Example:
        >>> model = SOLO(3, backbone="tiny8", width=16, convolutions=1, hidden=16)
        >>> found = model(torch.zeros(2, 3, 64, 64)).detections()
        >>> len(found), tuple(found[0]["masks"].shape[1:])
        (2, (64, 64))
    """

    #: exported copies tell masks
    tells_masks = True

    def __init__(
        self,
        num_classes: int,
        *,
        grids: Sequence[int] = GRIDS,
        ranges: Sequence[tuple[float, float]] = RANGES,
        convolutions: int = 7,
        hidden: int = 256,
        head_norm: Norm = "group",
        threshold: float = 0.1,
        last: float = 0.05,
        inside: float = 0.5,
        candidates: int = 500,
        sigma: float = 2.0,
        most: int = 100,
        **options: Any,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.backbone = Pyramid(**{"levels": (4, 8, 16, 32), "extra": "pool", **options})
        count = len(self.backbone.strides)
        if not len(grids) == len(ranges) == count:
            raise UserError(
                f"solo needs a grid and a range of sizes for each of the {count} levels of its pyramid, "
                f"not {len(grids)} and {len(ranges)}"
            )
        if count < 2 or convolutions < 1:
            raise UserError(f"solo has at least 2 levels and 1 convolution, not {count} and {convolutions}")
        self.ranges = [(float(low), float(high)) for low, high in ranges]
        self.head = Head(self.backbone.width, num_classes, grids, convolutions, hidden, head_norm)
        self.reading = partial(
            Answers, threshold=threshold, last=last, inside=inside, candidates=candidates, sigma=sigma, most=most
        )

    def forward(self, pixels: Tensor, image_size: Tensor | None = None) -> Answers:
        """Return the answers of all cells.

        Args:
            pixels: `[B, 3, H, W]`, normalised.
            image_size: `[B, 2]` height and width without padding; without it nothing is padded.
        """
        maps = self.backbone(pixels, image_size)
        finest = (-(-maps[0].shape[2] // 2), -(-maps[0].shape[3] // 2))
        coarsest = finest if len(maps) == 2 else tuple(maps[-2].shape[2:])
        maps = [_sized(maps[0], finest), *maps[1:-1], _sized(maps[-1], coarsest)]
        scores, masks = self.head(maps)
        stride = 2 * self.backbone.strides[0]
        size = (finest[0] * stride, finest[1] * stride)
        given = sizes(pixels, image_size)
        return self.reading(scores, masks, size, (pixels.shape[2], pixels.shape[3]), self.ranges, given)

    def roles(self) -> dict[str, Tap]:
        """Return the places of the maps and of the answers; `head.box[i]` are the masks, there are no boxes."""
        found = self.backbone.roles()
        for level in range(len(self.backbone.strides)):
            found[f"head.cls[{level}]"] = Tap("head.cls", call=level)
            found[f"head.box[{level}]"] = Tap(f"head.masks.{level}")
        return found

    def lends(self) -> dict[str, str]:
        """Return the module a teacher may lend: the last convolution for classes."""
        return {"head.cls": "head.cls"}

    def by_class(self) -> dict[str, tuple[int, int]]:
        """Return the parameters with a row a class; see `tutelage.models.detection.fit`."""
        return {"head.cls.weight": (1, 1), "head.cls.bias": (1, 1)}


ARCHITECTURES = {"solo": SOLO}
