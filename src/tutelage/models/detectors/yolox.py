# SPDX-License-Identifier: Apache-2.0
"""YOLOX: a cross-stage partial backbone, a pyramid that goes down and up again, one decoupled answer a position.

Which positions learn a box is decided anew in each step by what they say (SimOTA). Names of parameters are the
published ones, so that its weights fit.

Reference: Ge et al., YOLOX: Exceeding YOLO Series in 2021, arXiv 2107.08430.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tutelage.core import InputSpec, Tap
from tutelage.core.error import UserError
from tutelage.functional.anchors import levels
from tutelage.functional.boxes import iou_of
from tutelage.functional.precision import full_precision
from tutelage.models.detectors.dense import LARGEST, Padded, Targets, apart, clipped, one_hot, sizes
from tutelage.models.detectors.pyramid import blacked
from tutelage.models.detectors.towers import rarely

STRIDES = (8, 16, 32)
RADIUS = 2.5  # of the middle of a box, in strides
NEAREST = 10  # overlaps that say how many positions learn a box
OUTSIDE = 1e5  # cost of a position off a box or off its middle
LEAST_LOG = -100.0
FILL = 114.0  # grey of the padding, where pixels are those of the published weights
WEIGHTS = {"boxes": 5.0, "overlap": 3.0}  # of the loss; of overlap in the cost
#: depth and width of the published sizes
SIZES = {
    "yolox_nano": (0.33, 0.25),
    "yolox_tiny": (0.33, 0.375),
    "yolox_s": (0.33, 0.5),
    "yolox_m": (0.67, 0.75),
    "yolox_l": (1.0, 1.0),
    "yolox_x": (1.33, 1.25),
}


class BaseConv(nn.Module):
    """Convolution, batch norm, SiLU."""

    def __init__(self, width_in: int, width: int, size: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width_in, width, size, stride, (size - 1) // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=1e-3, momentum=0.03)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return `[B, width, H / stride, W / stride]`."""
        out: Tensor = self.act(self.bn(self.conv(x)))
        return out


class DWConv(nn.Module):
    """A 3x3 convolution channel by channel, then a 1x1 over channels."""

    def __init__(self, width_in: int, width: int, size: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.dconv = BaseConv(width_in, width_in, size, stride, groups=width_in)
        self.pconv = BaseConv(width_in, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return `[B, width, H / stride, W / stride]`."""
        out: Tensor = self.pconv(self.dconv(x))
        return out


class Bottleneck(nn.Module):
    """A 1x1 and a 3x3 convolution, perhaps around a shortcut."""

    def __init__(self, width: int, shortcut: bool, wide: type[nn.Module]) -> None:
        super().__init__()
        self.conv1 = BaseConv(width, width)
        self.conv2 = wide(width, width, 3)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same size."""
        out: Tensor = self.conv2(self.conv1(x))
        return out + x if self.shortcut else out


class CSPLayer(nn.Module):
    """Half the channels go through bottlenecks, half pass by."""

    def __init__(self, width_in: int, width: int, depth: int, wide: type[nn.Module], *, shortcut: bool = True) -> None:
        super().__init__()
        hidden = width // 2
        self.conv1 = BaseConv(width_in, hidden)
        self.conv2 = BaseConv(width_in, hidden)
        self.conv3 = BaseConv(2 * hidden, width)
        self.m = nn.Sequential(*(Bottleneck(hidden, shortcut, wide) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        """Return `[B, width, H, W]`."""
        out: Tensor = self.conv3(torch.cat([self.m(self.conv1(x)), self.conv2(x)], dim=1))
        return out


class SPPBottleneck(nn.Module):
    """The same map seen through maxima of four sizes."""

    def __init__(self, width: int, sizes: Sequence[int] = (5, 9, 13)) -> None:
        super().__init__()
        self.conv1 = BaseConv(width, width // 2)
        self.m = nn.ModuleList([nn.MaxPool2d(size, stride=1, padding=size // 2) for size in sizes])
        self.conv2 = BaseConv(width // 2 * (len(sizes) + 1), width)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the same size."""
        x = self.conv1(x)
        out: Tensor = self.conv2(torch.cat([x, *(pool(x) for pool in self.m)], dim=1))
        return out


class Focus(nn.Module):
    """Four pixels of a square become channels of one position, then a 3x3 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = BaseConv(12, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return `[B, width, H / 2, W / 2]`."""
        corners = [x[..., row::2, column::2] for column in (0, 1) for row in (0, 1)]
        out: Tensor = self.conv(torch.cat(corners, dim=1))
        return out


class CSPDarknet(nn.Module):
    """The backbone: maps of strides 8, 16 and 32.

    Args:
        depth: 3 and 9 bottlenecks a stage, times this.
        width: 64 channels of the stem, times this; each stage doubles them.
        wide: of 3x3 convolutions.
    """

    def __init__(self, depth: float, width: float, wide: type[nn.Module]) -> None:
        super().__init__()
        stem, short = int(64 * width), max(round(3 * depth), 1)
        self.widths = [stem * 4, stem * 8, stem * 16]
        self.stem = Focus(stem)
        self.dark2 = nn.Sequential(wide(stem, 2 * stem, 3, 2), CSPLayer(2 * stem, 2 * stem, short, wide))
        self.dark3 = nn.Sequential(wide(2 * stem, 4 * stem, 3, 2), CSPLayer(4 * stem, 4 * stem, 3 * short, wide))
        self.dark4 = nn.Sequential(wide(4 * stem, 8 * stem, 3, 2), CSPLayer(8 * stem, 8 * stem, 3 * short, wide))
        self.dark5 = nn.Sequential(
            wide(8 * stem, 16 * stem, 3, 2),
            SPPBottleneck(16 * stem),
            CSPLayer(16 * stem, 16 * stem, short, wide, shortcut=False),
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the last three maps."""
        fine = self.dark3(self.dark2(self.stem(x)))
        middle = self.dark4(fine)
        return [fine, middle, self.dark5(middle)]


class PAFPN(nn.Module):
    """Backbone and pyramid: from the coarsest map down to the finest, and up again."""

    def __init__(self, depth: float, width: float, wide: type[nn.Module]) -> None:
        super().__init__()
        self.backbone = CSPDarknet(depth, width, wide)
        low, middle, high = self.widths = self.backbone.widths
        count = round(3 * depth)

        def layer(width_in: int, width: int) -> CSPLayer:
            return CSPLayer(width_in, width, count, wide, shortcut=False)

        self.lateral_conv0 = BaseConv(high, middle)
        self.C3_p4 = layer(2 * middle, middle)
        self.reduce_conv1 = BaseConv(middle, low)
        self.C3_p3 = layer(2 * low, low)
        self.bu_conv2 = wide(low, low, 3, 2)
        self.C3_n3 = layer(2 * low, middle)
        self.bu_conv1 = wide(middle, middle, 3, 2)
        self.C3_n4 = layer(2 * middle, high)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return maps of strides 8, 16 and 32."""
        fine, middle, coarse = self.backbone(x)
        top = self.lateral_conv0(coarse)
        inner = self.C3_p4(torch.cat([_grown(top, middle), middle], dim=1))
        reduced = self.reduce_conv1(inner)
        low = self.C3_p3(torch.cat([_grown(reduced, fine), fine], dim=1))
        mid = self.C3_n3(torch.cat([self.bu_conv2(low), reduced], dim=1))
        return [low, mid, self.C3_n4(torch.cat([self.bu_conv1(mid), top], dim=1))]


def _grown(coarse: Tensor, fine: Tensor) -> Tensor:
    return F.interpolate(coarse, fine.shape[2:], mode="nearest")


class Head(nn.Module):
    """For each level a stem, and two towers for class on one side, box and objectness on the other."""

    def __init__(self, num_classes: int, widths: Sequence[int], width: int, wide: type[nn.Module]) -> None:
        super().__init__()
        self.stems = nn.ModuleList([BaseConv(own, width) for own in widths])
        for name in ("cls_convs", "reg_convs"):
            towers = [nn.Sequential(wide(width, width, 3), wide(width, width, 3)) for _ in widths]
            setattr(self, name, nn.ModuleList(towers))
        for name, channels in (("cls_preds", num_classes), ("reg_preds", 4), ("obj_preds", 1)):
            setattr(self, name, nn.ModuleList([nn.Conv2d(width, channels, 1) for _ in widths]))
        for level in range(len(widths)):
            for name in ("cls_preds", "obj_preds"):
                rarely(self.get_submodule(f"{name}.{level}"))

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return class logits, box codes and objectness logits of each level, maps each."""
        stems = [stem(one) for stem, one in zip(self.stems, maps, strict=True)]
        sides = [
            [tower(one) for tower, one in zip(getattr(self, name), stems, strict=True)]
            for name in ("cls_convs", "reg_convs")
        ]
        scores, boxes, objects = (
            [layer(one) for layer, one in zip(getattr(self, name), side, strict=True)]
            for name, side in (("cls_preds", sides[0]), ("reg_preds", sides[1]), ("obj_preds", sides[1]))
        )
        return scores, boxes, objects


@final
@dataclass(frozen=True)
class Answers:
    """What the network said of a batch.

    Args:
        logits: `[B, A, K]`, level after level.
        boxes: `[B, A, 4]` x1, y1, x2, y2.
        objects: `[B, A]` logits of whether anything is there.
        codes: `[B, A, 4]` of the boxes: shift of the corner of a cell and logarithm of the size, in strides.
        places: `[A, 2]` x and y of the corners of the cells.
        strides: `[A]`.
        image_size: `[B, 2]` height and width without padding.
        threshold: score below which nothing was found.
        candidates: best positions that are looked at.
        iou: overlap above which the lesser of two boxes goes.
        most: boxes an image.
        edges: whether the codes are compared too.
    """

    logits: Tensor
    boxes: Tensor
    objects: Tensor
    codes: Tensor
    places: Tensor
    strides: Tensor
    image_size: Tensor
    threshold: float
    candidates: int
    iou: float
    most: int
    edges: bool

    def losses(self, targets: Targets) -> dict[str, Tensor]:
        """Return the parts for boxes, objectness and classes, perhaps for edges.

        Each is summed over positions and divided by the number that learn a box, over the whole batch.
        """
        known = Padded.of(targets)
        parts = _losses(self.logits, self.boxes, self.objects, self.codes, self.places, self.strides, known)
        return parts if self.edges else {name: part for name, part in parts.items() if name != "edges"}

    def rows(self, rows: Sequence[int]) -> "Answers":
        """Return what was said of some of the images."""
        index = torch.tensor(rows, device=self.logits.device)
        some = {name: getattr(self, name)[index] for name in ("logits", "boxes", "objects", "codes", "image_size")}
        return replace(self, **some)

    def detections(self) -> list[dict[str, Tensor]]:
        """Return what was found in each image, best first, in the pixels of the batch."""
        boxes, scores, labels = self.candidates_of()
        return apart(boxes, scores, labels, iou=self.iou, most=self.most)

    def candidates_of(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the best boxes `[B, N, 4]`, scores and labels `[B, N]`, overlaps among them: a class a position."""
        scores, labels = self.logits.float().sigmoid().max(dim=2)
        best, place = (scores * self.objects.float().sigmoid()).topk(min(self.candidates, scores.shape[1]), dim=1)
        boxes = self.boxes.float().gather(1, place[..., None].expand(-1, -1, 4))
        return clipped(boxes, self.image_size), best.where(best > self.threshold, 0.0), labels.gather(1, place)


@full_precision
@torch.no_grad()
def assigned(
    logits: Tensor, boxes: Tensor, objects: Tensor, places: Tensor, strides: Tensor, known: Padded
) -> tuple[Tensor, Tensor]:
    """Return which box each position learns (-1 for none) and its overlap with what is said there.

    A box is learned by the k positions that say it at the least cost, k the sum of its ten largest overlaps, at
    least 1; a position learns the box of least cost. The cost is the cross-entropy of classes plus three times
    -log of the overlap; positions that lie not both on the box and near its middle come last, and those that lie on
    no box and near no middle never.

    Args:
        logits: `[B, A, K]`.
        boxes: `[B, A, 4]`.
        objects: `[B, A]` logits.
        places: `[A, 2]` centres of the cells.
        strides: `[A]`.
        known: the targets.

    Returns:
        two `[B, A]`.

    Reference: section 2.1 of the paper; Ge et al., OTA, CVPR 2021.
    """
    truth, valid = known.boxes.to(boxes.dtype), known.valid[..., None]
    on = torch.cat([places - truth[:, :, None, :2], truth[:, :, None, 2:] - places], dim=3).amin(dim=3) > 0
    middle = (truth[..., :2] + truth[..., 2:]) / 2
    near = (places - middle[:, :, None]).abs().amax(dim=3) < RADIUS * strides
    candidate = ((on | near) & valid).any(dim=1, keepdim=True)
    overlap = iou_of(truth[:, :, None], boxes[:, None]).where(candidate & valid, 0.0)
    probability = (logits.sigmoid() * objects.sigmoid()[..., None]).sqrt()
    yes, no = (side.log().clamp(min=LEAST_LOG) for side in (probability, 1 - probability))
    label = known.labels[..., None].expand(-1, -1, logits.shape[1])
    of_class = (no - yes).transpose(1, 2).gather(1, label.clamp(max=logits.shape[2] - 1))
    cost = of_class - no.sum(dim=2)[:, None] - WEIGHTS["overlap"] * (overlap + 1e-8).log()
    cost = cost + OUTSIDE * ~(on & near)
    cost = cost.where(candidate & valid, math.inf)
    count = min(NEAREST, overlap.shape[2])
    wanted = overlap.topk(count, dim=2).values.sum(dim=2).int().clamp(min=1)
    least, where = cost.topk(count, dim=2, largest=False)
    taken = (torch.arange(count, device=cost.device) < wanted[..., None]) & least.isfinite()
    chosen = torch.zeros_like(overlap, dtype=torch.bool).scatter(2, where, taken)
    several = chosen.sum(dim=1, keepdim=True) > 1
    cheapest = F.one_hot(cost.argmin(dim=1), cost.shape[1]).transpose(1, 2).bool()
    chosen = (chosen & ~several) | (cheapest & several)
    learns, which = chosen.int().max(dim=1)
    return which.where(learns > 0, -1), (overlap * chosen).sum(dim=1)


@full_precision
def _losses(
    logits: Tensor, boxes: Tensor, objects: Tensor, codes: Tensor, places: Tensor, strides: Tensor, known: Padded
) -> dict[str, Tensor]:
    known, places, strides = known.to(boxes.dtype), places.to(boxes.dtype), strides.to(boxes.dtype)
    centres = places + strides[:, None] / 2
    which, overlap = assigned(logits, boxes, objects, centres, strides, known)
    goal, label = known.at(which)
    learns = which >= 0
    count = learns.sum().clamp(min=1)
    target = one_hot(label, learns, logits.shape[2], logits.dtype) * overlap[..., None]
    classes = F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(dim=2)
    anything = F.binary_cross_entropy_with_logits(objects, learns.to(objects.dtype), reduction="none")
    middle, size = (goal[..., :2] + goal[..., 2:]) / 2, goal[..., 2:] - goal[..., :2]
    shift, growth = (middle - places) / strides[:, None], (size / strides[:, None] + 1e-8).log()
    edges = (codes - torch.cat([shift, growth], dim=2)).abs().sum(dim=2)
    return {
        "boxes": WEIGHTS["boxes"] * (1 - iou_of(boxes, goal).square()).where(learns, 0.0).sum() / count,
        "objects": anything.sum() / count,
        "classes": classes.where(learns, 0.0).sum() / count,
        "edges": edges.where(learns, 0.0).sum() / count,
    }


@final
class YOLOX(nn.Module):
    """Backbone, pyramid and head of YOLOX; by its name with the depth and width of a published size.

    Args:
        num_classes: K.
        depth: of the network, as a share of the size `l`.
        width: of the network, likewise.
        depthwise: 3x3 convolutions go channel by channel (the size `nano`).
        edges: compare the codes of boxes as well, as published runs do in their last 15 epochs.
        published_pixels: blue, green, red from 0 to 255 without normalisation, as published weights want them, in
            the place of ImageNet's constants.
        threshold: score below which nothing was found.
        candidates: best positions that are looked at.
        iou: overlap above which the lesser of two boxes of a class goes.
        most: boxes an image.

    Raises:
        UserError: if depth or width make no sense.

    Example:
        >>> model = YOLOX(3, depth=0.33, width=0.125)
        >>> found = model.eval()(torch.zeros(2, 3, 64, 64)).detections()
        >>> len(found), found[0]["boxes"].shape[1]
        (2, 4)
    """

    def __init__(
        self,
        num_classes: int,
        *,
        depth: float = 1.0,
        width: float = 1.0,
        depthwise: bool = False,
        edges: bool = False,
        published_pixels: bool = True,
        threshold: float = 0.01,
        candidates: int = 1000,
        iou: float = 0.65,
        most: int = 100,
    ) -> None:
        super().__init__()
        if depth <= 0 or int(64 * width) < 2:
            raise UserError(f"depth is > 0 and width at least 1/32, not {depth} and {width}")
        wide: type[nn.Module] = DWConv if depthwise else BaseConv
        self.num_classes = num_classes
        self.fill = 0.0
        if published_pixels:
            self.fill = FILL
            self.pixels = InputSpec(mean=(0.0,) * 3, std=(1 / 255,) * 3, bgr=True)
        self.backbone = PAFPN(depth, width, wide)
        self.head = Head(num_classes, self.backbone.widths, int(256 * width), wide)
        self.reading = partial(Answers, threshold=threshold, candidates=candidates, iou=iou, most=most, edges=edges)

    def forward(self, pixels: Tensor, image_size: Tensor | None = None) -> Answers:
        """Return the answers of all positions.

        Args:
            pixels: `[B, 3, H, W]`, whose sides are padded to multiples of 32 here.
            image_size: `[B, 2]` height and width without padding; without it nothing is padded.
        """
        size = sizes(pixels, image_size)
        if image_size is not None:
            inside = blacked(torch.ones_like(pixels[:, :1]), image_size) > 0
            pixels = pixels.where(inside, self.fill)
        height, width = pixels.shape[-2:]
        pixels = F.pad(pixels, (0, -width % STRIDES[-1], 0, -height % STRIDES[-1]), value=self.fill)
        scores, boxes, objects = self.head(self.backbone(pixels))
        places, strides = [], []
        for one, stride in zip(scores, STRIDES, strict=True):
            y, x = (torch.arange(side, device=one.device, dtype=torch.float32) for side in one.shape[2:])
            corners = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=2).flatten(0, 1) * stride
            places.append(corners)
            strides.append(torch.full_like(corners[:, 0], stride))
        codes, place, step = levels(boxes).squeeze(2), torch.cat(places), torch.cat(strides)
        middle = codes[..., :2] * step[:, None] + place
        half = codes[..., 2:].clamp(max=LARGEST * 2).exp() * step[:, None] / 2
        whole = torch.cat([middle - half, middle + half], dim=2)
        return self.reading(
            levels(scores).squeeze(2), whole, levels(objects).squeeze(2).squeeze(2), codes, place, step, size
        )

    def roles(self) -> dict[str, Tap]:
        """Return the places of the backbone's maps, of the head's stems (`fpn[i]`) and of the answers.

        The stems bring the levels to one width: what the released code of FGD taps.
        """
        stages = [f"backbone.backbone.dark{number}" for number in (3, 4, 5)]
        found = {f"stages[{number}]": Tap(path) for number, path in enumerate(stages)}
        found["map"] = found["stages[2]"]
        for level in range(len(STRIDES)):
            found[f"fpn[{level}]"] = Tap(f"head.stems.{level}")
            found[f"head.cls[{level}]"] = Tap(f"head.cls_preds.{level}")
            found[f"head.box[{level}]"] = Tap(f"head.reg_preds.{level}")
        return found

    def by_class(self) -> dict[str, tuple[int, int]]:
        """Return the parameters with a row a class; see `tutelage.models.detection.fit`."""
        return {
            f"head.cls_preds.{level}.{kind}": (1, 1) for level in range(len(STRIDES)) for kind in ("weight", "bias")
        }


def _sized(name: str) -> Any:
    depth, width = SIZES[name]
    return partial(YOLOX, depth=depth, width=width, depthwise=name == "yolox_nano")


ARCHITECTURES = {"yolox": YOLOX, **{name: _sized(name) for name in SIZES}}
