# SPDX-License-Identifier: Apache-2.0
"""Images beside masks in folders, as Cityscapes, VOC, CamVid and others lay them out, and how a mask says classes."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from tutelage.core.error import UserError, nearest
from tutelage.data.folder import ENDINGS, TEST, TRAIN, VALIDATION

IGNORED = -1
SPLITS = {"train": TRAIN, "validation": VALIDATION, "test": TEST}
#: Folders that hold images, and folders that hold masks, in the layouts that are met most.
IMAGES = ("images", "image", "imgs", "img", "leftImg8bit", "JPEGImages", "701_StillsRaw_full")
MASKS = (
    *("masks", "mask", "labels", "label", "annotations", "annotation", "annot", "gtFine", "SegmentationClass"),
    *("LabeledApproved_full", "segmentations"),
)
#: What the name of a mask may say after the name of its image; the first that is there is taken.
AFTER = ("", "_labelTrainIds", "_labelIds", "_mask", "_masks", "_label", "_labels", "_gt", "_seg", "_L", "-mask")
VOC = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
CITYSCAPES = (
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation"),
    *("terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"),
)
#: The number of each Cityscapes class in masks that end in `_labelIds`.
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
CAMVID = (
    *("Sky", "Building", "Pole", "Road", "Pavement", "Tree", "SignSymbol", "Fence", "Car", "Pedestrian"),
    "Bicyclist",
)
VOID = ("void", "ignore", "ignored", "unlabelled", "unlabeled")
UNKNOWN = 5  # values that a message names


@final
@dataclass(frozen=True)
class Codes:
    """What the values of a mask mean.

    Args:
        values: `[M]` int64, ascending: numbers, or colours as red * 65536 + green * 256 + blue.
        classes: `[M]` int64 class of each, -1 for ignored.
        colour: values are colours.
    """

    values: Tensor
    classes: Tensor
    colour: bool = False

    @classmethod
    def of(cls, meaning: Mapping[int, int], *, colour: bool = False) -> "Codes":
        """Return codes from classes by value.

        Example:
            >>> Codes.of({0: 0, 255: -1}).decode(torch.tensor([[0, 255]]))
            tensor([[ 0, -1]])
        """
        pairs = sorted(meaning.items())
        values, classes = zip(*pairs, strict=True)
        return cls(torch.tensor(values), torch.tensor(classes), colour)

    def decode(self, raw: Tensor) -> Tensor:
        """Return `[H, W]` int64 classes.

        Raises:
            ValueError: naming the values that stand for no class.
        """
        place = torch.searchsorted(self.values, raw).clamp(max=len(self.values) - 1)
        known = self.values[place] == raw
        if not known.all():
            strange, counts = raw[~known].unique(return_counts=True)
            words = [self._word(value) for value in strange[counts.argsort(descending=True)][:UNKNOWN].tolist()]
            more = ", ..." if len(strange) > UNKNOWN else ""
            kind = "colour" if self.colour else "value"
            raise ValueError(
                f"{kind}{'s' if len(words) > 1 else ''} {', '.join(words)}{more} of {int(counts.sum())} pixels "
                f"{'stand' if len(words) > 1 else 'stands'} for no class; "
                + (
                    "name it in data.segmentation.colors"
                    if self.colour
                    else f"classes are 0 to {int(self.classes.max())}: give data.segmentation.classes or .ignore"
                )
            )
        return self.classes[place]

    def _word(self, value: int) -> str:
        return f"({value >> 16}, {value >> 8 & 255}, {value & 255})" if self.colour else str(value)


def packed(colour: Sequence[int]) -> int:
    """Return a colour as one number.

    Example:
        >>> packed((1, 0, 2))
        65538
    """
    red, green, blue = colour
    return red << 16 | green << 8 | blue


def read_mask(path: Path, *, colour: bool) -> Tensor:
    """Return `[H, W]` int64 values of a mask file: indices of a palette or grey image, or packed colours.

    Raises:
        OSError: if the file is missing, damaged or no image.
        ValueError: if a colour image is read as numbers.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as found:
            if colour:
                pixels = torch.from_numpy(np.array(found.convert("RGB"))).long()
                return pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2]
            if found.mode not in ("1", "L", "P", "I", "I;16"):
                raise ValueError(
                    f"the mask is a colour image ({found.mode}): say what its colours mean, data.segmentation.colors"
                )
            return torch.from_numpy(np.array(found).astype(np.int64))
    except UnidentifiedImageError:
        raise OSError("the mask is no image") from None
    except SyntaxError as error:  # of a broken PNG
        raise OSError(str(error)) from None


@final
@dataclass(frozen=True)
class Pair:
    """An image file and its mask, None where there is none."""

    image: Path
    mask: Path | None


Sets = dict[str, list[Pair]]


def pairs(kind: str, place: str, *, images: str | None = None, masks: str | None = None) -> Sets:
    """Return image files with their masks by split: `train` and, where there are, `validation` and `test`.

    `voc` reads the lists of `ImageSets/Segmentation`. The other kinds are told by their folders: an image folder
    beside a mask folder, with or without a folder for each split, above them or within; folders
    `SPLIT_images` and `SPLIT_labels`; or `SPLIT` beside `SPLITannot`. A mask has the name of its image, perhaps
    with a word such as `_mask` after it.

    Args:
        kind: `voc`, `cityscapes`, `camvid` or `masks`.
        place: the folder.
        images: name of the image folder, where it is none that is known.
        masks: the same of the mask folder.

    Raises:
        UserError: if there is no such folder, or its layout is not known.
    """
    root = Path(place)
    if not root.is_dir():
        raise UserError(f"data.source: no folder {place}")
    if kind == "voc":
        return _voc(root)
    homes = _homes(root, images, masks)
    if "train" not in homes:
        raise UserError(
            f"data.source: {place} holds no images beside masks: expected folders such as images and masks, each "
            "with train and val, or data.segmentation.images and .masks with their names"
        )
    return {split: _matched(*home) for split, home in homes.items()}


def _voc(root: Path) -> Sets:
    lists = root / "ImageSets" / "Segmentation"
    found: Sets = {}
    for split, name in (("train", "train"), ("validation", "val"), ("test", "test")):
        file = lists / f"{name}.txt"
        if not file.is_file():
            continue
        stems = [line.split()[0] for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        chosen = [(root / "JPEGImages" / f"{stem}.jpg", root / "SegmentationClass" / f"{stem}.png") for stem in stems]
        if split != "test" or any(mask.is_file() for _, mask in chosen):  # its masks were never published
            found[split] = [Pair(image, mask if mask.is_file() else None) for image, mask in chosen]
    if "train" not in found:
        raise UserError(f"data.source: {root} has no ImageSets/Segmentation/train.txt: is it a VOC folder?")
    return found


def _homes(root: Path, images: str | None, masks: str | None) -> dict[str, tuple[Path, Path]]:
    """Return the image and the mask folder of each split."""
    for named, word in ((images, "images"), (masks, "masks")):
        if named is not None and not any(path.is_dir() for path in (root / named, *root.glob(f"*/{named}"))):
            raise UserError(f"data.segmentation.{word}: {root} has no folder {named!r}{nearest(named, _folders(root))}")
    image_words, mask_words = (images,) if images else IMAGES, (masks,) if masks else MASKS
    found: dict[str, tuple[Path, Path]] = {}
    for split, words in SPLITS.items():
        for word in words:
            for one, other in (
                *((root / i / word, root / m / word) for i in image_words for m in mask_words),
                *((root / word / i, root / word / m) for i in image_words for m in mask_words),
                *((root / f"{word}_{i}", root / f"{word}_{m}") for i in image_words for m in mask_words),
                (root / word, root / f"{word}annot"),
            ):
                if one.is_dir() and other.is_dir():
                    found.setdefault(split, (one, other))
    if not found:
        whole = [(root / i, root / m) for i in image_words for m in mask_words]
        there = next((one for one in whole if one[0].is_dir() and one[1].is_dir()), None)
        found = {"train": there} if there else {}
    return found


def _folders(root: Path) -> list[str]:
    return [path.name for path in sorted(root.iterdir()) if path.is_dir()]


def _files(home: Path) -> dict[str, Path]:
    """Return image files by their path below a folder, without ending."""
    files = sorted(path for path in home.rglob("*") if path.suffix.lower() in ENDINGS)
    return {path.relative_to(home).with_suffix("").as_posix(): path for path in files}


def _matched(images: Path, masks: Path) -> list[Pair]:
    there = _files(masks)
    found = []
    for stem, image in _files(images).items():
        # Cityscapes says what an image is, and what a mask is, at the end of its name
        bare = stem.removesuffix("_leftImg8bit")
        names = [f"{bare}_gtFine{word}" for word in AFTER[1:3]] if bare != stem else []
        names += [f"{stem}{word}" for word in AFTER]
        found.append(Pair(image, next((there[name] for name in names if name in there), None)))
    if not found:
        raise UserError(f"data.source: {images} holds no images")
    return found


# --- classes ---------------------------------------------------------------------------------------------


def named_classes(given: Any, place: Path | None) -> tuple[tuple[str, ...], dict[str, tuple[int, ...]]]:
    """Return class names, and the colours of those that have one, from what a recipe says or a folder holds.

    Args:
        given: names, their number, or a file with them: a list in JSON, one name a line, or lines of red, green,
            blue and a name; None looks for `classes.json`, `classes.txt` and `label_colors.txt` in the folder.
        place: the folder.

    Raises:
        UserError: if the file cannot be read, or says a class twice.
    """
    if isinstance(given, int) and not isinstance(given, bool):
        return tuple(map(str, range(given))), {}
    colours: dict[str, tuple[int, ...]] = {}
    names: Iterable[Any]
    if given is None or isinstance(given, str):
        words = ("classes.json", "classes.txt", "label_colors.txt")
        files = [Path(given)] if given else [place / word for word in words] if place else []
        file = next((path for path in files if path.is_file()), None)
        if file is None:
            if given:
                raise UserError(f"data.segmentation.classes: no file {given}")
            return (), {}
        names, colours = _class_file(file)
    else:
        names = given
    found = tuple(str(name) for name in names)
    twice = next((name for name in found if found.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"data.segmentation.classes: {twice!r} is there twice")
    return found, colours


def _class_file(file: Path) -> tuple[list[str], dict[str, tuple[int, ...]]]:
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".json":
            found = json.loads(text)
            if not isinstance(found, list):
                raise ValueError("it holds no list")
            return [str(name) for name in found], {}
    except (OSError, ValueError) as error:
        raise UserError(f"data.segmentation.classes: {file} cannot be read: {error}") from error
    rows = [line.split() for line in text.splitlines() if line.strip()]
    if rows and all(len(row) > 3 and all(word.isdigit() for word in row[:3]) for row in rows):
        coloured = {" ".join(row[3:]): tuple(int(word) for word in row[:3]) for row in rows}
        return list(coloured), coloured
    return [" ".join(row) for row in rows], {}


def codes_of(
    names: Sequence[str],
    colours: Mapping[str, Sequence[int]] | None,
    ignore: Sequence[Any],
    *,
    shift: int = 0,
) -> tuple[tuple[str, ...], Codes]:
    """Return the classes that count, and what values mean.

    Args:
        names: of the classes, in the order of their numbers; those called void or the like are ignored.
        colours: red, green and blue by name, for colour masks.
        ignore: values, or names, that are ignored besides.
        shift: number of the first class; smaller ones are ignored.

    Raises:
        UserError: if a colour has not three numbers in 0 to 255, or a name has none.
    """
    left_out = {str(word).lower() for word in ignore} | {*VOID}
    kept = tuple(name for name in names if name.lower().partition("(")[0] not in left_out)
    place = {name: number for number, name in enumerate(kept)}
    if not kept:
        raise UserError("data.segmentation.classes: no class is left")
    if colours is None:
        meaning = dict.fromkeys(range(shift), IGNORED)
        meaning |= {number + shift: place.get(name, IGNORED) for number, name in enumerate(names)}
        meaning |= {int(value): IGNORED for value in ignore if not isinstance(value, str)}
        return kept, Codes.of(meaning)
    for name, colour in colours.items():
        if len(colour) != 3 or not all(isinstance(part, int) and 0 <= part <= 255 for part in colour):
            raise UserError(f"data.segmentation.colors.{name}: red, green and blue in 0 to 255, not {list(colour)}")
    lacking = next((name for name in kept if name not in colours), None)
    if lacking is not None:
        raise UserError(f"data.segmentation.colors: the class {lacking!r} has none{nearest(lacking, colours)}")
    meaning = {packed(colour): place.get(name, IGNORED) for name, colour in colours.items()}
    return kept, Codes.of(meaning, colour=True)
