# SPDX-License-Identifier: Apache-2.0
"""Boxes, perhaps with masks, around the things in an image: the detector's own loss, COCO's mean average precision."""

import io
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, final, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tutelage.core import Batch, Model
from tutelage.core.card import Averages
from tutelage.core.error import UserError
from tutelage.core.picture import Picture

COLORS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#f032e6", "#9a6324", "#808000", "#000075")
MOST = 100  # boxes of an image that count
#: What of COCO's twelve numbers is told, with the range of areas and the overlap.
KINDS = {
    "map": ("all", None),
    "map50": ("all", 0.5),
    "map75": ("all", 0.75),
    "map_small": ("small", None),
    "map_medium": ("medium", None),
    "map_large": ("large", None),
}


@runtime_checkable
class Answers(Protocol):
    """What a detector says of a batch."""

    def losses(self, targets: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return the parts of the loss, each a mean over images."""

    def detections(self) -> list[dict[str, Tensor]]:
        """Return `boxes`, `scores`, `labels` and perhaps `masks` of each image, in the pixels of the batch."""


@final
@dataclass(frozen=True)
class Found:
    """The things in one image, in its own pixels.

    Args:
        boxes: `[n, 4]` x1, y1, x2, y2.
        labels: `[n]` int64.
        class_names: by index.
        scores: `[n]`, or None for the truth.
        masks: `[n, H, W]` bool, or None.
        shown: least score of what is drawn.
        packed: the masks as COCO's run-length codes, in their place.
    """

    boxes: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    scores: Tensor | None = None
    masks: Tensor | None = None
    shown: float = 0.3
    packed: Sequence[dict[str, Any]] | None = None

    @property
    def codes(self) -> Sequence[dict[str, Any]] | None:
        """Masks as COCO's run-length codes, or None."""
        return self.packed if self.masks is None else codes(self.masks)

    def pack(self) -> "Found":
        """Return the same without the pixels of its masks: their codes take a small part of the room."""
        return replace(self, masks=None, packed=self.codes)

    def plain(self) -> dict[str, Any]:
        """Return boxes, names and scores, and masks as COCO's run-length codes."""
        found: dict[str, Any] = {
            "boxes": [[round(edge, 2) for edge in box] for box in self.boxes.tolist()],
            "labels": self.labels.tolist(),
            "names": [self._name(label) for label in self.labels.tolist()],
        }
        if self.scores is not None:
            found["scores"] = [round(score, 4) for score in self.scores.tolist()]
        if (packed := self.codes) is not None:
            found["masks"] = [{**code, "counts": code["counts"].decode()} for code in packed]
        return found

    def draw(self, image: Tensor) -> Tensor:
        """Return a copy of an image `[3, H, W]` uint8 with boxes, names and masks on it."""
        from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

        seen = torch.ones_like(self.labels, dtype=torch.bool) if self.scores is None else self.scores >= self.shown
        labels = self.labels[seen].tolist()
        if not labels:
            return image.clone()
        colors = [COLORS[label % len(COLORS)] for label in labels]
        words = [self._name(label) for label in labels]
        if self.scores is not None:
            words = [f"{word} {score:.2f}" for word, score in zip(words, self.scores[seen].tolist(), strict=True)]
        drawn: Tensor = image
        if self.masks is not None:
            drawn = draw_segmentation_masks(drawn, self.masks[seen], alpha=0.5, colors=colors)
        width = max(1, min(image.shape[1:]) // 200)
        return torch.as_tensor(draw_bounding_boxes(drawn, self.boxes[seen], words, colors, width=width))

    def _name(self, label: int) -> str:
        return self.class_names[label] if label < len(self.class_names) else str(label)


@final
class Detection:
    """The things in an image: class, box, and mask where the detector gives any.

    Args:
        num_classes: K.
        class_names: by index.
        per_class: score every class on its own as well.
        shown: least score of a box that is drawn.

    Raises:
        UserError: if an option makes no sense.
    """

    name = "detection"
    averages: Averages = "labelled"
    headline = "map"
    provides: tuple[str, ...] = ("stem", "stages", "map", "fpn", "head.cls", "head.box", "hidden", "logits")

    def __init__(
        self,
        num_classes: int,
        *,
        class_names: Sequence[str] = (),
        per_class: bool = False,
        shown: float = 0.3,
    ) -> None:
        if not 0 <= shown <= 1:
            raise UserError(f"shown is a score in [0, 1], not {shown}")
        self.num_classes, self.class_names = num_classes, tuple(class_names)
        self.per_class, self.shown = per_class, shown

    def call(self, model: Model, batch: Batch) -> Answers:
        """Return the detector's answers; it is told which part of each image is padding.

        Raises:
            UserError: if the model is no detector.
        """
        more: dict[str, Any] = {} if batch.frame is None else {"image_size": batch.frame.image_size}
        if getattr(model.module, "takes_targets", False) and torch.is_grad_enabled():
            more["targets"] = batch.target  # who asks for no gradient asks for no loss
        found = model(batch.inputs, **more)
        if not isinstance(found, Answers):
            raise UserError(
                f"{type(model.module).__name__} gave {type(found).__name__}: a detector gives an object with "
                "`losses(targets)` and `detections()`"
            )
        return found

    def logits(self, output: Any) -> Tensor | None:
        """Return None: a detector answers for many places, whose scores are `head.cls[i]`."""
        return None

    def loss(self, output: Answers, batch: Batch) -> dict[str, Tensor]:
        """Return the parts of the detector's own loss, each a mean over annotated images.

        Raises:
            UserError: if images without annotation are among others, and the detector cannot pass over them.
        """
        annotated: Sequence[bool] = batch.extra.get("annotated", [True] * len(batch))
        if all(annotated):
            return output.losses(batch.target)
        rows = [number for number, known in enumerate(annotated) if known]
        if not rows:
            return {name: 0 * part for name, part in output.losses(batch.target).items()}
        some = getattr(output, "rows", None)
        if some is None:
            raise UserError(f"{type(output).__name__} learns from annotated images only: leave data.labels out")
        losses: dict[str, Tensor] = some(rows).losses([batch.target[row] for row in rows])
        return losses

    def score(self, answers: Iterable[tuple[Any, Batch]]) -> dict[str, float]:
        """Return COCO's mean average precision, in the pixels of the images as they were annotated.

        - `map` over overlaps 0.50 to 0.95, `map50`, `map75`; `map_small`, `map_medium` and `map_large` where there
          are such things (divided at 32 and 96 pixels a side)
        - `mask_map` and so on where data and detector have masks; predicted masks are brought from the network's
          pixels to the image's, bilinear
        - `map/NAME` of each class, if asked for

        Raises:
            UserError: if no image is annotated.
        """
        truths: list[Any] = []
        found: list[Found] = []
        for output, batch in answers:
            pictures = self.found(output, batch)
            for picture, truth, known in zip(pictures, batch.extra["truths"], batch.extra["annotated"], strict=True):
                if known:
                    truths.append(truth)
                    found.append(picture.pack())  # all images are kept to the end
        if not any(len(truth.labels) for truth in truths):
            raise UserError("nothing to score: no annotated thing in this split")
        with_masks = any(truth.shapes for truth in truths) and any(one.packed is not None for one in found)
        scores = average_precision(truths, found, self.class_names, masks=False, per_class=self.per_class)
        if with_masks:
            more = average_precision(truths, found, self.class_names, masks=True, per_class=self.per_class)
            scores |= {f"mask_{name}": value for name, value in more.items()}
        return scores

    def pictures(self, output: Any, batch: Batch) -> list[Picture]:
        """Return what was found in each image, in the pixels of the image as it lies on disk."""
        return [*self.found(output, batch)]

    def found(self, output: Answers, batch: Batch) -> list[Found]:
        """Return the same as tensors."""
        pictures = []
        sizes: Sequence[Any] = batch.extra.get("truths", ())
        scales = batch.extra.get("scale")
        for number, one in enumerate(output.detections()):
            cpu = {name: value.detach().cpu() for name, value in one.items()}
            scale = torch.ones(2) if scales is None else scales[number].cpu()
            masks = cpu.get("masks")
            if masks is not None and batch.frame is not None and len(sizes):
                masks = restored(masks, batch.frame.image_size[number].tolist(), sizes[number].size)
            boxes = cpu["boxes"].float() / scale.flip(0).repeat(2)
            pictures.append(Found(boxes, cpu["labels"], self.class_names, cpu["scores"].float(), masks, self.shown))
        return pictures

    def truths(self, batch: Batch) -> list[Picture]:
        """Return what each image was annotated with."""
        return [
            Found(truth.boxes, truth.labels, self.class_names, masks=truth.masks if truth.shapes else None)
            for truth in batch.extra["truths"]
        ]

    def coco(self, answers: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return plain answers by image file as COCO's results; an image of a number is called by it.

        Categories are class names, as ids differ between sets.
        """
        stems = {path: Path(path).stem for path in answers}
        return [
            {
                "image_id": int(stems[path]) if stems[path].isdigit() else stems[path],
                "category": found["names"][number],
                "bbox": _wide(box),
                "score": found["scores"][number],
                **({"segmentation": found["masks"][number]} if "masks" in found else {}),
            }
            for path, found in answers.items()
            for number, box in enumerate(found["boxes"])
        ]


def restored(masks: Tensor, size: Sequence[int], original: tuple[int, int]) -> Tensor:
    """Return masks in the pixels of the original image.

    Args:
        masks: `[n, H, W]` bool, in the pixels of the batch.
        size: (height, width) of the image in the batch, without padding.
        original: (height, width) of the image on disk.
    """
    inner = masks[:, : size[0], : size[1]]
    if tuple(inner.shape[1:]) == tuple(original) or not len(inner):
        return inner if len(inner) else masks.new_zeros(0, *original)
    return F.interpolate(inner[:, None].float(), original, mode="bilinear", align_corners=False)[:, 0] > 0.5


def codes(masks: Tensor) -> list[dict[str, Any]]:
    """Return COCO's run-length codes of masks `[n, H, W]`."""
    from pycocotools import mask

    if not len(masks):
        return []
    found: list[dict[str, Any]] = mask.encode(np.asfortranarray(masks.permute(1, 2, 0).numpy().astype(np.uint8)))
    return found


def average_precision(
    truths: Sequence[Any], found: Sequence[Found], class_names: Sequence[str], *, masks: bool, per_class: bool = False
) -> dict[str, float]:
    """Return mean average precisions by COCO's own program.

    Args:
        truths: annotated images: `boxes`, `labels`, `crowd`, `area`, and `codes` for masks.
        found: what was found in each.
        class_names: by index.
        masks: compare masks instead of boxes.
        per_class: add `map/NAME`.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    classes = range(max([len(class_names), *(1 + int(t.labels.max()) for t in truths if len(t.labels))]))
    header = {
        "info": {},
        "images": [{"id": number, "height": t.size[0], "width": t.size[1]} for number, t in enumerate(truths)],
        "categories": [{"id": number} for number in classes],
    }
    true, told = COCO(), COCO()
    true.dataset = {**header, "annotations": _numbered(_true(truths, masks))}
    told.dataset = {**header, "annotations": _numbered(_told(found, masks))}
    with redirect_stdout(io.StringIO()):  # the program writes tables of its own
        true.createIndex()
        told.createIndex()
        program = COCOeval(true, told, "segm" if masks else "bbox")
        program.evaluate()
        program.accumulate()
    precision: Any = program.eval["precision"]  # [overlaps, recalls, classes, areas, numbers of boxes]
    areas, overlaps = program.params.areaRngLbl, program.params.iouThrs

    def mean(part: Any) -> float | None:
        valid = part[part > -1]
        return float(valid.mean()) if valid.size else None

    scores = {}
    for name, (area, overlap) in KINDS.items():
        rows = slice(None) if overlap is None else np.isclose(overlaps, overlap)
        scores[name] = mean(precision[rows, :, :, areas.index(area), -1])
    if per_class:
        for number, name in enumerate(class_names):
            scores[f"map/{name}"] = mean(precision[:, :, number, areas.index("all"), -1])
    return {name: value for name, value in scores.items() if value is not None}


def _numbered(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"id": number, **row} for number, row in enumerate(rows, start=1)]  # an id of 0 would count as no match


def _wide(box: Sequence[float]) -> list[float]:
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def _true(truths: Sequence[Any], masks: bool) -> Iterable[dict[str, Any]]:
    for image, truth in enumerate(truths):
        shapes = truth.codes if masks else [None] * len(truth.labels)
        rows = zip(
            truth.boxes.tolist(), truth.labels.tolist(), truth.crowd.tolist(), truth.area.tolist(), shapes, strict=True
        )
        for box, label, crowd, area, code in rows:
            shape = {} if code is None else {"segmentation": code}
            yield {
                **{"image_id": image, "category_id": label, "bbox": _wide(box), "area": area, "iscrowd": int(crowd)},
                **shape,
            }


def _told(found: Sequence[Found], masks: bool) -> Iterable[dict[str, Any]]:
    from pycocotools import mask

    for image, one in enumerate(found):
        assert one.scores is not None
        order = one.scores.argsort(descending=True, stable=True)[:MOST].tolist()
        packed = one.codes if masks else None
        for place in order:
            code = None if packed is None else packed[place]
            box = _wide(one.boxes[place].tolist())
            area = box[2] * box[3] if code is None else float(mask.area(code))
            row = {"image_id": image, "category_id": int(one.labels[place]), "score": float(one.scores[place])}
            shape = {} if code is None else {"segmentation": code}
            yield {**row, "bbox": box, "area": area, "iscrowd": 0, **shape}
