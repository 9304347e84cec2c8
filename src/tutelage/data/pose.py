# SPDX-License-Identifier: Apache-2.0
"""People cut out of their images, one crop of fixed size each: top-down pose.

The box around a person is enlarged, brought to the crop's aspect ratio and mapped onto it; in training it is moved,
scaled, turned, cut to half a body, mirrored and covered at random, all as functions of the key.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tutelage.core import Batch
from tutelage.core.batch import Frame
from tutelage.core.error import UserError, check_words, nearest
from tutelage.core.keypoints import WHOLEBODY, Layout
from tutelage.data.annotations import Troubles
from tutelage.data.augment import Step, pair
from tutelage.data.figures import figures
from tutelage.data.folder import read_image
from tutelage.data.people import People, detections, files_of
from tutelage.data.people import read as read_people
from tutelage.data.photometric import HSV, Blur, MedianBlur, moves_of
from tutelage.functional.noise import mix, uniform

#: What may stand before the colon of `data.source`, and which of these come with the package.
KINDS = ("coco", "figures", "ubody", "wholebody")
EMBEDDED = ("figures",)
#: (height, width) of a crop where nothing is said.
USUAL, SMALL = (256, 192), (96, 64)
MOVE, HALF, FLIP, COLOR, ERASE, TINT, SMEAR, MEDIAN = range(1, 9)  # salts: what a random choice is about
#: UBody's list of the videos that are tested on, below its root.
UBODY_TEST = "splits/intra_scene_test_list.npy"
HALF_LEAST = (9, 2, 3)  # visible keypoints of a person, of its upper and of its lower half, for a cut to be made
UPPER = 0.7  # probability of the upper half
HALF_PADDING = 1.5
ERASED = (0.2, 0.4)  # sides of what is covered, as shares of the crop's


def _number(given: Any) -> bool:
    return isinstance(given, (int, float)) and not isinstance(given, bool) and math.isfinite(given)


def _several(given: Any) -> Sequence[Any]:
    """Return a list as it is, and anything else as no list."""
    return given if isinstance(given, (list, tuple)) else ()


@final
@dataclass(frozen=True)
class Options:
    """The words of `data.pose`.

    Args:
        layout: of the keypoints: `body`, `wholebody`, or null to look into the file.
        sigmas: how far annotators disagree, one number a keypoint, for keypoints that are no known set.
        annotations: json files by split, or one; null looks for them.
        images: folder of the images, null for the usual ones.
        also: further sources that are joined to the training set, such as `ubody:PATH`.
        interval: of `ubody`, frames whose number is a multiple of it are read.
        padding: factor on the box around a person.
        boxes: people a detector found, COCO results or the `answers.json` of a detector: models are scored on these
            boxes in the place of the annotated ones, and `tutelage predict` looks for people there; without them it
            takes a whole image as one person's box.
        box_score: from which such boxes are taken.
        number: of `figures`, to learn from.
        held_out: of `figures`, to validate on.
        size: of the pictures of `figures`, (height, width).
        figure_seed: of `figures`; apart from any run's.
    """

    layout: str | None = None
    sigmas: Sequence[float] | None = None
    annotations: str | Mapping[str, str] | None = None
    images: str | None = None
    also: Sequence[str] = ()
    interval: int = 10
    padding: float = 1.25
    boxes: str | None = None
    box_score: float = 0.3
    number: int = 600
    held_out: int = 200
    size: tuple[int, int] = SMALL
    figure_seed: int = 0

    @classmethod
    def parse(cls, given: Mapping[str, Any] | None) -> "Options":
        """Read the section, or nothing.

        Raises:
            UserError: on an unknown word, or a value that makes no sense.
        """
        check_words(given or {}, [part.name for part in fields(cls)], "data.pose")
        options = cls(**(given or {}))
        for word in ("number", "held_out", "interval"):
            if not isinstance(getattr(options, word), int) or getattr(options, word) < 1:
                raise UserError(f"data.pose.{word} is at least 1, not {getattr(options, word)!r}")
        if not _number(options.padding) or not options.padding > 0:
            raise UserError(f"data.pose.padding is a factor > 0, not {options.padding!r}")
        if not _number(options.box_score):
            raise UserError(f"data.pose.box_score is a number, not {options.box_score!r}")
        sigmas = _several(options.sigmas)
        if options.sigmas is not None and (not sigmas or not all(map(_number, sigmas))):
            raise UserError(f"data.pose.sigmas are numbers, one a keypoint, not {options.sigmas!r}")
        if options.layout is not None:
            Layout.parse(options.layout)
        also = (options.also,) if isinstance(options.also, str) else tuple(options.also)
        return replace(options, also=also, size=pair(options.size))


@final
@dataclass(frozen=True)
class Changes:
    """What is done to training crops: the words of `data.augment`. A word that is left out is not done.

    Args:
        flip: probability of a mirror image.
        half_body: probability of a cut to the upper or the lower half, where enough of both is visible.
        shift: largest move, as a share of the box; made with probability 0.3.
        scale: (smallest, largest) factor on the box.
        rotate: largest turn in degrees; made with probability 0.6.
        color: strength of changes of brightness, contrast and saturation.
        hsv: largest moves of hue (of 180), saturation and value (of 255); see `tutelage.data.photometric.HSV`.
        blur: probability of the mean over a small square.
        median_blur: probability of the median over a small square.
        erase: probability that a rectangle is covered.
    """

    flip: float = 0.0
    half_body: float = 0.0
    shift: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    rotate: float = 0.0
    color: float = 0.0
    hsv: tuple[float, float, float] | None = None
    blur: float = 0.0
    median_blur: float = 0.0
    erase: float = 0.0

    SHIFTED, TURNED = 0.3, 0.6

    @classmethod
    def parse(cls, given: Any) -> "Changes":
        """Read `data.augment`: null is nearly what RTMPose trains with, `none` nothing; a list names what is done.

        Null has `color` in the place of RTMPose's `hsv`, `blur` and `median_blur`.

        Raises:
            UserError: on an unknown word, or a value that makes no sense.
        """
        usual = cls(0.5, 0.3, 0.16, (0.6, 1.4), 80.0, 0.3, moves_of(True), 0.1, 0.1, 1.0)
        if given is None:
            return replace(usual, hsv=None, blur=0.0, median_blur=0.0)
        if given in ("none", [], {}):
            return cls()
        named = {given: None} if isinstance(given, str) else given
        check_words(named, [part.name for part in fields(cls)], "data.augment")
        if not isinstance(named, Mapping):
            named = dict.fromkeys(named)
        chosen: dict[str, Any] = {  # 1 is a number, and no word for the usual
            w: getattr(usual, w) if value is None or value is True else value
            for w, value in named.items()
            if value is not False
        }
        found = cls(**chosen)
        sides = _several(found.scale)
        if len(sides) != 2 or not all(map(_number, sides)) or not 0 < sides[0] <= sides[1]:
            raise UserError(f"data.augment.scale is [smallest, largest], both > 0, not {found.scale!r}")
        low, high = sides
        for word in ("flip", "half_body", "erase", "color", "blur", "median_blur"):
            value = getattr(found, word)
            if not _number(value) or not 0 <= value <= 1:
                raise UserError(f"data.augment.{word} is a number in [0, 1], not {value!r}")
        for word, unit in (("shift", "a share of the box"), ("rotate", "degrees")):
            value = getattr(found, word)
            if not _number(value) or value < 0:
                raise UserError(f"data.augment.{word} is a number >= 0 ({unit}), not {value!r}")
        return replace(found, scale=(float(low), float(high)), hsv=moves_of(found.hsv))


@final
@dataclass(frozen=True)
class Record:
    """One person in one image.

    Args:
        image: `[3, H, W]` uint8, the whole of it.
        points: `[K, 3]` x, y in its pixels, visibility.
        box: `[4]` x1, y1, x2, y2.
        further: `[M, 4]` boxes of others in the image, where one record stands for everybody (`images`).
    """

    image: Tensor
    points: Tensor
    box: Tensor
    further: Tensor | None = None


@final
@dataclass(frozen=True)
class Crop:
    """People as a model sees them.

    Args:
        pixels: `[M, 3, h, w]` uint8; M is 1 but for records of a whole image.
        points: `[M, K, 3]` x, y in the crop's pixels, visibility.
        matrix: `[M, 2, 3]` from the crop's pixels to the image's.
        boxes: `[M, 4]` in the image's pixels.
        size: (height, width) of the image.
    """

    pixels: Tensor
    points: Tensor
    matrix: Tensor
    boxes: Tensor
    size: tuple[int, int]


@final
@dataclass(frozen=True)
class Posed:
    """People as a loader reads them, a crop each.

    Args:
        people: who, and where.
        image_size: (height, width) of a crop.
        padding: factor on boxes.
        changes: to training crops.
        targets: `[N]` int64, 0 where keypoints are known and -1 where they are withheld.
        truth: who is there, where `people` are what a detector found.
        scores: `[N]` of the detector.
    """

    people: People
    image_size: tuple[int, int]
    padding: float
    changes: Changes
    targets: Tensor
    truth: People | None = None
    scores: Tensor | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        """People are of one class."""
        return ("person",)

    def __len__(self) -> int:
        return len(self.people)

    def name(self, index: int) -> str:
        """Return what to call a sample in an error."""
        where = self.people.names[int(self.people.image[index])]
        return f"{where}, annotation {int(self.people.ids[index])}"

    def keep(self, index: Tensor) -> "Posed":
        """Return the set of these people, in this order."""
        scores = self.scores[index] if self.scores is not None else None
        return replace(self, people=self.people.keep(index), targets=self.targets[index], scores=scores)

    def relabel(self, targets: Tensor) -> "Posed":
        """Return the same people, with keypoints withheld where the target is -1."""
        return replace(self, targets=targets)

    def augmented(self, augment: Any) -> "Posed":
        """Return the same people, changed in training as this `augment` says."""
        return replace(self, changes=Changes.parse(augment))

    def model_facts(self) -> dict[str, Any]:
        """Return what a model must know of the samples."""
        layout = self.people.layout
        return {
            "task": "pose",
            "num_classes": 1,
            "class_names": self.class_names,
            "in_channels": 3,
            "image_size": self.image_size,
            "geometry": {"num_keypoints": len(layout), "layout": layout.plain()},
        }

    def read(self, index: int) -> Record:
        """Return one person with its image.

        Raises:
            OSError: if the image cannot be read.
            ValueError: if it has another size than its annotation says.
        """
        people = self.people
        picture = int(people.image[index])
        image, size = _pixels(people.pictures[picture]), people.sizes[picture]
        if tuple(image.shape[1:]) != size:
            height, width = image.shape[1:]
            raise ValueError(f"the image is {width} x {height}, and annotated as {size[1]} x {size[0]}")
        return Record(image, people.points[index], people.boxes[index])

    def seen(self, record: Record, key: int, *, train: bool) -> Crop:
        """Return the crop around a person; in training changed by the key alone."""
        layout = self.people.layout
        return crop(record, layout, self.image_size, self.padding, self.changes if train else None, key)

    def collate(self, records: Sequence[Crop], index: Tensor, view: Tensor) -> Batch:
        """Return crops as one batch, see `batch_of`."""
        known = self.targets[index] >= 0
        people = self.people
        more = {
            "truth": people.points[index],
            "area": people.area[index],
            "image_id": people.image_ids[index],
            "person": people.ids[index],
        }
        batch = batch_of(records, index, view, known, more)
        if self.truth is None or self.scores is None:
            return batch
        mine = torch.isin(self._bearers, index)
        words = {
            **{"points": "everybody", "boxes": "everybody_box", "area": "everybody_area"},
            "image_ids": "everybody_image",
        }
        there = {name: getattr(self.truth, word)[mine] for word, name in words.items()}
        return replace(batch, extra={**batch.extra, **there, "box_score": self.scores[index]})

    @cached_property
    def _bearers(self) -> Tensor:
        """Which sample's batch tells of each true person: the first of its image, or the first of all."""
        assert self.truth is not None
        first: dict[int, int] = {}
        for number, image in enumerate(self.people.image_ids.tolist()):
            first.setdefault(image, number)
        return torch.tensor([first.get(image, 0) for image in self.truth.image_ids.tolist()], dtype=torch.long)


@final
@dataclass(frozen=True)
class Pictures:
    """Images of which nothing is known but boxes: what `tutelage predict` reads. One sample is one image.

    Args:
        paths: files.
        boxes: `[M, 4]` of the people in each; an image without any is one box.
        image_size: (height, width) of a crop.
        padding: factor on boxes.
    """

    paths: tuple[Path, ...]
    boxes: tuple[Tensor, ...]
    image_size: tuple[int, int]
    padding: float

    @property
    def class_names(self) -> tuple[str, ...]:
        """People are of one class."""
        return ("person",)

    @property
    def targets(self) -> Tensor:
        """`[N]` of -1: nothing is known."""
        return torch.full((len(self.paths),), -1)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """Return the file."""
        return str(self.paths[index])

    def keep(self, index: Tensor) -> "Pictures":
        """Return these images, in this order."""
        chosen = index.tolist()
        return replace(
            self, paths=tuple(self.paths[number] for number in chosen), boxes=tuple(self.boxes[n] for n in chosen)
        )

    def relabel(self, targets: Tensor) -> "Pictures":
        """Return the same images."""
        return self

    def augmented(self, augment: Any) -> "Pictures":
        """Return the same images."""
        return self

    def model_facts(self) -> dict[str, Any]:
        """Return what is known of the crops."""
        return {"task": "pose", "num_classes": 1, "in_channels": 3, "image_size": self.image_size}

    def read(self, index: int) -> Record:
        """Return one image with the boxes in it.

        Raises:
            OSError: if it cannot be read.
        """
        image = _pixels(self.paths[index])
        whole = torch.tensor([[0.0, 0.0, image.shape[2], image.shape[1]]])
        boxes = self.boxes[index] if len(self.boxes[index]) else whole
        return Record(image, torch.zeros(1, 3), boxes[0], boxes[1:])

    def seen(self, record: Record, key: int, *, train: bool) -> Crop:
        """Return a crop for every box."""
        boxes = [record.box, *(record.further if record.further is not None else ())]
        found = [crop(replace(record, box=box), None, self.image_size, self.padding, None, key) for box in boxes]
        words = ("pixels", "points", "matrix", "boxes")
        joined = {word: torch.cat([getattr(one, word) for one in found]) for word in words}
        return Crop(**joined, size=found[0].size)

    def collate(self, records: Sequence[Crop], index: Tensor, view: Tensor) -> Batch:
        """Return all crops of all images as one batch, see `batch_of`."""
        return batch_of(records, index, view, torch.zeros(len(index), dtype=torch.bool), {})


def batch_of(records: Sequence[Crop], index: Tensor, view: Tensor, known: Tensor, more: Mapping[str, Tensor]) -> Batch:
    """Return crops as one batch.

    - `target`: `[B, K, 3]` x, y in the pixels of the crop, visibility (0 where nothing is known)
    - `labelled`: `[B]`, whose keypoints are known
    - `frame`: the box of each person in the pixels of its crop
    - `extra`: `matrix` [B, 2, 3] from the crop's pixels to the image's; `owner` [B], the place in `index` of each crop;
      `size` [B, 2] of the image; `box` [B, 4]; and what `more` gives

    Args:
        records: as `seen` gives them.
        index: `[N]` sample ids; N is B but for records of whole images.
        view: `[N]` keys of their augmentation.
        known: `[N]` bool.
        more: `[N, ...]` by name.
    """
    counts = torch.tensor([len(one.pixels) for one in records])
    owner = torch.arange(len(records)).repeat_interleave(counts)
    pixels = torch.cat([one.pixels for one in records]).float().div_(255)
    points, matrix = torch.cat([one.points for one in records]), torch.cat([one.matrix for one in records])
    boxes = torch.cat([one.boxes for one in records])
    labelled = known[owner]
    visible = points[..., 2:] * labelled[:, None, None]
    size = (pixels.shape[2], pixels.shape[3])
    frame = Frame(
        size=size,
        image_size=torch.tensor([size]).expand(len(pixels), 2),
        boxes=_in_crop(boxes, matrix, size),
        box_image=torch.arange(len(pixels)),
    )
    extra = {
        **{"matrix": matrix, "owner": owner, "box": boxes},
        "size": torch.tensor([one.size for one in records])[owner],
        **{word: value[owner] for word, value in more.items()},
    }
    target = torch.cat([points[..., :2], visible], -1)
    return Batch(pixels, target, labelled, index, view, frame=frame, extra=extra)


def _in_crop(boxes: Tensor, matrix: Tensor, size: tuple[int, int]) -> Tensor:
    """Return boxes of images in the pixels of their crops, upright around turned ones and cut at the edges."""
    corners = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].view(-1, 4, 2) - matrix[:, None, :, 2]
    inside = torch.linalg.solve(matrix[:, None, :, :2], corners[..., None])[..., 0]
    edge = torch.tensor([size[1], size[0]])
    low, high = inside.amin(1).clamp(min=0), torch.minimum(inside.amax(1), edge)
    return torch.cat([torch.minimum(low, edge), high.clamp(min=0)], 1)


def _pixels(picture: Path | Tensor) -> Tensor:
    return picture if isinstance(picture, Tensor) else read_image(picture, 3)


# --- crops ---------------------------------------------------------------------------------------------------


def crop(
    record: Record, layout: Layout | None, size: tuple[int, int], padding: float, changes: Changes | None, key: int
) -> Crop:
    """Return the crop around a person.

    Convention:
        - the centre of the enlarged box falls on (width / 2, height / 2) of the crop, pixels at whole numbers
        - the side of the box that is too short for the crop's aspect ratio is enlarged
        - bilinear between pixels; black beyond the image

    Args:
        record: who.
        layout: of the keypoints, for halves and mirrors.
        size: (height, width).
        padding: factor on the box.
        changes: made at random; None for none.
        key: of all that is random.
    """
    box, points = record.box, record.points
    centre, span = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) * padding
    angle, mirrored = 0.0, False
    if changes is not None and layout is not None:
        half = _half(points, layout, changes, key)
        centre, span = half if half is not None else (centre, span)
        centre, span, angle = _moved(centre, span, changes, key)
        mirrored = float(_drawn(key, FLIP, 1)[0]) < changes.flip
    aspect = size[1] / size[0]
    span = torch.stack([torch.maximum(span[0], span[1] * aspect), torch.maximum(span[1], span[0] / aspect)])
    matrix = _back(centre, span, angle, size)
    if mirrored:  # crop column x shows what stood at width - 1 - x
        matrix = matrix @ torch.tensor([[-1.0, 0.0, size[1] - 1], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    pixels = _sampled(record.image, matrix, size)
    inside = torch.linalg.solve(matrix[:, :2], (points[:, :2] - matrix[:, 2]).T).T
    if mirrored and layout is not None:
        swap = list(layout.swap)
        inside, visible = inside[swap], points[swap, 2]
    else:
        visible = points[:, 2]
    if changes is not None:
        pixels = _coloured(pixels, changes, key)
    seen = (visible > 0).float()
    placed = torch.cat([inside * seen[:, None], seen[:, None]], 1)
    return Crop(pixels[None], placed[None], matrix[None], box[None], (record.image.shape[1], record.image.shape[2]))


def _drawn(key: int, salt: int, count: int) -> Tensor:
    return uniform(mix(key, salt), torch.zeros(1, dtype=torch.long), (count,))[0]


def _half(points: Tensor, layout: Layout, changes: Changes, key: int) -> tuple[Tensor, Tensor] | None:
    """Return centre (the mean of its keypoints) and span of the upper or the lower half, None where none is cut."""
    if not changes.half_body or not layout.upper:
        return None
    chance, which = _drawn(key, HALF, 2).tolist()
    visible = points[:, 2] > 0
    halves = [
        torch.tensor([number for number in part if visible[number]], dtype=torch.long)
        for part in (layout.upper, layout.lower)
    ]
    least, upper, lower = HALF_LEAST
    if chance >= changes.half_body or int(visible.sum()) < least:
        return None
    enough = (len(halves[0]) >= upper, len(halves[1]) >= lower)
    if not any(enough):
        return None
    chosen = halves[0 if enough[0] and (which < UPPER or not enough[1]) else 1]
    low, high = points[chosen, :2].amin(0), points[chosen, :2].amax(0)
    return points[chosen, :2].mean(0), ((high - low) * HALF_PADDING).clamp(min=1.0)


def _moved(centre: Tensor, span: Tensor, changes: Changes, key: int) -> tuple[Tensor, Tensor, float]:
    """Return centre, span and angle after a move, a scaling and a turn; sizes are normal, cut at one deviation."""
    draw = _drawn(key, MOVE, 6)
    edge = 0.6826894921370859  # probability within one standard deviation
    size = torch.special.ndtri((1 - edge) / 2 + edge * draw[2:]).clamp(-1, 1)
    if float(draw[0]) < changes.SHIFTED:
        centre = centre + size[:2] * changes.shift * span
    low, high = changes.scale
    span = span * ((low + high) / 2 + size[2] * (high - low) / 2)
    turned = float(draw[1]) < changes.TURNED
    return centre, span, float(size[3]) * changes.rotate * turned


def _back(centre: Tensor, span: Tensor, angle: float, size: tuple[int, int]) -> Tensor:
    """Return `[2, 3]`, from the pixels of a crop to those of the image."""
    turn = torch.tensor(angle).deg2rad()
    scale = span[0] / size[1]
    rotation = torch.stack([torch.stack([turn.cos(), -turn.sin()]), torch.stack([turn.sin(), turn.cos()])]) * scale
    middle = torch.tensor([size[1] / 2, size[0] / 2])
    return torch.cat([rotation, (centre - rotation @ middle)[:, None]], 1)


def _sampled(image: Tensor, matrix: Tensor, size: tuple[int, int]) -> Tensor:
    """Return `[3, h, w]` uint8: what the matrix says stands at each pixel of the crop."""
    y, x = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    at = torch.stack([x, y], -1).float() @ matrix[:, :2].T + matrix[:, 2]
    edge = torch.tensor([image.shape[2], image.shape[1]])
    low = at.amin((0, 1)).floor().clamp(min=0).minimum(edge - 1).long()
    high = (at.amax((0, 1)).ceil() + 1).long().clamp(min=1).minimum(edge)
    high = torch.maximum(high, low + 1)
    part = image[:, low[1] : high[1], low[0] : high[0]].float()
    # one pixel of black around: a side of one pixel cannot be normalised
    part = F.pad(part, (1, 1, 1, 1))
    room = torch.tensor([part.shape[2], part.shape[1]]) - 1
    grid = 2 * (at - low + 1) / room - 1
    found = F.grid_sample(part[None], grid[None], mode="bilinear", padding_mode="zeros", align_corners=True)
    return found[0].round().clamp(0, 255).to(torch.uint8)


def _coloured(pixels: Tensor, changes: Changes, key: int) -> Tensor:
    if changes.color:
        draw = 1 + changes.color * (2 * _drawn(key, COLOR, 3) - 1)
        image = pixels.float() * draw[0]
        image = image.mean() + draw[1] * (image - image.mean())
        grey = image.mean(0, keepdim=True)
        pixels = (grey + draw[2] * (image - grey)).round().clamp(0, 255).to(torch.uint8)
    if changes.hsv is not None:
        pixels = _stepped(pixels, HSV(*changes.hsv), key, TINT)
    if changes.blur:
        pixels = _stepped(pixels, Blur(changes.blur), key, SMEAR)
    if changes.median_blur:
        pixels = _stepped(pixels, MedianBlur(changes.median_blur), key, MEDIAN)
    draw = _drawn(key, ERASE, 5)
    if float(draw[0]) < changes.erase:
        height, width = pixels.shape[1:]
        low, high = ERASED
        tall, wide = (int(side * (low + (high - low) * float(u))) for side, u in ((height, draw[1]), (width, draw[2])))
        top, left = int(float(draw[3]) * (height - tall + 1)), int(float(draw[4]) * (width - wide + 1))
        pixels = pixels.clone()
        pixels[:, top : top + tall, left : left + wide] = 0
    return pixels


def _stepped(pixels: Tensor, step: Step, key: int, salt: int) -> Tensor:
    return step(pixels[None], torch.tensor([mix(key, salt)]))[0]


# --- sources -------------------------------------------------------------------------------------------------


def read(kind: str, place: str, spec: Any) -> dict[str, Posed]:
    """Return the sets of a source by split.

    Args:
        kind: of `KINDS`.
        place: what stands after the colon.
        spec: the section `data`: its `pose`, `augment`, `image_size` and `on_error` are read.

    Raises:
        UserError: if something cannot be read; if annotations are wrong and `data.on_error` is `raise`, with one
            summary of all of them.
    """
    options = Options.parse(spec.pose)
    found = _people(kind, place, options, spec.on_error)
    for source in options.also:
        other, _, where = source.partition(":")
        if other not in KINDS or (not where and other not in EMBEDDED):
            raise UserError(f"data.pose.also: {source!r} is no source{nearest(other, KINDS)}")
        more = _people(other, where, replace(options, annotations=None, images=None), spec.on_error)
        found["train"] = People.joined([found["train"], more["train"]])
    first = found["train"].layout
    if any(people.layout != first for people in found.values()):
        counts = ", ".join(f"{split} {len(people.layout)}" for split, people in found.items())
        raise UserError(f"{kind}:{place}: the splits have other keypoints ({counts})")
    if "validation" not in found and "test" in found:
        found["validation"] = found.pop("test")
    size = _size(spec, kind)
    changes = Changes.parse(spec.augment)
    sets = {
        split: Posed(people, size, options.padding, changes, torch.zeros(len(people), dtype=torch.long))
        for split, people in found.items()
    }
    if options.boxes is not None:
        if "validation" not in sets:
            raise UserError("data.pose.boxes are those of the validation images, and the source has no such split")
        sets["validation"] = _detected(sets["validation"], options.boxes, options.box_score)
    return sets


def _detected(annotated: Posed, file: str, least: float) -> Posed:
    """Return a set with the boxes of a detector in the place of the annotated ones, also in images without people.

    Raises:
        UserError: if there are none for these images.
    """
    truth = annotated.people
    known = {Path(name).stem: number for number, name in enumerate(truth.names)}
    known |= {stem.lstrip("0"): number for stem, number in known.items() if stem.isdigit()}
    rows = [(known[image], box, score) for image, box, score in detections(file) if score >= least and image in known]
    if not rows:
        raise UserError(f"data.pose.boxes: {file} has no box with a score of {least} for the validation images")
    image, given, scores = zip(*rows, strict=True)
    boxes, count = torch.tensor(given, dtype=torch.float32), len(rows)
    people = replace(
        truth,
        image=torch.tensor(image),
        image_ids=torch.tensor([truth.picture_ids[one] for one in image]),
        ids=torch.arange(count),
        points=torch.zeros(count, len(truth.layout), 3),
        boxes=boxes,
        area=(boxes[:, 2:] - boxes[:, :2]).prod(1),
    )
    targets = torch.zeros(count, dtype=torch.long)
    return replace(annotated, people=people, targets=targets, truth=_everybody(truth), scores=torch.tensor(scores))


def _everybody(people: People) -> People:
    """Return people together with those that do not count, who have no keypoint."""
    others = people.uncounted
    count = len(others.image)
    more = {
        **{"image": others.image, "boxes": others.boxes, "area": others.area, "ids": torch.full((count,), -1)},
        "image_ids": torch.tensor([people.picture_ids[one] for one in others.image.tolist()], dtype=torch.long),
        "points": torch.zeros(count, len(people.layout), 3),
    }
    joined: dict[str, Any] = {word: torch.cat([getattr(people, word), found]) for word, found in more.items()}
    return replace(people, **joined)


def _size(spec: Any, kind: str) -> tuple[int, int]:
    if spec.image_size is not None:
        size = pair(spec.image_size)
        if min(size) < 1:
            raise UserError(f"data.image_size counts pixels of a crop, (height, width), not {spec.image_size}")
        return size
    return SMALL if kind == "figures" else USUAL


def _people(kind: str, place: str, options: Options, on_error: Any) -> dict[str, People]:
    if kind == "figures":
        counts = {"train": (options.number, 0), "validation": (options.held_out, options.number)}
        return {split: drawn(number, options, first) for split, (number, first) in counts.items()}
    troubles = Troubles(f"{kind}:{place}")
    root = Path(place)
    if not root.exists():
        raise UserError(f"data.source: no file or folder {root}")
    layout = Layout.parse(options.layout) if options.layout is not None else None
    how: dict[str, Any] = {"layout": layout, "sigmas": options.sigmas, "images": options.images}
    how["interval"] = options.interval if kind == "ubody" else 1
    if kind in ("ubody", "wholebody") and layout is None:
        how["layout"] = WHOLEBODY
    found = {
        split: People.joined([read_people(file, root, troubles, **how) for file in files])
        for split, files in files_of(root, kind, options.annotations).items()
    }
    troubles.settle(on_error)
    if kind == "ubody":  # a split that is named comes before the list's
        found = {**_held_out(found.pop("train"), root), **found}
    return found


def _held_out(people: People, root: Path) -> dict[str, People]:
    """Return UBody's people by split, where its own list of videos to test on is there; else all of them to train on.

    Raises:
        UserError: if the list cannot be read, or names every video.
    """
    file = root / UBODY_TEST
    if not file.is_file():
        logging.getLogger(__name__).info("%s is missing: all videos of UBody are trained on", file)
        return {"train": people}
    try:
        videos = {str(name) for name in np.load(file, allow_pickle=False).tolist()}
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {str(error).splitlines()[0]}") from error
    held = [Path(name).parent.name.partition("_Trim")[0] in videos for name in people.names]
    train, validation = people.within([not one for one in held]), people.within(held)
    if not len(train):
        raise UserError(f"{file} names every video there is: nothing is left to train on; move it away to train on all")
    return {"train": train, **({"validation": validation} if len(validation) else {})}


def drawn(number: int, options: Options, first: int) -> People:
    """Return rendered figures as annotated people; see `tutelage.data.figures`."""
    size = (options.size[0], options.size[1])
    found = figures(number, size, options.figure_seed, first=first)
    annotated = (found.points[..., 2] > 0).any(1)
    chosen = annotated.nonzero().flatten()
    return People(
        tuple(found.images),
        tuple(f"figures[{one}]" for one in range(first, first + number)),
        tuple(range(first, first + number)),
        (size,) * number,
        chosen,
        first + chosen,
        first + chosen,
        found.points[chosen],
        found.boxes[chosen],
        found.area[chosen],
        WHOLEBODY,
    )


def images(paths: Sequence[Path], spec: Any, class_names: tuple[str, ...] = ()) -> Pictures:
    """Return images of which no keypoints are known, for a look at a model's answers.

    Args:
        paths: files.
        spec: the section `data`: its `image_size` and its `pose` are read, of which `boxes`, `box_score` and `padding`.
        class_names: of no matter here.

    Raises:
        UserError: if the boxes cannot be read.
    """
    options = Options.parse(spec.pose)
    size = _size(spec, spec.source)
    found: dict[str, list[list[float]]] = {path.stem: [] for path in paths}
    if options.boxes is not None:
        for image, box, score in detections(options.boxes):
            stem = next((name for name in found if name == image or name.lstrip("0") == image), None)
            if stem is not None and score >= options.box_score:
                found[stem].append(box)
    boxes = tuple(torch.tensor(found[path.stem], dtype=torch.float32).view(-1, 4) for path in paths)
    return Pictures(tuple(paths), boxes, size, options.padding)
