# SPDX-License-Identifier: Apache-2.0
"""Images with boxes and masks, resized and padded once, before both models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, final

import torch
from torch import Tensor
from torch.nn import functional as F

from tutelage.core import Batch
from tutelage.core.batch import Frame
from tutelage.core.error import UserError, check_words, nearest
from tutelage.data.annotations import Annotated, Table, Troubles, encoded
from tutelage.data.folder import read_image, size_of
from tutelage.data.loader import UNREADABLE
from tutelage.data.mosaic import MixUp, Mosaic
from tutelage.data.photometric import HSV, moves_of
from tutelage.data.record import Record, resized
from tutelage.data.samples import to_unit

#: Words before the colon of `data.source`.
KINDS = ("coco", "voc", "yolo", "scenes")
#: Kinds that come with the package.
EMBEDDED = ("scenes",)
#: What may be done to training images, in this order; see `Boxed.seen`.
AUGMENTATIONS = ("mosaic", "mixup", "hsv", "photometric", "zoom_out", "crop", "flip")
#: Those that take other images.
MIXED: Mapping[str, type[Mosaic] | type[MixUp]] = {"mosaic": Mosaic, "mixup": MixUp}
TRIES = 15  # to find an image with things in it
FLIP, ZOOM = 0.5, 0.5  # probabilities


@final
@dataclass(frozen=True)
class Options:
    """The words of `data.detection`.

    Args:
        shortest: pixels to which an image's shorter side is brought; of several one is drawn for each training
            image, and the last holds otherwise. None leaves images as they are. Sides keep their ratio, unless
            `data.image_size` gives both.
        longest: pixels the longer side never exceeds.
        multiple: padded sides are a multiple of so many pixels.
        masks: read what covers which pixel, for models that learn masks.
        scenes: numbers of scenes to train and to validate on, for the source `scenes`.
        side: pixels of a scene.
        scene_seed: of the scenes; apart from any run's.
    """

    shortest: int | Sequence[int] | None = None
    longest: int | None = None
    multiple: int = 32
    masks: bool = False
    scenes: tuple[int, int] = (400, 100)
    side: int = 96
    scene_seed: int = 0

    @classmethod
    def parse(cls, given: Mapping[str, Any] | None, kind: str) -> "Options":
        """Read the section, or nothing; files are brought to 800 x 1333 where it does not say.

        Raises:
            UserError: on an unknown word, or a value that makes no sense.
        """
        check_words(given or {}, [part.name for part in fields(cls)], "data.detection")
        as_they_are = kind in EMBEDDED or (given or {}).get("shortest", 0) is None
        known: dict[str, Any] = {} if as_they_are else {"shortest": 800, "longest": 1333}
        options = cls(**{**known, **(given or {})})
        if options.shortest is not None and min(options.sides, default=0) < 1:
            raise UserError(f"data.detection.shortest counts pixels, not {options.shortest}")
        if options.longest is not None and (options.shortest is None or options.longest < max(options.sides)):
            raise UserError(f"data.detection.longest {options.longest} is less than shortest {options.shortest}")
        if options.multiple < 1:
            raise UserError(f"data.detection.multiple counts pixels, at least 1, not {options.multiple}")
        if len(options.scenes) != 2:
            raise UserError(f"data.detection.scenes is [to train on, to validate on], not {options.scenes}")
        return options

    @property
    def sides(self) -> tuple[int, ...]:
        """The lengths of the shorter side, of which one is drawn."""
        if self.shortest is None:
            return ()
        return (self.shortest,) if isinstance(self.shortest, int) else tuple(self.shortest)


class Step(Protocol):
    """What may be done to a training image, drawn from torch's generator."""

    @property
    def others(self) -> int:
        """How many other images it takes."""

    @property
    def things(self) -> bool:
        """Whether these must hold things, if there are any."""

    def __call__(self, record: Record, others: Sequence[Record]) -> Record:
        """Return the changed image."""


@final
@dataclass(frozen=True)
class Plain:
    """A step of torchvision by its word, or new colours.

    Args:
        word: of `AUGMENTATIONS`.
        moves: of `hsv`.
    """

    word: str
    moves: HSV | None = None

    others: ClassVar[int] = 0
    things: ClassVar[bool] = False

    def __call__(self, record: Record, others: Sequence[Record]) -> Record:
        """Return the changed image."""
        if self.moves is None:
            return _changed(record, self.word)
        key = torch.randint(2**62, (1,))
        return replace(record, image=self.moves(record.image[None], key)[0])


@final
@dataclass(frozen=True)
class Boxed:
    """Annotated images as a loader reads them.

    Args:
        table: the images.
        options: how they are resized and padded.
        image_size: (height, width) to which images are stretched; None keeps the ratio of their sides.
        augment: what is done in training, one after the other.
        targets: `[N]` 0, or -1 where an image's boxes are withheld.
    """

    table: Table
    options: Options
    image_size: tuple[int, int] | None
    augment: tuple[Step, ...]
    targets: Tensor

    def __len__(self) -> int:
        return len(self.table)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names by class index."""
        return self.table.class_names

    def name(self, index: int) -> str:
        """Return the file."""
        return self.table.images[index].name

    def keep(self, index: Tensor) -> "Boxed":
        """Return the set of these images, in this order."""
        images = tuple(self.table.images[number] for number in index.tolist())
        return replace(self, table=replace(self.table, images=images), targets=self.targets[index])

    def relabel(self, targets: Tensor) -> "Boxed":
        """Return the same images, with boxes withheld where the target is -1."""
        return replace(self, targets=targets)

    def augmented(self, augment: Any) -> "Boxed":
        """Return the same images, changed in training as this `augment` says."""
        return replace(self, augment=_augment(augment, self.options, self.image_size))

    def model_facts(self) -> dict[str, Any]:
        """Return what a detector must know of the data."""
        return {
            "task": "detection",
            "num_classes": len(self.class_names),
            "class_names": self.class_names,
            "in_channels": 3,
            "image_size": self.image_size,
        }

    def read(self, index: int) -> Record:
        """Return one image as it lies on disk.

        Raises:
            OSError: if the file is missing or damaged.
            ValueError: if it has another size than its annotation says.
        """
        found = self.table.images[index]
        image = read_image(found.picture, 3) if isinstance(found.picture, Path) else found.picture
        if tuple(image.shape[1:]) != found.size:
            height, width = image.shape[1:]
            raise ValueError(f"it is {width} x {height}, and annotated as {found.size[1]} x {found.size[0]}")
        labelled = bool(self.targets[index] >= 0)
        known = ~found.crowd & labelled
        masks = found.masks[known] if self.options.masks else None
        return Record(image, found.boxes[known], found.labels[known], masks, found, labelled)

    def seen(self, record: Record, key: int, *, train: bool) -> Record:
        """Return an image as a model sees it, a function of the key.

        - `mosaic`: four images around a point, see `tutelage.data.mosaic.Mosaic`; the others are drawn from the set,
          annotated ones for an annotated image and the rest for the rest
        - `mixup`: another image over it, see `tutelage.data.mosaic.MixUp`
        - `hsv`: hue, saturation and value are moved, see `tutelage.data.photometric.HSV`
        - `photometric`: brightness, contrast, saturation and hue are moved
        - `zoom_out`: the image is laid on a larger ground, half the time
        - `crop`: a part is cut out that overlaps enough with some box (SSD)
        - `flip`: left and right are exchanged, half the time

        Args:
            record: as `read` gives it.
            key: of everything that is drawn.
            train: augment, and draw the size of several.
        """
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(key)
            if train:
                for step in self.augment:
                    record = step(record, self._others(record, step))
            size = self._size(record.size, train)
        return resized(record, size)

    def _others(self, record: Record, step: Step) -> list[Record]:
        """Return other images for a step. One that cannot be read is named when its own turn comes."""
        if not step.others:
            return []
        alike = ((self.targets >= 0) == record.labelled).nonzero().flatten()
        found = []
        for _ in range(step.others):
            for _ in range(TRIES if step.things else 1):
                index = int(alike[torch.randint(len(alike), ())])
                if not self.table.images[index].crowd.all():  # of none, all are
                    break
            try:
                found.append(self.read(index))
            except UNREADABLE:
                found.append(record)
        return found

    def _size(self, size: tuple[int, int], train: bool) -> tuple[int, int]:
        if self.image_size is not None:
            return self.image_size
        sides = self.options.sides
        if not sides:
            return size
        side = sides[int(torch.randint(len(sides), ()))] if train else sides[-1]
        factor = side / min(size)
        if self.options.longest is not None:
            factor = min(factor, self.options.longest / max(size))
        height, width = (max(1, round(length * factor)) for length in size)
        return height, width

    def collate(self, records: Sequence[Record], index: Tensor, view: Tensor) -> Batch:
        """Return images as one batch, padded at the right and at the bottom.

        - `target`: one mapping an image: `boxes` [n, 4], `labels` [n], and `masks` [n, H, W] where they are read
        - `frame`: the same of all images together
        - `extra`: `truths`, the images as they were annotated, and in evaluation `scale` [B, 2], pixels here to
          a pixel there (height, width)

        Args:
            records: as `seen` gives them.
            index: `[B]` sample ids.
            view: `[B]` keys of their augmentation.
        """
        multiple = self.options.multiple
        height, width = (-(-max(record.size[dim] for record in records) // multiple) * multiple for dim in (0, 1))
        pixels, target = [], []
        for record in records:
            room = (0, width - record.size[1], 0, height - record.size[0])
            pixels.append(F.pad(to_unit(record.image), room))
            one = {"boxes": record.boxes, "labels": record.labels}
            if record.masks is not None:
                one["masks"] = F.pad(record.masks, room)
            target.append(one)
        counts = torch.tensor([len(record.labels) for record in records])
        image_size = torch.tensor([record.size for record in records])
        original = torch.tensor([record.truth.size for record in records])
        frame = Frame(
            size=(height, width),
            image_size=image_size,
            boxes=torch.cat([record.boxes for record in records]),
            box_image=torch.arange(len(records)).repeat_interleave(counts),
            masks=torch.cat([one["masks"] for one in target]) if self.options.masks else None,
        )
        labelled = self.targets[index] >= 0
        extra = {
            "truths": [record.truth for record in records],
            "scale": image_size / original,  # of images that were only resized
            "annotated": labelled.tolist(),  # known to the host, so that no step has to ask the device
        }
        return Batch(torch.stack(pixels), target, labelled, index, view, frame=frame, extra=extra)


def _changed(record: Record, word: str) -> Record:
    """Return a record after one augmentation.

    A crop drops boxes whose centre lies outside, cuts the others, and drops those of which less than a pixel is left.
    """
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    steps = {
        "photometric": [v2.RandomPhotometricDistort()],
        "zoom_out": [v2.RandomZoomOut(p=ZOOM)],
        "crop": [v2.RandomIoUCrop(), v2.SanitizeBoundingBoxes(labels_getter=lambda given: given["labels"])],
        "flip": [v2.RandomHorizontalFlip(p=FLIP)],
    }
    given: dict[str, Any] = {
        "image": tv_tensors.Image(record.image),
        "boxes": tv_tensors.BoundingBoxes(record.boxes, format="XYXY", canvas_size=record.size),
        "labels": record.labels,
    }
    if record.masks is not None:
        given["masks"] = tv_tensors.Mask(record.masks)
    if word == "crop" and not len(record.boxes):
        return record
    for step in steps[word]:
        given = step(given)
    plain = {name: value.as_subclass(Tensor) for name, value in given.items()}
    return replace(record, **plain)


def read(kind: str, place: str, spec: Any) -> dict[str, Boxed]:
    """Return the sets of a source by split.

    Args:
        kind: of `KINDS`.
        place: what stands after the colon.
        spec: the section `data`: its `detection`, `augment`, `image_size` and `on_error` are read.

    Raises:
        UserError: if something cannot be read; if annotations are wrong and `data.on_error` is `raise`, with one
            summary of all of them.
    """
    options = Options.parse(spec.detection, kind)
    troubles = Troubles(f"{kind}:{place}" if place else kind)
    tables = _tables(kind, place, options, troubles)
    troubles.settle(spec.on_error)
    square = _size(spec.image_size)
    augment = _augment(spec.augment, options, square)
    return {
        split: Boxed(table, options, square, augment, torch.zeros(len(table), dtype=torch.long))
        for split, table in tables.items()
    }


def images(paths: Sequence[Path], spec: Any, class_names: tuple[str, ...]) -> Boxed:
    """Return image files of which nothing is known, brought to the size that a data section says.

    Args:
        paths: of the files.
        spec: the section.
        class_names: by index.
    """
    given = {word: value for word, value in (spec.detection or {}).items() if word != "masks"}
    options = Options.parse(given, str(spec.source).partition(":")[0])
    table = Table(tuple(_unknown(path) for path in paths), class_names)
    return Boxed(table, options, _size(spec.image_size), (), torch.full((len(paths),), -1))


def _unknown(path: Path) -> Annotated:
    try:
        size = size_of(path)
    except (OSError, SyntaxError):
        size = (0, 0)  # what is wrong shows when the file is read
    none = torch.zeros(0)
    return Annotated(path, size, none.view(0, 4), none.long(), none.bool(), none, name=str(path))


def _size(given: int | Sequence[int] | None) -> tuple[int, int] | None:
    if given is None or isinstance(given, int):
        return None if given is None else (given, given)
    return (given[0], given[1])


def _tables(kind: str, place: str, options: Options, troubles: Troubles) -> dict[str, Table]:
    if kind == "scenes":
        return {
            split: drawn(number, options.side, options.scene_seed, held_out=split == "validation")
            for split, number in zip(("train", "validation"), options.scenes, strict=True)
        }
    if kind == "coco":
        from tutelage.data.coco import coco

        found = coco(place, troubles)
    elif kind == "voc":
        from tutelage.data.voc import voc

        found = voc(place, troubles)
    else:
        from tutelage.data.yolo import yolo

        found = yolo(place, troubles)
    if "validation" not in found and "test" in found:
        found["validation"] = found.pop("test")
    return found


def drawn(number: int, size: int, seed: int, *, held_out: bool) -> Table:
    """Return scenes of digits as annotated images; see `tutelage.data.scenes`."""
    from tutelage.data.scenes import THINGS, scenes

    images = []
    for place, scene in enumerate(scenes(number, size, seed, held_out=held_out)):
        images.append(
            Annotated(
                scene.image,
                (size, size),
                scene.boxes,
                scene.labels,
                torch.zeros_like(scene.labels, dtype=torch.bool),
                scene.masks.flatten(1).sum(1).float(),
                tuple(encoded(mask, (size, size)) for mask in scene.masks),
                f"scenes[{place}]",
            )
        )
    return Table(tuple(images), THINGS)


def _augment(given: Any, options: Options, square: tuple[int, int] | None) -> tuple[Step, ...]:
    """Return what is done in training: a flip where nothing is said."""
    if given is None:
        given = ["flip"]
    words = [] if given == "none" else [given] if isinstance(given, str) else given
    if not isinstance(words, (list, tuple)):
        raise UserError(f"data.augment: detection takes a list of {', '.join(AUGMENTATIONS)}, not {given!r}")
    found: dict[str, Step] = {}
    for part in words:
        given = {part: True} if isinstance(part, str) else part
        word, said = next(iter(given.items())) if isinstance(given, Mapping) and len(given) == 1 else ("", True)
        if word not in AUGMENTATIONS:
            raise UserError(f"data.augment: {part!r} is not known in detection{nearest(str(word), AUGMENTATIONS)}")
        step = _step(word, said, options, square) if said is not False else None
        if step is not None:
            found[word] = step
    return tuple(found[word] for word in AUGMENTATIONS if word in found)


def _step(word: str, said: Any, options: Options, square: tuple[int, int] | None) -> Step | None:
    if word == "hsv":
        moves = moves_of(said)
        return Plain(word, HSV(*moves)) if moves is not None else None
    if word not in MIXED:
        if said is not True:
            raise UserError(f"data.augment.{word} takes no option, only true or false")
        return Plain(word)
    said = {} if said is True else said
    make = MIXED[word]
    if not isinstance(said, Mapping):
        raise UserError(f"data.augment.{word} takes options by name, not {said!r}")
    check_words(said, [part.name for part in fields(make)], f"data.augment.{word}")
    given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in said.items()}
    if word == "mosaic":
        side = given.get("size", square or (options.sides[-1] if options.sides else None))
        if side is None:
            raise UserError("data.augment.mosaic needs a size: give it, data.image_size or data.detection.shortest")
        given["size"] = side if isinstance(side, tuple) else (side, side)
    return make(**given)
