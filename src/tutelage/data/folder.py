# SPDX-License-Identifier: Apache-2.0
"""Images in folders: one folder a class, with or without splits above."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import numpy as np
import torch
from torch import Tensor

from tutelage.core.error import UserError, nearest
from tutelage.data.samples import stratified, without
from tutelage.data.video import is_frame, read_frame, size_of_frame

ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)  # of EXIF: a quarter turn
#: Endings that are read as images.
ENDINGS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
#: Folder names of the splits.
TRAIN, VALIDATION, TEST = ("train", "training"), ("val", "validation", "valid"), ("test",)
SPLIT_SEED = 11
SHOWN = 3


@final
@dataclass(frozen=True)
class Files:
    """Image files.

    Args:
        paths: one a sample.
        targets: `[N]` int64, -1 where unlabelled.
        class_names: by class index.
        channels: 3 reads colour, 1 grey.
    """

    paths: tuple[Path, ...]
    targets: Tensor
    class_names: tuple[str, ...]
    channels: int = 3

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> Tensor:
        """Return `[C, H, W]` uint8, turned as the camera's note says, transparency on black.

        Raises:
            OSError: if the file is missing, damaged or no image.
        """
        return read_image(self.paths[index], self.channels)

    def name(self, index: int) -> str:
        """Return the path."""
        return str(self.paths[index])

    def keep(self, index: Tensor) -> "Files":
        """Return the set of these files, in this order."""
        chosen = tuple(self.paths[number] for number in index.tolist())
        return replace(self, paths=chosen, targets=self.targets[index])

    def relabel(self, targets: Tensor) -> "Files":
        """Return the same files with other targets."""
        return replace(self, targets=targets)


def read_image(path: Path, channels: int) -> Tensor:
    """Return `[C, H, W]` uint8, of an image file or a frame of a video.

    Raises:
        OSError: if the file is missing, damaged or no image.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if is_frame(path):
        whole = Image.fromarray(read_frame(path)).convert("RGB" if channels == 3 else "L")
        return torch.from_numpy(np.array(whole)).view(whole.height, whole.width, channels).permute(2, 0, 1)
    try:
        with Image.open(path) as found:
            image = ImageOps.exif_transpose(found).convert("RGB" if channels == 3 else "L")
    except UnidentifiedImageError:
        raise OSError("no image") from None
    except (SyntaxError, ValueError, Image.DecompressionBombError) as error:  # of broken headers
        raise OSError(str(error)) from error
    pixels = torch.from_numpy(np.array(image))
    return pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels[None]


def size_of(path: Path) -> tuple[int, int]:
    """Return (height, width) of an image file as it is shown, or of a frame of a video, without decoding it.

    Raises:
        OSError: if the file is missing, damaged or no image.
    """
    from PIL import Image, UnidentifiedImageError

    if is_frame(path):
        return size_of_frame(path)
    try:
        with Image.open(path) as found:
            turned = found.getexif().get(ORIENTATION, 1) in TURNED
            return found.size if turned else (found.size[1], found.size[0])
    except UnidentifiedImageError:
        raise OSError("no image") from None
    except SyntaxError as error:
        raise OSError(str(error)) from None


def folder(
    root: str | Path, *, validation_share: float = 0.1, channels: int = 3, allow_duplicates: bool = False
) -> dict[str, Files]:
    """Return the sets below a folder: `train`, `validation` and, where there is one, `test`.

    `root/train/<class>/*` and `root/val/<class>/*` (also `validation`, `valid`; `test` beside them, or in the
    place of a missing validation), or `root/<class>/*` without splits, of which a stratified share is held
    out.
    Classes are the folders' names in sorted order. Images may lie deeper inside a class.

    Args:
        root: the folder.
        validation_share: held out of the training images where there is no validation; always the same ones.
        channels: 3 reads colour, 1 grey.
        allow_duplicates: accept a file of the training set among those a score is taken on.

    Raises:
        UserError: naming the folder that is missing, empty or unknown, or files that are in two splits.
    """
    base = Path(root)
    if not base.is_dir():
        where = "is a file" if base.exists() else "does not exist"
        raise UserError(f"data.source: the folder {base} {where}")
    parts = {split: found for split, names in SPLITS.items() if (found := _first(base, names)) is not None}
    if "train" not in parts:
        if parts:
            raise UserError(f"{base} has {_names(parts.values())} but no folder train")
        train = _labelled(base, None, channels)
        held_out = stratified(train.targets, _share(train, validation_share, base), SPLIT_SEED)
        sets = {"train": train.keep(without(len(train), held_out)), "validation": train.keep(held_out)}
    else:
        train = _labelled(parts["train"], None, channels)
        sets = {"train": train}
        for split in ("validation", "test"):
            if split in parts:
                sets[split] = _labelled(parts[split], train.class_names, channels)
        if "validation" not in sets and "test" in sets:
            sets["validation"] = sets.pop("test")
        if "validation" not in sets:
            held_out = stratified(train.targets, _share(train, validation_share, base), SPLIT_SEED)
            sets |= {"train": train.keep(without(len(train), held_out)), "validation": train.keep(held_out)}
    if not allow_duplicates:
        for split in sets.keys() - {"train"}:
            _refuse_duplicates(sets["train"], sets[split], split)
    return sets


SPLITS = {"train": TRAIN, "validation": VALIDATION, "test": TEST}


def own_splits(root: str | Path) -> list[str]:
    """Return the splits that have a folder of their own below a folder; the others are held out."""
    return [split for split, names in SPLITS.items() if _first(Path(root), names) is not None]


def unlabelled(root: str | Path, class_names: Sequence[str], channels: int = 3) -> Files:
    """Return all images below a folder, without labels.

    Raises:
        UserError: if there is no such folder, or no image in it.
    """
    base = Path(root)
    if not base.is_dir():
        raise UserError(f"data.unlabelled: the folder {base} does not exist")
    paths = images_below(base)
    if not paths:
        raise UserError(f"data.unlabelled: no image below {base} ({_endings()})")
    return Files(tuple(paths), torch.full((len(paths),), -1), tuple(class_names), channels)


def images_below(base: Path) -> list[Path]:
    """Return the image files below a folder, sorted, hidden ones left out."""
    found = (path for path in base.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())
    return sorted(path for path in found if not any(p.startswith(".") for p in path.relative_to(base).parts))


def _labelled(base: Path, class_names: tuple[str, ...] | None, channels: int) -> Files:
    folders = sorted(path for path in base.iterdir() if path.is_dir() and not path.name.startswith("."))
    names = tuple(path.name for path in folders)
    if not folders:
        hint = "images lie in it directly: make a folder a class" if images_below(base) else "it is empty"
        raise UserError(f"{base} holds no folder a class: {hint}")
    if class_names is not None:
        unknown = [name for name in names if name not in class_names]
        if unknown:
            raise UserError(
                f"{base / unknown[0]}: class {unknown[0]!r} is not among the training classes"
                f"{nearest(unknown[0], class_names)}"
            )
        missing = [name for name in class_names if name not in names]
        if missing:
            raise UserError(f"{base} lacks {len(missing)} of {len(class_names)} classes: {_few(missing)}")
    paths: list[Path] = []
    targets: list[int] = []
    for label, name in enumerate(class_names or names):
        found = images_below(base / name)
        if not found:
            raise UserError(f"class {name!r} is empty: no image in {base / name} ({_endings()})")
        paths += found
        targets += [label] * len(found)
    return Files(tuple(paths), torch.tensor(targets), class_names or names, channels)


def _first(base: Path, names: Iterable[str]) -> Path | None:
    """Return the folder of a split, if there is one."""
    return next((base / name for name in names if (base / name).is_dir()), None)


def _share(train: Files, share: float, base: Path) -> int:
    if not 0 < share < 1:
        raise UserError(f"{base} has no validation images, and data.validation_share is {share}: it must lie in (0, 1)")
    sizes = train.targets.bincount(minlength=len(train.class_names))
    if int(sizes.min()) < 2:
        name = train.class_names[int(sizes.argmin())]
        raise UserError(f"class {name!r} has a single image: none is left for validation; add some, or a folder val")
    return max(round(share * len(train)), len(train.class_names))


def _refuse_duplicates(train: Files, held_out: Files, split: str) -> None:
    """Compare contents; only files of equal size are read."""
    sizes: dict[int, list[Path]] = {}
    for path in train.paths:
        sizes.setdefault(path.stat().st_size, []).append(path)
    known: dict[Path, bytes] = {}

    def digest(path: Path) -> bytes:
        if path not in known:
            known[path] = hashlib.sha256(path.read_bytes()).digest()
        return known[path]

    twins = [
        (path, twin)
        for path in held_out.paths
        for twin in sizes.get(path.stat().st_size, ())
        if digest(path) == digest(twin)
    ]
    if twins:
        count = len({path for path, _ in twins})
        raise UserError(
            f"{count} of {len(held_out)} {split} images are also training images, so scores would flatter: "
            f"{twins[0][0]} is {twins[0][1]}; remove them, or set data.allow_duplicates: true"
        )


def _few(words: Sequence[str]) -> str:
    return ", ".join(words[:SHOWN]) + (", ..." if len(words) > SHOWN else "")


def _names(paths: Iterable[Path]) -> str:
    return ", ".join(path.name for path in paths)


def _endings() -> str:
    return " ".join(sorted(ENDINGS))
