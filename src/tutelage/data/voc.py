# SPDX-License-Identifier: Apache-2.0
"""Boxes in the XML files of Pascal VOC.

Reference: Everingham et al., The Pascal Visual Object Classes Challenge, IJCV 2010; the development kit's format.
"""

import xml.etree.ElementTree as ET
from pathlib import Path

import torch

from tutelage.core.error import UserError
from tutelage.data.annotations import Annotated, Table, Troubles, sound
from tutelage.data.folder import ENDINGS

SPLITS = {"train": ("train", "trainval"), "validation": ("val", "valid", "validation"), "test": ("test",)}


def voc(root: str | Path, troubles: Troubles) -> dict[str, Table]:
    """Return the splits of a folder with `Annotations`, `JPEGImages` and `ImageSets/Main`.

    Without lists in `ImageSets/Main` every annotated image is of `train`. Classes are the names that occur, sorted.
    Coordinates count from 1 and include their last pixel: (1, 1, 2, 2) becomes the box 0, 0, 2, 2. Things marked as
    difficult count as neither right nor wrong.

    Args:
        root: the folder.
        troubles: told of what is wrong.

    Raises:
        UserError: if there is nothing to read.
    """
    place = Path(root)
    home = place / "Annotations"
    if not home.is_dir():
        raise UserError(f"data.source: {place} has no folder Annotations, as a set of Pascal VOC has")
    known = {path.stem for path in home.glob("*.xml")}
    lists = {split: _listed(place, words) for split, words in SPLITS.items()}
    ids = {split: names for split, names in lists.items() if names}
    if "train" not in ids:
        held = set().union(*ids.values()) if ids else set()
        ids["train"] = sorted(known - held)
    folder = next((place / name for name in ("JPEGImages", "images") if (place / name).is_dir()), place)
    images = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in ENDINGS}
    trees: dict[str, dict[str, ET.Element]] = {}
    for split, names in ids.items():
        trees[split] = {}
        for name in names:
            if name not in known:
                troubles.note("listed images without annotation", name)
            elif name not in images:
                troubles.note("images that are missing", f"{folder / name}.jpg")
            elif (tree := _parsed(home / f"{name}.xml", troubles)) is not None:
                trees[split][name] = tree
    if not any(trees.values()):
        raise UserError(f"{place}: none of its images is annotated")
    classes = sorted(
        {one.findtext("name", "") for split in trees.values() for tree in split.values() for one in tree.iter("object")}
    )
    label = {name: number for number, name in enumerate(classes)}
    return {
        split: Table(
            tuple(_annotated(tree, images[name], label, troubles) for name, tree in found.items()), tuple(classes)
        )
        for split, found in trees.items()
        if found
    }


def _listed(place: Path, words: tuple[str, ...]) -> list[str]:
    for word in words:
        file = place / "ImageSets" / "Main" / f"{word}.txt"
        if file.is_file():
            return [line.split()[0] for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    return []


def _parsed(file: Path, troubles: Troubles) -> ET.Element | None:
    try:
        return ET.parse(file).getroot()
    except (ET.ParseError, OSError):
        troubles.note("files that are no XML", file.name)
        return None


def _annotated(tree: ET.Element, path: Path, label: dict[str, int], troubles: Troubles) -> Annotated:
    size = _size(tree, path)
    rows, labels, difficult, where = [], [], [], []
    for one in tree.findall("object"):
        box = one.find("bndbox")
        try:
            edges = [float(box.findtext(word, "")) for word in ("xmin", "ymin", "xmax", "ymax")]  # type: ignore[union-attr]
        except (ValueError, AttributeError):
            troubles.note("things without a box", path.name)
            continue
        rows.append([edges[0] - 1, edges[1] - 1, *edges[2:]])
        labels.append(label[one.findtext("name", "")])
        difficult.append(one.findtext("difficult", "0").strip() == "1")
        where.append(path.name)
    boxes, good = sound(torch.tensor(rows).view(-1, 4), size, where, troubles)
    boxes = boxes[good]
    return Annotated(
        path,
        size,
        boxes,
        torch.tensor(labels, dtype=torch.long)[good],
        torch.tensor(difficult, dtype=torch.bool)[good],
        (boxes[:, 2:] - boxes[:, :2]).prod(dim=1),
        name=str(path),
    )


def _size(tree: ET.Element, path: Path) -> tuple[int, int]:
    try:
        height, width = (int(tree.findtext(f"size/{word}", "")) for word in ("height", "width"))
    except ValueError:
        height = width = 0
    if height > 0 and width > 0:
        return height, width
    from PIL import Image

    with Image.open(path) as image:
        return image.height, image.width
