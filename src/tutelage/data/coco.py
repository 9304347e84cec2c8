# SPDX-License-Identifier: Apache-2.0
"""Instances in COCO's json: boxes, polygons and run-length codes, crowd regions, images without anything.

Reference: Lin et al., Microsoft COCO: Common Objects in Context, ECCV 2014; the format as cocodataset.org gives it.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tutelage.core.error import UserError
from tutelage.data.annotations import Annotated, Shape, Table, Troubles, sound

#: Words by which files and folders of a split are known.
SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val"), "test": ("test",)}
LEAST = 6  # numbers of a polygon: three points


def coco(root: str | Path, troubles: Troubles) -> dict[str, Table]:
    """Return the splits below a folder, or of one json file.

    A split is a json file whose name, or whose folder, has the word: `annotations/instances_train2017.json` with
    images in `train2017`, `train/_annotations.coco.json` with images beside it. Images lie in the json's own folder,
    or in the folder of the split, `images` or the root. Of several files of a split the one with `instances` in
    its name is read. A test split without annotations, which others score, is passed over.

    Args:
        root: the folder, or a json file (the only split, `train`).
        troubles: told of what is wrong.

    Raises:
        UserError: if there is nothing to read, a file is no such json, or classes differ between splits.
    """
    place = Path(root)
    if place.is_file():
        home = place.parent.parent if place.parent.name == "annotations" else place.parent
        return {"train": _annotations(place, home, troubles)}
    if not place.is_dir():
        raise UserError(f"data.source: no file or folder {place}")
    files = sorted([*place.glob("*.json"), *place.glob("*/*.json")])
    found: dict[str, Table] = {}
    for split, words in SPLITS.items():
        of_split = [file for file in files if any(word in _words(file, place) for word in words)]
        if of_split:
            chosen = next((file for file in of_split if "instances" in file.name), of_split[0])
            table = _table(chosen, place, split, troubles)
            if table is not None:
                found[split] = table
    if "train" not in found:
        if not files:
            raise UserError(f"data.source: {place} holds no json file, nor do the folders in it")
        if len(files) > 1 or found:
            raise UserError(f"data.source: no json file below {place} has `train` in its name, or in its folder's")
        found["train"] = _annotations(files[0], place, troubles)
    names = found["train"].class_names
    for split, table in found.items():
        if table.class_names != names:
            raise UserError(f"{place}: the categories of {split} are not those of train, or have other ids")
    return found


def _words(file: Path, root: Path) -> str:
    own = file.stem.lower()
    return (
        own if any(word in own for words in SPLITS.values() for word in words) else str(file.parent.relative_to(root))
    )


def _annotations(file: Path, root: Path, troubles: Troubles) -> Table:
    table = _table(file, root, "train", troubles)
    assert table is not None
    return table


def _table(file: Path, root: Path, split: str, troubles: Troubles) -> Table | None:
    """Return what a file says of a split; None for a test split without annotations."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        images, categories = found["images"], found["categories"]
        if split == "test" and "annotations" not in found:
            return None
        annotations = found["annotations"]
        for one in categories:
            if not {"id", "name"} <= one.keys():
                raise ValueError(f"a category has no id or no name: {one}")
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise UserError(f"{file} is no json of COCO: {what}") from error
    ordered = sorted(categories, key=lambda one: one["id"])
    label = {one["id"]: number for number, one in enumerate(ordered)}
    listed, images = images, [image for image in images if _whole(image)]
    for image in listed:
        if not _whole(image):
            troubles.note(
                "images without id, file_name, height or width", str(image.get("file_name") or image.get("id"))
            )
    by_image: dict[Any, list[Mapping[str, Any]]] = {image["id"]: [] for image in images}
    for one in annotations:
        if one.get("image_id") not in by_image:
            troubles.note("annotations of images that are not listed", f"annotation {one.get('id')}")
        elif one.get("category_id") not in label:
            troubles.note("annotations of unknown categories", f"annotation {one.get('id')}")
        else:
            by_image[one["image_id"]].append(one)
    home = _Home(file, root, split)
    entries = []
    for image in images:
        path = home.find(str(image["file_name"]))
        if path is None:
            troubles.note("images that are missing", str(image["file_name"]))
            continue
        entries.append(_annotated(image, path, by_image[image["id"]], label, troubles))
    if not entries:
        raise UserError(
            f"{file}: none of its {len(listed)} images is there"
            + (f", such as {images[0]['file_name']}; looked in {home}" if images else "")
        )
    return Table(tuple(entries), tuple(str(one["name"]) for one in ordered))


def _whole(image: Mapping[str, Any]) -> bool:
    sides = [image.get("height"), image.get("width")]
    return {"id", "file_name"} <= image.keys() and all(isinstance(side, (int, float)) and side >= 1 for side in sides)


class _Home:
    """The folders in which images of a split may lie, each listed once."""

    def __init__(self, file: Path, root: Path, split: str) -> None:
        words = SPLITS[split]
        below = [path for path in sorted(root.iterdir()) if path.is_dir()] if root.is_dir() else []
        named = [path for path in below if any(word in path.name.lower() for word in words)]
        images = [root / "images", *(path for path in sorted((root / "images").glob("*")) if path.is_dir())]
        deep = [path for path in images[1:] if any(word in path.name.lower() for word in words)]
        # of a lone file named for another split, the images may lie in that one's folder
        own = [path for path in below if path.name in file.stem]
        self.folders = list(dict.fromkeys([file.parent, *own, *named, *deep, images[0], root]))
        self.names = {folder: {path.name for path in folder.iterdir()} for folder in self.folders if folder.is_dir()}

    def find(self, name: str) -> Path | None:
        """Return the file of this name, or None."""
        for folder, names in self.names.items():
            if name in names or ("/" in name and (folder / name).is_file()):
                return folder / name
        return None

    def __str__(self) -> str:
        return ", ".join(map(str, self.names))


def _annotated(
    image: Mapping[str, Any],
    path: Path,
    annotations: list[Mapping[str, Any]],
    label: Mapping[Any, int],
    troubles: Troubles,
) -> Annotated:
    size = (int(image["height"]), int(image["width"]))
    rows, shapes, used = [], [], []
    for one in annotations:
        box = one.get("bbox")
        where = f"annotation {one.get('id')}"
        if not (isinstance(box, list) and len(box) == 4 and all(isinstance(edge, (int, float)) for edge in box)):
            troubles.note("annotations without a box", where)
            continue
        shape = one.get("segmentation")
        kept = _shape(shape, size, where, troubles)
        if shape and kept is None:
            continue
        left, top, width, height = map(float, box)
        rows.append([left, top, left + width, top + height])
        shapes.append(kept)
        used.append(one)
    boxes, good = sound(torch.tensor(rows).view(-1, 4), size, [f"annotation {one.get('id')}" for one in used], troubles)
    area = [float(one.get("area") or math.prod(one["bbox"][2:])) for one in used]
    chosen = good.nonzero().flatten().tolist()
    return Annotated(
        path,
        size,
        boxes[good],
        torch.tensor([label[used[number]["category_id"]] for number in chosen], dtype=torch.long),
        torch.tensor([bool(used[number].get("iscrowd")) for number in chosen], dtype=torch.bool),
        torch.tensor([area[number] for number in chosen]),
        tuple(shapes[number] for number in chosen) if any(shape is not None for shape in shapes) else (),
        str(path),
    )


def _shape(given: Any, size: tuple[int, int], where: str, troubles: Troubles) -> Shape | None:
    """Return polygons or a run-length code; None if there is none, or none that encloses anything."""
    if not given:
        return None
    if isinstance(given, Mapping):
        if "counts" in given and "size" in given:
            if given["size"] == list(size) and _covers(given["counts"]) == math.prod(size):
                return dict(given)
            troubles.note("run-length codes that are damaged, or of another size than their image", where)
            return None
        troubles.note("masks that are neither polygons nor run-length codes", where)
        return None
    whole = [part for part in given if isinstance(part, list) and len(part) >= LEAST and len(part) % 2 == 0]
    if len(whole) < len(given):
        troubles.note("polygons of fewer than three points", where)
    return whole or None


def _covers(counts: Any) -> int | None:
    """Return how many pixels a run-length code has, or None if it is damaged.

    Packed, a count is a row of characters of 5 bits each from the lowest on, the last without the sixth bit; from the
    third on counts are differences to the one before the last.
    """
    if isinstance(counts, str):
        counts = [ord(letter) - ord("0") for letter in counts]
        lengths: list[int] = []
        value = place = 0
        for number in counts:
            if not 0 <= number < 64:
                return None
            value |= (number & 31) << 5 * place
            place += 1
            if not number & 32:
                value -= (number >> 4 & 1) << 5 * place  # a negative number
                lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
                value, place = 0, 0
        counts = None if place else lengths
    if not isinstance(counts, list) or not all(isinstance(length, int) and length >= 0 for length in counts):
        return None
    return sum(counts)
