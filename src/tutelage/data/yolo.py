# SPDX-License-Identifier: Apache-2.0
"""Text files beside images, one line a thing: class, then a box or a polygon in shares of the image's sides."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml

from tutelage.core.error import UserError
from tutelage.data.annotations import Annotated, Shape, Table, Troubles, sound
from tutelage.data.folder import ENDINGS, size_of

SPLITS = {"train": ("train",), "validation": ("val", "valid", "validation"), "test": ("test",)}
LEAST = 6  # numbers of a polygon: three points


def yolo(root: str | Path, troubles: Troubles) -> dict[str, Table]:
    """Return the splits that a yaml file lists, or of a folder with one.

    `names` (a list, or a mapping from number to name), `path`, `train`, `val` and `test` (folders of images, or text
    files that list images) are read. The text of `images/a/b.jpg` is `labels/a/b.txt`; an image without one has
    nothing on it. A line is `class x y width height`, with the box's centre, or `class x1 y1 x2 y2 x3 y3 ...`, a
    polygon, all in shares of width and height.

    Args:
        root: the yaml file, or the folder it lies in.
        troubles: told of what is wrong.

    Raises:
        UserError: if there is nothing to read.
    """
    file = Path(root)
    if file.is_dir():
        files = sorted([*file.glob("*.yaml"), *file.glob("*.yml")])
        if len(files) != 1:
            raise UserError(f"data.source: {file} holds {len(files)} yaml files; name the one of the set")
        file = files[0]
    try:
        spec = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{file} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(spec, dict) or not spec.get("names") or not spec.get("train"):
        raise UserError(f"{file}: a set of YOLO has `names` and `train`")
    names = spec["names"]
    if isinstance(names, dict):
        if sorted(names) != list(range(len(names))):
            raise UserError(f"{file}: names are numbered 0 to {len(names) - 1}, without a gap")
        names = [names[number] for number in range(len(names))]
    base = file.parent / str(spec.get("path", ""))
    found = {}
    for split, words in SPLITS.items():
        place = next((spec[word] for word in words if spec.get(word)), None)
        if place is not None:
            images = _images(place, base if base.is_dir() else file.parent, file)
            entries = [entry for path in images if (entry := _annotated(path, len(names), troubles)) is not None]
            if not entries:
                raise UserError(f"{file}: {split} holds no image ({place})")
            found[split] = Table(tuple(entries), tuple(map(str, names)))
    return found


def _images(place: Any, base: Path, file: Path) -> list[Path]:
    paths: list[Path] = []
    for one in place if isinstance(place, list) else [place]:
        path = next((root / str(one) for root in (base, file.parent) if (root / str(one)).exists()), None)
        if path is None:
            raise UserError(f"{file}: no file or folder {base / str(one)}")
        if path.is_dir():
            paths += sorted(found for found in path.rglob("*") if found.suffix.lower() in ENDINGS)
        else:
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
            paths += [(path.parent / line) if line.startswith("./") else base / line for line in lines if line]
    return paths


def _label(image: Path) -> Path:
    """Return where the text of an image lies: the last folder `images` of its path becomes `labels`."""
    parts = list(image.parts)
    for number in range(len(parts) - 2, -1, -1):
        if parts[number] == "images":
            parts[number] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _annotated(path: Path, num_classes: int, troubles: Troubles) -> Annotated | None:
    try:
        size = size_of(path)
    except FileNotFoundError:
        troubles.note("images that are missing", str(path))
        return None
    except (OSError, SyntaxError):
        troubles.note("files that are no images", str(path))
        return None
    text = _label(path)
    lines = text.read_text(encoding="utf-8").splitlines() if text.is_file() else []
    rows, labels, shapes, where = [], [], [], []
    for number, line in enumerate(lines, start=1):
        read = _line(line, f"{text}:{number}", size, num_classes, troubles)
        if read is not None:
            labels.append(read[0])
            rows.append(read[1])
            shapes.append(read[2])
            where.append(f"{text}:{number}")
    boxes, good = sound(torch.tensor(rows).view(-1, 4), size, where, troubles)
    boxes = boxes[good]
    kept = [shape for shape, use in zip(shapes, good.tolist(), strict=True) if use]
    return Annotated(
        path,
        size,
        boxes,
        torch.tensor(labels, dtype=torch.long)[good],
        torch.zeros(len(boxes), dtype=torch.bool),
        (boxes[:, 2:] - boxes[:, :2]).prod(dim=1),
        tuple(kept) if any(shape is not None for shape in kept) else (),
        str(path),
    )


def _line(
    line: str, where: str, size: tuple[int, int], num_classes: int, troubles: Troubles
) -> tuple[int, list[float], Shape | None] | None:
    """Return class, box and perhaps polygon of a line."""
    if not line.strip():
        return None
    try:
        kind, *numbers = map(float, line.split())
    except ValueError:
        troubles.note("lines that are no numbers", where)
        return None
    if not (kind.is_integer() and 0 <= kind < num_classes):
        troubles.note(f"classes beyond the {num_classes} that have names", where)
        return None
    height, width = size
    if len(numbers) == 4:
        x, y, w, h = numbers
        return int(kind), [(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height], None
    if len(numbers) < LEAST or len(numbers) % 2:
        troubles.note("polygons of fewer than three points, or half a point", where)
        return None
    across, down = _scaled(numbers[::2], width), _scaled(numbers[1::2], height)
    points = [edge for pair in zip(across, down, strict=True) for edge in pair]
    return int(kind), [min(across), min(down), max(across), max(down)], [points]


def _scaled(shares: Iterable[float], side: int) -> list[float]:
    return [share * side for share in shares]
