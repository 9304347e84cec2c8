# SPDX-License-Identifier: Apache-2.0
"""Images with a class for every pixel, changed together with them; pixels that are ignored are -1 from here on."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, final

import torch
from torch import Tensor
from torch.nn import functional as F

from tutelage.core import Batch
from tutelage.core.batch import Frame
from tutelage.core.error import UserError, check_words, nearest
from tutelage.data import masks
from tutelage.data.annotations import Troubles
from tutelage.data.augment import Step, pair
from tutelage.data.folder import read_image, size_of
from tutelage.data.loader import UNREADABLE
from tutelage.data.masks import IGNORED, Codes, Pair
from tutelage.data.photometric import HSV, Blur, MedianBlur, moves_of
from tutelage.data.samples import class_words, to_unit
from tutelage.functional.noise import mix, uniform

if TYPE_CHECKING:
    from tutelage.data.load import Spec
    from tutelage.data.scenes import Scene

#: What may stand before the colon of `data.source`, and which of these come with the package.
KINDS = ("camvid", "cityscapes", "hf", "masks", "scenes", "voc")
EMBEDDED = ("scenes",)
CHECKED = 2**27  # pixels: masks of a split with no more are looked at when it is read, others when their turn comes
NUMBERED = 1000  # masks that are looked at to find out what the classes are
LARGEST_CROP = 512  # pixels a side, where nothing is said
SCALE, TURN, COLOUR, POINTS, TINT, SMEAR, MEDIAN = range(1, 8)  # salts: what a random choice is about
#: Words of `data.augment` that are numbers in [0, 1], and what they are where nothing is said but that they are done.
SHARES = {"most": 0.75, "flip": 0.5, "color": 0.4, "blur": 0.1, "median_blur": 0.1}
TRIES = 10  # of a crop in which no class covers too much


@final
@dataclass(frozen=True)
class Options:
    """The words of `data.segmentation`.

    Args:
        classes: names in the order of their numbers, how many there are, or a file (see
            `tutelage.data.masks.named_classes`).
        colors: red, green and blue by class name, for masks in colour.
        ignore: values (or class names) of pixels that take no part; 255 by default.
        first: number of the first class in the masks; smaller numbers are ignored (1 for ADE20K).
        images: name of the image folder, where the layout is none that is known.
        masks: name of the mask folder.
        multiple: padded sides are a multiple of so many pixels.
        scenes: numbers of scenes to train and to validate on, for the source `scenes`.
        side: pixels of a scene.
        scene_seed: of the scenes; apart from any run's.
        points: of the ground that keep their class in a scene to train on, beside one of each digit; every other
            pixel is ignored. 0 keeps all.
    """

    classes: Any = None
    colors: Mapping[str, Sequence[int]] | None = None
    ignore: Sequence[int | str] = (255,)
    first: int = 0
    images: str | None = None
    masks: str | None = None
    multiple: int = 1
    scenes: Sequence[int] = (400, 100)
    side: int = 96
    scene_seed: int = 0
    points: int = 0

    @classmethod
    def parse(cls, given: Mapping[str, Any] | None) -> "Options":
        """Read the section, or nothing.

        Raises:
            UserError: on an unknown word, or a value that makes no sense.
        """
        check_words(given or {}, [part.name for part in fields(cls)], "data.segmentation")
        options = cls(**(given or {}))
        if len(options.scenes) != 2:
            raise UserError(f"data.segmentation.scenes is [to train on, to validate on], not {options.scenes}")
        if options.multiple < 1:
            raise UserError(f"data.segmentation.multiple counts pixels, at least 1, not {options.multiple}")
        if options.points < 0:
            raise UserError(f"data.segmentation.points counts pixels of the ground, not {options.points}")
        if options.colors is not None and not isinstance(options.colors, Mapping):
            raise UserError("data.segmentation.colors gives red, green and blue by class name")
        if isinstance(options.ignore, (str, int)):
            options = replace(options, ignore=(options.ignore,))
        return options


@final
@dataclass(frozen=True)
class Changes:
    """What is done to training images: the words of `data.augment`.

    A word that is left out, or null, is not done.

    Args:
        scale: (smallest, largest) factor on both sides.
        crop: pixels of a square, or (height, width), cut out at random; beyond the image pixels are ignored.
        most: largest share of a crop that one class may cover; another place is tried up to ten times.
        flip: probability of a mirror image.
        color: strength of changes of brightness, contrast and saturation, and a fifth of it of hue; in [0, 1).
        hsv: largest moves of hue (of 180), saturation and value (of 255); see `tutelage.data.photometric.HSV`.
        blur: probability of the mean over a small square.
        median_blur: probability of the median over a small square.
    """

    scale: tuple[float, float] | None = None
    crop: tuple[int, int] | None = None
    most: float = 1.0
    flip: float = 0.0
    color: float = 0.0
    hsv: tuple[float, float, float] | None = None
    blur: float = 0.0
    median_blur: float = 0.0

    @classmethod
    def parse(cls, given: Any, default: "Changes") -> "Changes":
        """Read `data.augment`: null is the default, `none` nothing, a list names what is done as by default.

        Raises:
            UserError: on an unknown word, or a value that makes no sense.
        """
        if given is None:
            return default
        if given in ("none", [], {}):
            return cls()
        words = [part.name for part in fields(cls)]
        named = [given] if isinstance(given, str) else given
        if isinstance(named, Sequence):
            check_words([str(word) for word in named], words, "data.augment")
            usual = cls((0.5, 2.0), default.crop, 0.75, 0.5, 0.4, moves_of(True), 0.1, 0.1)
            return cls(**{word: getattr(usual, word) for word in named})
        if not isinstance(named, Mapping):
            raise UserError(f"data.augment: expected words of {', '.join(words)}, not {given!r}")
        check_words([str(word) for word in named], words, "data.augment")
        found = cls(**{word: value for word, value in named.items() if value is not None})
        return replace(
            found,
            scale=None if found.scale is None else _range(found.scale),
            crop=None if found.crop is None else _size(found.crop, "augment.crop"),
            hsv=moves_of(found.hsv),
            **{word: _share(getattr(found, word), word) for word in SHARES},
        )


def _range(given: Any) -> tuple[float, float]:
    low, high = given if isinstance(given, Sequence) and len(given) == 2 else (0, 0)
    if not 0 < low <= high:
        raise UserError(f"data.augment.scale is [smallest, largest], both > 0, not {given}")
    return float(low), float(high)


def _share(given: Any, word: str) -> float:
    if isinstance(given, bool):
        return SHARES[word] if given else float(word == "most")
    if not isinstance(given, (int, float)) or not 0 <= given <= 1:
        raise UserError(f"data.augment.{word} is a number in [0, 1], not {given!r}")
    return float(given)


def _size(given: Any, word: str) -> tuple[int, int]:
    sides = (given, given) if isinstance(given, int) else tuple(given) if isinstance(given, Sequence) else ()
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise UserError(f"data.{word} is a number of pixels, or [height, width], not {given!r}")
    return sides[0], sides[1]


@final
@dataclass(frozen=True)
class Record:
    """One image and the class of each of its pixels.

    Args:
        image: `[3, H, W]` uint8.
        classes: `[H, W]` int64, -1 where ignored or unknown.
        original_size: (height, width) on disk.
    """

    image: Tensor
    classes: Tensor
    original_size: tuple[int, int]


class SizeError(ValueError):
    """A mask has another size than its image."""


def require_same_size(mask: Sequence[int], image: Sequence[int]) -> None:
    """Refuse a mask of another (height, width) than its image.

    Raises:
        SizeError: naming both.
    """
    if tuple(mask) != tuple(image):
        raise SizeError(f"its mask has {mask[0]} x {mask[1]} pixels, the image {image[0]} x {image[1]}")


class Source(Protocol):
    """Where images and masks come from."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Return `[3, H, W]` uint8, and `[H, W]` int64 classes or None.

        Raises:
            OSError: if a file cannot be read.
            ValueError: if mask and image do not go together, or a value stands for no class.
        """

    def size(self, index: int) -> tuple[int, int]:
        """Return (height, width) of an image."""

    def check(self, index: int, *, whole: bool) -> bool:
        """Return whether a sample has a mask, after a look at its sizes or at the whole of it.

        Raises:
            OSError: as `read` does.
            ValueError: as `read` does.
        """

    def name(self, index: int) -> str:
        """Return what to call a sample in an error."""


@final
@dataclass(frozen=True)
class PairFiles:
    """Image files and their masks.

    Args:
        files: one pair a sample.
        codes: what the values of the masks mean.
    """

    files: tuple[Pair, ...]
    codes: Codes

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Return an image and its classes."""
        files = self.files[index]
        image = read_image(files.image, 3)
        if files.mask is None:
            return image, None
        return image, self.codes.decode(masks.read_mask(files.mask, colour=self.codes.colour))

    def size(self, index: int) -> tuple[int, int]:
        """Return (height, width) from the head of the file."""
        return size_of(self.files[index].image)

    def check(self, index: int, *, whole: bool) -> bool:
        """Return whether an image has a mask."""
        files = self.files[index]
        size = self.size(index)
        if files.mask is None:
            return False
        require_same_size(size_of(files.mask), size)
        if whole:
            self.codes.decode(masks.read_mask(files.mask, colour=self.codes.colour))
        return True

    def name(self, index: int) -> str:
        """Return the path of the image."""
        return str(self.files[index].image)


@final
@dataclass(frozen=True)
class Rows:
    """Rows of a table of Hugging Face `datasets` with two columns of images.

    Args:
        table: a `datasets.Dataset`.
        image: name of the column of images.
        mask: name of the column of masks.
        codes: what the values of the masks mean.
        source: what to call the set in an error.
    """

    table: Any
    image: str
    mask: str
    codes: Codes
    source: str

    def __len__(self) -> int:
        return len(self.table)

    def raw(self, index: int) -> Tensor | None:
        """Return the values of a mask as they are, or None."""
        import numpy as np

        found = self.table[index][self.mask]
        if found is None:
            return None
        values = torch.from_numpy(np.array(found.convert("RGB") if self.codes.colour else found).astype(np.int64))
        if self.codes.colour:
            return values[..., 0] << 16 | values[..., 1] << 8 | values[..., 2]
        if values.ndim != 2:
            raise ValueError("the mask is a colour image: say what its colours mean, data.segmentation.colors")
        return values

    def read(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Return an image and its classes."""
        from tutelage.data.torchvision import as_pixels

        image = as_pixels(self.table[index][self.image])
        values = self.raw(index)
        return image.expand(3, -1, -1), None if values is None else self.codes.decode(values)

    def size(self, index: int) -> tuple[int, int]:
        """Return (height, width) of an image."""
        width, height = self.table[index][self.image].size
        return height, width

    def check(self, index: int, *, whole: bool) -> bool:
        """Return whether a row has a mask; of large sets each is looked at when its turn comes."""
        if not whole:
            return True
        image, classes = self.read(index)
        if classes is not None:
            require_same_size(classes.shape, image.shape[1:])
        return classes is not None

    def name(self, index: int) -> str:
        """Return the set and the row."""
        return f"{self.source}[{index}]"


@final
@dataclass(frozen=True)
class Drawn:
    """Scenes of handwritten digits.

    Args:
        number: of scenes.
        side: pixels of one.
        seed: of what is drawn.
        held_out: of the digits of the validation split.
        points: of the ground that keep their class, beside one of each digit; 0 keeps all pixels.
    """

    number: int
    side: int
    seed: int
    held_out: bool
    points: int = 0

    def __len__(self) -> int:
        return self.number

    def read(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Return a scene and its classes."""
        return _drawn(self)[index]

    def size(self, index: int) -> tuple[int, int]:
        """Return (height, width) of a scene."""
        return self.side, self.side

    def check(self, index: int, *, whole: bool) -> bool:
        """Return that a scene has a class map."""
        return True

    def name(self, index: int) -> str:
        """Return the set and the number."""
        return f"scenes/{'validation' if self.held_out else 'train'}[{index}]"


@cache
def _drawn(of: Drawn) -> list[tuple[Tensor, Tensor]]:
    from tutelage.data.scenes import scenes

    made = scenes(of.number, of.side, of.seed, held_out=of.held_out)
    if not of.points:
        return [(one.image, one.class_map) for one in made]
    return [(one.image, pointed(one, of.points, mix(of.seed, POINTS, place))) for place, one in enumerate(made)]


def pointed(scene: "Scene", ground: int, key: int) -> Tensor:
    """Return a class map of which one pixel of each thing is known, and so many of the ground.

    Args:
        scene: with its masks.
        ground: pixels, drawn at random by the key; fewer where there are not as many.
        key: of the choice.

    Returns:
        `[H, W]` int64, -1 elsewhere. The pixel of a thing is that of its own nearest to the middle of all of them.
    """
    known = torch.full_like(scene.class_map, IGNORED)
    for mask in scene.masks:
        place = mask.nonzero()
        middle = (place - place.double().mean(0)).square().sum(1).argmin()
        row, column = place[middle].tolist()
        known[row, column] = scene.class_map[row, column]
    free = (scene.class_map == 0).flatten().nonzero()[:, 0]
    drawn = uniform(key, torch.zeros(1, dtype=torch.int64), (len(free),))[0].argsort()[:ground]
    known.view(-1)[free[drawn]] = 0
    return known


@final
@dataclass(frozen=True)
class ClassMaps:
    """Images with class maps, as a loader reads them.

    Args:
        source: where they come from.
        place: `[N]` which of its samples.
        targets: `[N]` int64, 0 where there is a class map, -1 where there is none or it is not to be known.
        class_names: by class index.
        size: (height, width) to which images are brought, or None.
        changes: of training images.
        multiple: padded sides are a multiple of so many pixels.
    """

    source: Source
    place: Tensor
    targets: Tensor
    class_names: tuple[str, ...]
    size: tuple[int, int] | None = None
    changes: Changes = Changes()
    multiple: int = 1

    @property
    def cropped(self) -> bool:
        """Whether training images are cut out of larger ones."""
        return self.changes.crop is not None

    def __len__(self) -> int:
        return len(self.place)

    def name(self, index: int) -> str:
        """Return the path of the image, or the set and the number."""
        return self.source.name(int(self.place[index]))

    def together(self, most: int) -> tuple[Tensor, ...] | None:
        """Return the images of each batch that is scored: of one size, since padding has a part in what is said.

        Args:
            most: in a batch.

        Returns:
            Places in this set, or None where all images have one size and may come as they are.
        """
        if self.size is not None:
            return None
        groups: dict[tuple[int, int], list[int]] = {}
        lost: list[int] = []
        for index, place in enumerate(self.place.tolist()):
            try:
                groups.setdefault(self.source.size(place), []).append(index)
            except UNREADABLE:  # such an image is named when its batch is read
                lost.append(index)
        if len(groups) < 2:
            return None
        next(iter(groups.values())).extend(lost)
        return tuple(batch for rows in groups.values() for batch in torch.tensor(rows).split(most))

    def keep(self, index: Tensor) -> "ClassMaps":
        """Return the set of these samples, in this order."""
        return replace(self, place=self.place[index], targets=self.targets[index])

    def relabel(self, targets: Tensor) -> "ClassMaps":
        """Return the same images, those with target -1 without their class maps."""
        return replace(self, targets=targets)

    def augmented(self, augment: Any) -> "ClassMaps":
        """Return the same images, changed in training as this `augment` says; a crop without a size keeps its own."""
        return replace(self, changes=Changes.parse(augment, self.changes))

    def model_facts(self) -> dict[str, Any]:
        """Return what a model must know of the samples."""
        return {
            "task": "segmentation",
            "num_classes": len(self.class_names),
            "class_names": self.class_names,
            "in_channels": 3,
            "image_size": self.size or self.changes.crop,
        }

    def read(self, index: int) -> Record:
        """Return one image and its class map as they lie on disk.

        Raises:
            OSError: if a file cannot be read.
            ValueError: if the mask has another size than its image, or a value that stands for no class.
        """
        image, classes = self.source.read(int(self.place[index]))
        if classes is not None:
            require_same_size(classes.shape, image.shape[1:])
        if classes is None or int(self.targets[index]) < 0:
            classes = torch.full(image.shape[1:], IGNORED)
        return Record(image, classes, (image.shape[1], image.shape[2]))

    def seen(self, record: Record, key: int, *, train: bool) -> Record:
        """Return a record as a model sees it: brought to size, and in training changed as its key says."""
        if self.size is not None:
            record = resized(record, self.size)
        return changed(record, self.changes, key) if train else record

    def collate(self, records: Sequence[Record], index: Tensor, view: Tensor) -> Batch:
        """Return records as one batch, each in the upper left corner of it; padding is black and ignored."""
        sizes = torch.tensor([one.image.shape[1:] for one in records])
        height, width = (self.multiple * -(-int(side) // self.multiple) for side in sizes.amax(0))
        images = torch.stack([_padded(one.image, (height, width), 0) for one in records])
        target = torch.stack([_padded(one.classes, (height, width), IGNORED) for one in records])
        none = torch.zeros(0)
        return Batch(
            inputs=to_unit(images),
            target=target,
            labelled=target >= 0,
            index=index,
            view=view,
            frame=Frame((height, width), sizes, none.view(0, 4), none.long()),
            extra={"original_size": torch.tensor([one.original_size for one in records])},
        )


def _padded(values: Tensor, size: tuple[int, int], fill: int) -> Tensor:
    height, width = values.shape[-2:]
    return F.pad(values, (0, size[1] - width, 0, size[0] - height), value=fill)


# --- changes ---------------------------------------------------------------------------------------------


def resized(record: Record, size: tuple[int, int]) -> Record:
    """Return image (bilinear, antialiased) and class map (nearest) at a size."""
    from torchvision.transforms.v2 import InterpolationMode, functional

    if record.image.shape[1:] == size:
        return record
    classes = functional.resize(record.classes[None], list(size), interpolation=InterpolationMode.NEAREST_EXACT)[0]
    return replace(record, image=functional.resize(record.image, list(size), antialias=True), classes=classes)


def changed(record: Record, changes: Changes, key: int) -> Record:
    """Return a record after the random changes that its key decides; image and class map move together.

    Example:
        >>> one = Record(torch.zeros(3, 4, 4, dtype=torch.uint8), torch.zeros(4, 4, dtype=torch.long), (4, 4))
        >>> changed(one, Changes(crop=(6, 2)), 7).classes.sum()
        tensor(-4)
    """
    if changes.scale is not None:
        low, high = changes.scale
        factor = low + (high - low) * _number(key, SCALE)
        height, width = (max(1, round(side * factor)) for side in record.image.shape[1:])
        record = resized(record, (height, width))
    if changes.crop is not None:
        record = _crop(record, changes.crop, changes.most, key)
    if changes.flip and _number(key, TURN) < changes.flip:
        record = replace(record, image=record.image.flip(2), classes=record.classes.flip(1))
    if changes.color:
        record = replace(record, image=_coloured(record.image, changes.color, key))
    for salt, step in _steps(changes):
        record = replace(record, image=step(record.image[None], torch.tensor([mix(key, salt)]))[0])
    return record


def _steps(changes: Changes) -> Iterator[tuple[int, Step]]:
    """Yield what is done to the pixels alone, each with its salt."""
    if changes.hsv is not None:
        yield TINT, HSV(*changes.hsv)
    if changes.blur:
        yield SMEAR, Blur(changes.blur)
    if changes.median_blur:
        yield MEDIAN, MedianBlur(changes.median_blur)


def _number(key: int, salt: int, *more: int) -> float:
    return float(uniform(mix(key, salt, *more), torch.zeros(1, dtype=torch.long))[0])


def _crop(record: Record, size: tuple[int, int], most: float, key: int) -> Record:
    room = [max(whole - side, 0) for whole, side in zip(record.image.shape[1:], size, strict=True)]
    for turn in range(TRIES):
        top, left = (int(_number(key, way, turn) * (free + 1)) for way, free in zip((10, 11), room, strict=True))
        classes = record.classes[top : top + size[0], left : left + size[1]]
        known = classes[classes >= 0]
        if most >= 1 or not len(known) or float(known.bincount().max()) <= most * len(known):
            break
    image = record.image[:, top : top + size[0], left : left + size[1]]
    return replace(record, image=_padded(image, size, 0), classes=_padded(classes, size, IGNORED))


def _coloured(image: Tensor, strength: float, key: int) -> Tensor:
    from torchvision.transforms.v2 import functional

    turns = [2 * _number(key, COLOUR, way) - 1 for way in range(4)]
    for way, change in enumerate((functional.adjust_brightness, functional.adjust_contrast)):
        image = change(image, 1 + strength * turns[way])
    image = functional.adjust_saturation(image, 1 + strength * turns[2])
    return functional.adjust_hue(image, 0.2 * strength * turns[3])  # type: ignore[no-any-return]


# --- reading ---------------------------------------------------------------------------------------------


def read(kind: str, place: str, spec: "Spec") -> dict[str, ClassMaps]:
    """Return the sets of a source by split.

    Args:
        kind: one of `KINDS`.
        place: what stands after the colon.
        spec: the data section.

    Raises:
        UserError: if folders, classes or masks are not as they should be.

    Example:
        >>> from tutelage.data.load import Spec
        >>> found = read("scenes", "", Spec("scenes", segmentation={"scenes": [2, 1], "side": 48}))
        >>> record = found["train"].read(0)
        >>> found["train"].class_names[:3], record.image.shape, record.classes.shape
        (('ground', '0', '1'), torch.Size([3, 48, 48]), torch.Size([48, 48]))
    """
    options = Options.parse(spec.segmentation)
    if kind == "scenes":
        names: tuple[str, ...] = ("ground", *class_words(range(10)))
        found: dict[str, Source] = {
            "train": Drawn(options.scenes[0], options.side, options.scene_seed, False, options.points),
            "validation": Drawn(options.scenes[1], options.side, options.scene_seed, True),
        }
    elif kind == "hf":
        names, found = _tables(place, options, spec)
    else:
        names, found = _folders(kind, place, options)
    return {split: _samples(source, names, kind, split, spec, options.multiple) for split, source in found.items()}


def _samples(source: Source, names: tuple[str, ...], kind: str, split: str, spec: "Spec", multiple: int) -> ClassMaps:
    known, wrong = _checked(source, f"{spec.source} ({split})", spec.on_error)
    place = torch.arange(len(source))[~wrong]
    size = None if spec.image_size is None else pair(spec.image_size)
    first = size or tuple(source.read(int(place[0]))[0].shape[1:])
    usual = Changes() if kind == "scenes" else Changes((0.5, 2.0), _at_most(first), 0.75, 0.5, 0.4)
    return ClassMaps(source, place, known[~wrong], names, size, Changes.parse(spec.augment, usual), multiple)


def images(paths: Sequence[Path], spec: "Spec", class_names: tuple[str, ...]) -> ClassMaps:
    """Return image files of which nothing is known, brought to the size that a data section says.

    Args:
        paths: of the files.
        spec: the section.
        class_names: by class index.
    """
    options = Options.parse(spec.segmentation)
    source = PairFiles(tuple(Pair(path, None) for path in paths), Codes.of({0: 0}))
    size = None if spec.image_size is None else pair(spec.image_size)
    nothing = torch.full((len(paths),), -1)
    return ClassMaps(source, torch.arange(len(paths)), nothing, class_names, size, multiple=options.multiple)


def _at_most(size: Sequence[int]) -> tuple[int, int]:
    return min(size[0], LARGEST_CROP), min(size[1], LARGEST_CROP)


def _checked(source: Source, name: str, on_error: Literal["raise", "skip"]) -> tuple[Tensor, Tensor]:
    """Return 0 or -1 for each sample, whether it has a mask, and which samples cannot be used.

    Raises:
        UserError: naming each kind of fault, how often it is met and where first.
    """
    known = torch.zeros(len(source), dtype=torch.long)
    wrong = torch.zeros(len(source), dtype=torch.bool)
    troubles, whole = Troubles(name), _whole(source)
    for index in range(len(source)):
        try:
            known[index] = 0 if source.check(index, whole=whole) else -1
        except (OSError, ValueError) as error:
            size = isinstance(error, SizeError)
            kind = "masks of another size than their image" if size else "masks with values that stand for no class"
            kind = "images or masks that cannot be read" if isinstance(error, OSError) else kind
            wrong[index] = True
            troubles.note(kind, f"{source.name(index)}: {error}")
    troubles.settle("raise" if bool(wrong.all()) else on_error)
    if bool((known < 0).all()):
        raise UserError(f"{name}: none of {len(source)} images has a mask, such as {source.name(0)}")
    return known, wrong


def _whole(source: Source) -> bool:
    """Whether the masks are few and small enough to be looked at pixel by pixel."""
    try:
        height, width = source.size(0)
    except OSError:
        return True
    return len(source) * height * width <= CHECKED


def _folders(kind: str, place: str, options: Options) -> tuple[tuple[str, ...], dict[str, Source]]:
    found = masks.pairs(kind, place, images=options.images, masks=options.masks)
    names, colours = masks.named_classes(options.classes, Path(place) if kind == "masks" else None)
    coloured: Mapping[str, Sequence[int]] | None = options.colors or colours or None
    kept: tuple[str, ...]
    if kind == "cityscapes" and not names:
        kept, codes = masks.CITYSCAPES, _cityscapes(found)
    else:
        usual = {"voc": masks.VOC, "camvid": (*masks.CAMVID, "void")}.get(kind, ())
        names = names or tuple(coloured or ()) or usual or class_words(range(_largest(found, options) + 1))
        kept, codes = masks.codes_of(names, coloured, options.ignore, shift=options.first)
    return kept, {split: PairFiles(tuple(files), codes) for split, files in found.items()}


def _cityscapes(found: Mapping[str, Sequence[Pair]]) -> Codes:
    """Return what values mean, in masks of either kind: they are not mixed."""
    named = [one.mask for files in found.values() for one in files if one.mask is not None]
    if all(path.stem.endswith("labelTrainIds") for path in named):
        return Codes.of({**{number: number for number in range(len(masks.CITYSCAPES))}, 255: IGNORED})
    other = next((path for path in named if path.stem.endswith("labelTrainIds")), None)
    if other is not None:
        raise UserError(f"cityscapes: some masks end in _labelTrainIds, such as {other}, and others do not")
    meaning = dict.fromkeys(range(-1, 34), IGNORED)
    return Codes.of(meaning | {number: place for place, number in enumerate(masks.CITYSCAPES_IDS)})


def _largest(found: Mapping[str, Sequence[Pair]], options: Options) -> int:
    """Return the largest number in the training masks, where nobody says what the classes are.

    Raises:
        UserError: if there are too many masks to look at, or none.
    """
    files = [one.mask for one in found["train"] if one.mask is not None]
    if len(files) > NUMBERED:
        raise UserError("data.segmentation.classes: say the names of the classes, or how many there are")
    ignored = torch.tensor([value for value in options.ignore if isinstance(value, int)], dtype=torch.long)
    largest = -1
    for path in files:
        try:
            values = masks.read_mask(path, colour=False)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: {error}") from error
        values = values[~torch.isin(values, ignored)]
        largest = max(largest, int(values.max()) if len(values) else -1)
    if largest < 0:
        raise UserError("data.segmentation.classes: no mask names a class; say the names of the classes")
    return largest - options.first


def _tables(place: str, options: Options, spec: "Spec") -> tuple[tuple[str, ...], dict[str, Source]]:
    from tutelage.data.hub import tables

    names, colours = masks.named_classes(options.classes, None)
    coloured: Mapping[str, Sequence[int]] | None = options.colors or colours or None
    names = names or tuple(coloured or ())
    if not names:
        raise UserError("data.segmentation.classes: say the names of the classes, or how many there are")
    kept, codes = masks.codes_of(names, coloured, options.ignore, shift=options.first)
    found: dict[str, Source] = {}
    for split, table in tables(place, spec.download).items():
        pictures = [column for column, kind in table.features.items() if type(kind).__name__ == "Image"]
        image, mask = spec.image_column, spec.label_column
        if len(pictures) == 2:
            masklike = [c for c in pictures if any(word in c.lower() for word in ("mask", "label", "annot", "seg"))]
            mask = mask or (masklike[0] if len(masklike) == 1 else None)
            image = image or next((c for c in pictures if mask is not None and c != mask), None)
        for word, column in (("image", image), ("label", mask)):
            if column is None:
                raise UserError(
                    f"{place}: which column holds the {'masks' if word == 'label' else 'images'}? Say "
                    f"data.{word}_column; columns of images: {', '.join(pictures) or 'none'}"
                )
            if column not in table.features:
                raise UserError(
                    f"data.{word}_column: {place} has no column {column!r}{nearest(column, table.features)}"
                )
        assert image is not None
        assert mask is not None
        found[split] = Rows(table, image, mask, codes, f"{place}/{split}")
    return kept, found
