# SPDX-License-Identifier: Apache-2.0
"""One class a pixel: cross-entropy over labelled pixels, and how well regions and their boundaries are met."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional as F

from tutelage.core import Batch, Model
from tutelage.core.card import Averages
from tutelage.core.error import UserError
from tutelage.core.picture import Picture
from tutelage.functional.precision import full_precision

IGNORED = -1  # in every class map of this library
GOLDEN_ANGLE = 0.381966  # of the circle of hues: neighbours in a list lie far apart on it
OPACITY = 0.55  # of a drawn class map


@full_precision
def cross_entropy(
    logits: Tensor, target: Tensor, labelled: Tensor, *, label_smoothing: float = 0.0, weight: Tensor | None = None
) -> Tensor:
    """Return the mean cross-entropy over labelled pixels, or a connected zero if there are none.

    Args:
        logits: `[B, K, H, W]`.
        target: `[B, H, W]` int64 classes, anything where unlabelled.
        labelled: `[B, H, W]` bool.
        label_smoothing: share of the target spread evenly over all classes.
        weight: `[K]` factors on the pixels of each class; the mean is over pixels, not over weights.

    Example:
        >>> truth = torch.tensor([[[1, 7]]])
        >>> cross_entropy(torch.zeros(1, 2, 1, 2), truth, truth == 1)
        tensor(0.6931)
    """
    known = target.where(labelled, IGNORED)
    factors = None if weight is None else weight.to(logits.dtype)
    total = F.cross_entropy(
        logits, known, weight=factors, ignore_index=IGNORED, reduction="sum", label_smoothing=label_smoothing
    )
    return total / labelled.sum().clamp(min=1)


def class_map(batch: Batch) -> Tensor:
    """Return `[B, H, W]` classes of a batch, -1 where a pixel or its whole image has none."""
    target: Tensor = batch.target
    labelled = batch.labelled if batch.labelled.ndim == target.ndim else batch.labelled[:, None, None]
    return target.where(labelled, IGNORED)


def resized(logits: Tensor, size: Sequence[int], *, align_corners: bool = False) -> Tensor:
    """Return `[B, K, h, w]` scores at the size of an image, bilinearly, in float32 or wider."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    if tuple(wide.shape[-2:]) == tuple(size):
        return wide
    return F.interpolate(wide, tuple(size), mode="bilinear", align_corners=align_corners)


def confusion(answer: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """Return how many pixels of each class were given each class.

    Args:
        answer: `[...]` classes.
        target: `[...]` classes; pixels of others than [0, K) do not count.
        num_classes: K.

    Returns:
        `[K, K]` int64: rows are the truth, columns the answer.

    Example:
        >>> confusion(torch.tensor([0, 1, 1]), torch.tensor([0, 0, -1]), 2)
        tensor([[1, 1],
                [0, 0]])
    """
    known = (target >= 0) & (target < num_classes)
    # what does not count goes to a place of its own: picking it out would wait for the device
    place = torch.where(known, target * num_classes + answer, num_classes**2)
    return place.flatten().bincount(minlength=num_classes**2 + 1)[:-1].view(num_classes, num_classes)


def rim(masks: Tensor, width: int) -> Tensor:
    """Return the pixels of each mask that lie within so many pixels of its boundary; beyond the image is outside.

    Args:
        masks: `[..., H, W]` bool.
        width: in pixels (rows or columns, whichever is more), at least 1.

    Example:
        >>> rim(torch.ones(1, 4, 4, dtype=torch.bool), 1)[0].int()
        tensor([[1, 1, 1, 1],
                [1, 0, 0, 1],
                [1, 0, 0, 1],
                [1, 1, 1, 1]], dtype=torch.int32)
    """
    near = F.pad(~masks, (width,) * 4, value=True).int()
    for dim in (-1, -2):  # a square window, one side after the other: sums as differences of running sums
        sums = F.pad(near.movedim(dim, -1).cumsum(-1), (1, 0))
        span = 2 * width + 1
        near = (sums[..., span:] - sums[..., :-span]).movedim(-1, dim)
    return masks & (near > 0)


def boundary_counts(
    answer: Tensor, target: Tensor, num_classes: int, ratio: float, sizes: Sequence[Sequence[int]] | None = None
) -> tuple[Tensor, Tensor]:
    """Return pixels in both rims and in either of them, by class.

    The rim of a class reaches `ratio` of the image's diagonal into it. Where the truth is ignored, the answer is
    too: there both have the same boundary.

    Args:
        answer: `[B, H, W]` classes.
        target: `[B, H, W]` classes, -1 where ignored.
        num_classes: K.
        ratio: width of the rim over the diagonal.
        sizes: (height, width) of each image without padding; None where nothing is padded.

    Returns:
        Two `[K]` int64.

    Reference: Cheng et al., Boundary IoU: Improving Object-Centric Image Segmentation Evaluation, CVPR 2021.
    """
    own = [target.shape[-2:]] * len(target) if sizes is None else sizes
    both, either = torch.zeros(2, num_classes, dtype=torch.int64, device=target.device)
    for found, truth, (height, width) in zip(answer.where(target >= 0, IGNORED), target, own, strict=True):
        reach = max(1, round(ratio * (height**2 + width**2) ** 0.5))
        kinds = torch.stack([found, truth]).unique()  # few of many classes are in one image
        kinds = kinds[kinds >= 0]
        one, other = (rim(side[:height, :width] == kinds[:, None, None], reach) for side in (found, truth))
        both.index_add_(0, kinds, (one & other).sum((1, 2)))
        either.index_add_(0, kinds, (one | other).sum((1, 2)))
    return both, either


def palette(num_classes: int) -> Tensor:
    """Return `[K, 3]` uint8 colours that are easily told apart, always the same.

    Example:
        >>> palette(3).tolist()
        [[230, 62, 46], [42, 76, 209], [100, 168, 34]]
    """
    number = torch.arange(num_classes, dtype=torch.float64)
    hue = (0.0148 + number * (1 - GOLDEN_ANGLE)) % 1.0
    value = 0.9 - 0.12 * (number % 3) + 0.04 * (number % 2)
    chroma = 0.8 * value
    # the ramp of each channel round the circle
    ramp = (hue[:, None] * 6 + torch.tensor([0.0, 4.0, 2.0], dtype=torch.float64)) % 6
    channel = value[:, None] - chroma[:, None] + chroma[:, None] * ((ramp - 3).abs() - 1).clamp(0, 1)
    return (channel * 255).round().to(torch.uint8)


@final
@dataclass(frozen=True)
class ClassMap:
    """The classes of one image's pixels.

    Args:
        classes: `[H, W]` int64, -1 where nothing is said.
        names: by class index.
    """

    classes: Tensor
    names: tuple[str, ...]

    def plain(self) -> dict[str, Any]:
        """Return the share of the image that each class covers, the largest first, as plain data."""
        counts = self.classes[self.classes >= 0].bincount(minlength=len(self.names))
        order = counts.argsort(descending=True, stable=True).tolist()
        shares = (counts / max(self.classes.numel(), 1)).tolist()
        return {
            "size": list(self.classes.shape),
            "classes": {self.names[number]: round(shares[number], 4) for number in order if shares[number] > 0},
        }

    def draw(self, image: Tensor) -> Tensor:
        """Return a copy of the image, coloured by class; where nothing is said it stays as it is."""
        shown = image.expand(3, -1, -1).float()
        colours = palette(len(self.names)).to(image.device)[self.classes.clamp(min=0)].permute(2, 0, 1)
        mixed = OPACITY * colours.float() + (1 - OPACITY) * shown
        return mixed.where(self.classes >= 0, shown).round().to(torch.uint8)


@final
class Segmentation:
    """One class a pixel. A model answers with `[B, K, h, w]` scores at any resolution; they are enlarged to the pixels.

    The loss is a mean over labelled pixels. Pixels that are ignored (-1) take no part in loss or scores.
    While it trains, a model may give an object with `logits` and `auxiliary` scores of a second head, or with
    `losses(target)` of its own, by name.

    Args:
        num_classes: K.
        class_names: by class index.
        label_smoothing: of the training loss.
        class_weights: factors on the pixels of each class in the training loss.
        auxiliary: coefficient of the second head's loss.
        align_corners: of the enlargement.
        boundary: width of a rim over the image's diagonal, for the boundary score; 0 leaves the score out.
        window: pixels of a square, or (height, width): images are scored in overlapping windows of this size.
        stride: pixels between windows, by default two thirds of one.
        scales: images are scored at each of these sizes, and the probabilities averaged.
        flip: images are scored mirrored, too.

    Raises:
        UserError: if an option makes no sense.
    """

    name = "segmentation"
    averages: Averages = "labelled"
    headline = "miou"
    provides: tuple[str, ...] = ("stem", "stages", "map", "logits", "classifier", "blocks", "patch_embed")

    def __init__(
        self,
        num_classes: int,
        *,
        class_names: tuple[str, ...] = (),
        label_smoothing: float = 0.0,
        class_weights: tuple[float, ...] | None = None,
        auxiliary: float = 0.4,
        align_corners: bool = False,
        boundary: float = 0.02,
        window: int | tuple[int, int] | None = None,
        stride: int | tuple[int, int] | None = None,
        scales: tuple[float, ...] = (1.0,),
        flip: bool = False,
    ) -> None:
        if not 0 <= label_smoothing < 1:
            raise UserError(f"label_smoothing is a share in [0, 1), not {label_smoothing}")
        if not scales or min(scales) <= 0:
            raise UserError(f"scales are sizes over the image's own, > 0, not {list(scales)}")
        if not 0 <= boundary < 0.5:
            raise UserError(f"boundary is a share of the diagonal in [0, 0.5), not {boundary}")
        self.num_classes, self.class_names = num_classes, tuple(class_names) or tuple(map(str, range(num_classes)))
        self.label_smoothing, self.class_weights, self.auxiliary = label_smoothing, class_weights, auxiliary
        self._weights: dict[torch.device, Tensor] = {}
        self.align_corners, self.boundary = align_corners, boundary
        self.window, self.stride = _pair(window, "window"), _pair(stride, "stride")
        if self.stride is not None and self.window is None:
            raise UserError("stride is that of a window: give window too")
        self.scales, self.flip = tuple(scales), flip

    def call(self, model: Model, batch: Batch) -> Any:
        """Return the model's output for the batch's pixels."""
        return model(batch.inputs)

    def logits(self, output: Any) -> Tensor:
        """Return `[B, K, h, w]` from what a segmenter returns: a tensor, an output with `logits`, or the first."""
        if isinstance(output, Tensor):
            return output
        found = getattr(output, "logits", None)
        scores: Tensor = found if found is not None else next(iter(output))
        return scores

    def loss(self, output: Any, batch: Batch) -> Tensor | dict[str, Tensor]:
        """Return the cross-entropy averaged over labelled pixels; with a second head two parts.

        Raises:
            UserError: if the model has another number of classes than the data, or the data no class maps.
        """
        logits = self._checked(output, batch)
        own = getattr(output, "losses", None)
        if callable(own):
            found: dict[str, Tensor] = own(class_map(batch))
            return found
        loss = self._loss(logits, batch)
        second = getattr(output, "auxiliary", None)
        if second is None or not self.auxiliary:
            return loss
        return {"main": loss, "auxiliary": self.auxiliary * self._loss(second, batch)}

    def _loss(self, logits: Tensor, batch: Batch) -> Tensor:
        if self.class_weights is not None and logits.device not in self._weights:  # copied once, not every step
            self._weights[logits.device] = torch.tensor(self.class_weights, device=logits.device)
        target = class_map(batch)
        return cross_entropy(
            resized(logits, target.shape[1:], align_corners=self.align_corners),
            target,
            target >= 0,
            label_smoothing=self.label_smoothing,
            weight=self._weights.get(logits.device),
        )

    def _checked(self, output: Any, batch: Batch) -> Tensor:
        logits = self.logits(output)
        if not isinstance(batch.target, Tensor) or batch.target.ndim != 3:
            given = list(getattr(batch.target, "shape", ())) or type(batch.target).__name__
            raise UserError(f"segmentation needs class maps [B, H, W], the targets are {given}")
        if logits.ndim != 4:
            raise UserError(
                f"segmentation needs scores [B, K, h, w], the model gave {list(logits.shape)}: is it a segmenter?"
            )
        if logits.shape[1] != self.num_classes:
            raise UserError(f"the model has {logits.shape[1]} classes, the data {self.num_classes}")
        if self.class_weights is not None and len(self.class_weights) != self.num_classes:
            raise UserError(
                f"task.class_weights gives {len(self.class_weights)} numbers for {self.num_classes} classes"
            )
        return logits

    # --- evaluation --------------------------------------------------------------------------------------

    def answer(self, model: Model, batch: Batch) -> Any:
        """Return a model's output as it is scored: by windows, at several sizes and mirrored where that is asked for.

        Then the output is the logarithm of averaged probabilities, `[B, K, H, W]`.
        """
        if self.window is None and self.scales == (1.0,) and not self.flip:
            return self.call(model, batch)
        size = batch.inputs.shape[2:]
        total, count = torch.zeros((), device=batch.inputs.device), 0
        for scale in self.scales:
            pixels = batch.inputs
            if scale != 1:
                wanted = [max(1, round(side * scale)) for side in size]
                pixels = F.interpolate(pixels, wanted, mode="bilinear", align_corners=False, antialias=True)
            for mirrored in (False, True) if self.flip else (False,):
                scores = self._whole(model, pixels.flip(3) if mirrored else pixels)
                scores = resized(scores.flip(3) if mirrored else scores, size, align_corners=self.align_corners)
                total, count = total + scores.softmax(1), count + 1
        return (total / count).clamp(min=torch.finfo(total.dtype).tiny).log()

    def _whole(self, model: Model, pixels: Tensor) -> Tensor:
        """Return scores of every pixel, those of overlapping windows averaged."""
        size = pixels.shape[2:]
        if self.window is None:
            return resized(self.logits(model(pixels)), size, align_corners=self.align_corners)
        total: Tensor | None = None
        count = torch.zeros(1, 1, *size, device=pixels.device)
        for rows, columns in windows(size, self.window, self.stride):
            part = pixels[:, :, rows, columns]
            scores = resized(self.logits(model(part)), part.shape[2:], align_corners=self.align_corners)
            total = scores.new_zeros(len(pixels), scores.shape[1], *size) if total is None else total
            total[:, :, rows, columns] += scores
            count[:, :, rows, columns] += 1
        assert total is not None
        return total / count

    def score(self, answers: Iterable[tuple[Any, Batch]]) -> dict[str, float]:
        """Return `miou`, `pixel_accuracy`, `mean_accuracy`, `boundary_iou`, loss (nats a pixel) and each class's IoU.

        All are taken over the labelled pixels of all images together, `boundary_iou` over rims. A class that
        neither truth nor answers name has no IoU, and the means leave it out.

        Raises:
            UserError: if no pixel is labelled, or the model has other classes.
        """
        table: Tensor | None = None
        for output, batch in answers:
            logits = resized(self._checked(output, batch), batch.target.shape[1:], align_corners=self.align_corners)
            target = class_map(batch)
            answer = logits.argmax(1)
            found = confusion(answer, target, self.num_classes).double()
            loss = cross_entropy(logits, target, target >= 0).double() * (target >= 0).sum()
            rows = [found.flatten(), loss[None]]
            if self.boundary:
                sizes = None if batch.frame is None else batch.frame.image_size.tolist()
                counts = boundary_counts(answer, target, self.num_classes, self.boundary, sizes)
                rows += [side.double() for side in counts]
            row = torch.cat(rows)
            table = row if table is None else table + row
        if table is None or not float(table[: self.num_classes**2].sum()):
            raise UserError("nothing to score: no labelled pixel in this split")
        return self._scores(table.cpu())

    def _scores(self, table: Tensor) -> dict[str, float]:
        found, loss, rims = table.split([self.num_classes**2, 1, len(table) - self.num_classes**2 - 1])
        matrix = found.view(self.num_classes, self.num_classes)
        right, truth, given = matrix.diag(), matrix.sum(1), matrix.sum(0)
        iou, accuracy = right / (truth + given - right), right / truth
        scores = {
            "miou": iou.nanmean(),
            "pixel_accuracy": right.sum() / matrix.sum(),
            "mean_accuracy": accuracy.nanmean(),
        }
        if self.boundary:
            both, either = rims.chunk(2)
            scores["boundary_iou"] = (both / either).nanmean()
        scores["loss"] = loss[0] / matrix.sum()
        scores |= {f"iou/{name}": one for name, one in zip(self.class_names, iou, strict=True) if not one.isnan()}
        return {word: value.item() for word, value in scores.items()}

    # --- pictures ----------------------------------------------------------------------------------------

    def pictures(self, output: Any, batch: Batch) -> list[Picture]:
        """Return the class map of each image, in the pixels of the image as it lies on disk."""
        logits = resized(self.logits(output), batch.inputs.shape[2:], align_corners=self.align_corners)
        return [ClassMap(self._whole_size(one, batch, row), self._names(len(one))) for row, one in enumerate(logits)]

    def truths(self, batch: Batch) -> list[Picture]:
        """Return the class map that the data says each image has."""
        target = class_map(batch)
        scores = (target[:, None] == torch.arange(-1, self.num_classes, device=target.device)[:, None, None]).float()
        return [
            ClassMap(self._whole_size(one, batch, row, nearest=True) - 1, self._names(self.num_classes))
            for row, one in enumerate(scores)
        ]

    def _names(self, count: int) -> tuple[str, ...]:
        return (self.class_names + tuple(map(str, range(len(self.class_names), count))))[:count]

    @staticmethod
    def _whole_size(scores: Tensor, batch: Batch, row: int, *, nearest: bool = False) -> Tensor:
        """Return `[H, W]` classes of one image from `[K, h, w]` scores: padding cut off, its own size again."""
        if batch.frame is not None:
            height, width = batch.frame.image_size[row].tolist()
            scores = scores[:, : int(height), : int(width)]
        own = batch.extra.get("original_size")
        if own is not None and own[row].tolist() != list(scores.shape[1:]):
            how: dict[str, Any] = {"mode": "nearest-exact"} if nearest else {"mode": "bilinear", "align_corners": False}
            scores = F.interpolate(scores[None], own[row].tolist(), **how)[0]
        return scores.argmax(0)


def windows(
    size: Sequence[int], window: tuple[int, int], stride: tuple[int, int] | None = None
) -> Iterator[tuple[slice, slice]]:
    """Yield windows that cover an image, row by row; the last of a row ends where the image ends.

    Args:
        size: (height, width) of the image.
        window: (height, width); no more than the image is taken.
        stride: between windows, by default two thirds of one, rounded up.

    Example:
        >>> [(rows.start, columns.start) for rows, columns in windows((6, 10), (6, 6), (4, 4))]
        [(0, 0), (0, 4)]
    """
    step = stride or (-(-2 * window[0] // 3), -(-2 * window[1] // 3))
    places = []
    for whole, side, between in zip(size, window, step, strict=True):
        room = max(whole - side, 0)
        starts = [min(start, room) for start in range(0, room + between, between)]
        places.append([slice(start, min(start + side, whole)) for start in dict.fromkeys(starts)])
    return ((rows, columns) for rows in places[0] for columns in places[1])


def _pair(given: int | Sequence[int] | None, word: str) -> tuple[int, int] | None:
    if given is None:
        return None
    found = (given, given) if isinstance(given, int) else tuple(given)
    if len(found) != 2 or min(found) < 1:
        raise UserError(f"{word} is a number of pixels, or [height, width], not {given}")
    return found[0], found[1]
