# SPDX-License-Identifier: Apache-2.0
"""Annotated people: keypoints, boxes and areas, from COCO, COCO-WholeBody and UBody files.

References: Lin et al., Microsoft COCO, ECCV 2014; Jin et al., Whole-Body Human Pose Estimation in the Wild, ECCV 2020;
Lin et al., One-Stage 3D Whole-Body Mesh Recovery with Component Aware Transformer (UBody), CVPR 2023.
"""

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tutelage.core.error import UserError
from tutelage.core.keypoints import BODY, WHOLEBODY, Layout
from tutelage.data.annotations import Troubles, sound
from tutelage.data.folder import size_of

SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val"), "test": ("test",)}
#: What the name of a file of keypoints may hold, the best first.
NAMES = ("wholebody", "keypoint", "pose")
#: Where the points of a whole body stand, in order.
FIELDS = ("keypoints", "foot_kpts", "face_kpts", "lefthand_kpts", "righthand_kpts")
#: What people have one row each of, and what their pictures have one each of.
ROWS = ("image", "image_ids", "ids", "points", "boxes", "area")
LISTED = ("pictures", "names", "picture_ids", "sizes")
LEAST_AREA = 1.0  # square pixels: distances are divided by its root


@final
@dataclass(frozen=True)
class Uncounted:
    """People that are neither found nor missed where others are scored: crowds, and who shows no keypoint.

    Args:
        image: `[M]` int64, the picture of each.
        boxes: `[M, 4]` x1, y1, x2, y2.
        area: `[M]` square pixels.
    """

    image: Tensor
    boxes: Tensor
    area: Tensor

    @classmethod
    def of(cls, rows: Sequence[tuple[int, Sequence[float], float]] = ()) -> "Uncounted":
        """Return picture, box and area of each."""
        return cls(
            torch.tensor([image for image, _, _ in rows], dtype=torch.long),
            torch.tensor([box for _, box, _ in rows], dtype=torch.float32).view(-1, 4),
            torch.tensor([area for _, _, area in rows], dtype=torch.float32).clamp(min=LEAST_AREA),
        )


@final
@dataclass(frozen=True)
class People:
    """People in images, in the pixels of the images.

    Args:
        pictures: files, or `[3, H, W]` uint8, each once.
        names: of the pictures.
        picture_ids: of the pictures, as the annotations call them.
        sizes: (height, width) of the pictures, as annotated.
        image: `[N]` int64, the picture of each person.
        image_ids: `[N]` int64, as the annotations call it.
        ids: `[N]` int64, of the annotation.
        points: `[N, K, 3]` x, y, visibility (0 not annotated).
        boxes: `[N, 4]` x1, y1, x2, y2.
        area: `[N]` square pixels.
        layout: of the keypoints.
        uncounted: who else is there.
    """

    pictures: tuple[Path | Tensor, ...]
    names: tuple[str, ...]
    picture_ids: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...]
    image: Tensor
    image_ids: Tensor
    ids: Tensor
    points: Tensor
    boxes: Tensor
    area: Tensor
    layout: Layout
    uncounted: Uncounted = field(default_factory=Uncounted.of)

    def __len__(self) -> int:
        return len(self.ids)

    def keep(self, index: Tensor) -> "People":
        """Return these people, in this order."""
        return replace(self, **{word: getattr(self, word)[index] for word in ROWS})

    def within(self, chosen: Sequence[bool]) -> "People":
        """Return the people of some of the pictures, and these pictures alone."""
        among = torch.tensor(chosen, dtype=torch.bool)
        place = among.cumsum(0) - 1
        rows, others = among[self.image].nonzero().flatten(), among[self.uncounted.image]
        listed: dict[str, Any] = {
            word: tuple(one for one, kept in zip(getattr(self, word), chosen, strict=True) if kept) for word in LISTED
        }
        kept = replace(self.keep(rows), **listed)
        left = Uncounted(*(getattr(self.uncounted, word)[others] for word in ("image", "boxes", "area")))
        return replace(kept, image=place[kept.image], uncounted=replace(left, image=place[left.image]))

    @classmethod
    def joined(cls, parts: Sequence["People"]) -> "People":
        """Return several sets as one.

        Raises:
            UserError: if they have other keypoints.
        """
        first = parts[0]
        for part in parts:
            if part.layout != first.layout:
                raise UserError(
                    f"sets of {first.layout.name} ({len(first.layout)} keypoints) and of {part.layout.name} "
                    f"({len(part.layout)}) cannot be joined"
                )
        starts = [sum(len(part.pictures) for part in parts[:number]) for number in range(len(parts))]
        rows: dict[str, Any] = {
            word: torch.cat([getattr(part, word) for part in parts]) for word in ROWS if word != "image"
        }
        listed: dict[str, Any] = {word: tuple(one for part in parts for one in getattr(part, word)) for word in LISTED}
        image = torch.cat([part.image + start for part, start in zip(parts, starts, strict=True)])
        count = len(listed["pictures"])
        if len(set(listed["picture_ids"])) < count:  # files that count their images alike
            listed["picture_ids"], rows["image_ids"] = tuple(range(count)), image
        beside = [
            (part.uncounted.image + start, part.uncounted.boxes, part.uncounted.area)
            for part, start in zip(parts, starts, strict=True)
        ]
        return cls(
            image=image,
            layout=first.layout,
            uncounted=Uncounted(*map(torch.cat, zip(*beside, strict=True))),
            **listed,
            **rows,
        )


def files_of(root: str | Path, kind: str, given: "str | Mapping[str, str] | None" = None) -> dict[str, list[Path]]:
    """Return the annotation files of each split.

    Args:
        root: a folder, or a json file (the only split, `train`).
        kind: `coco`, `wholebody` or `ubody` (a file `keypoint_annotation.json` a scene, all of them `train`).
        given: files by split as the user says, or one file; below the root.

    Raises:
        UserError: if there is none, or no such file.
    """
    place = Path(root)
    if given is not None:
        named = {"train": given} if isinstance(given, str) else dict(given)
        for split in named:
            if split not in SPLITS:
                raise UserError(f"data.pose.annotations.{split}: splits are {', '.join(SPLITS)}")
        found = {split: [place / str(file)] for split, file in named.items()}
    elif place.is_file():
        found = {"train": [place]}
    elif kind == "ubody":
        found = {"train": sorted(place.rglob("keypoint_annotation.json"))}
    else:
        files = sorted([*place.glob("*.json"), *place.glob("*/*.json")])
        posed = [file for word in NAMES for file in files if word in file.stem.lower()]
        posed = sorted(dict.fromkeys(posed), key=lambda file: _rank(file, kind))
        found = {
            split: [next(file for file in posed if _split(file) == split)]
            for split in SPLITS
            if any(_split(file) == split for file in posed)
        }
        if not found and posed:
            found = {"train": posed[:1]}
    for file in (file for row in found.values() for file in row):
        if not file.is_file():
            raise UserError(f"data.pose.annotations: no file {file}")
    if not found.get("train"):
        wanted = "keypoint_annotation.json" if kind == "ubody" else "train and keypoints (or wholebody) in its name"
        raise UserError(f"data.source: no json file with {wanted} below {place}: say which with data.pose.annotations")
    return found


def _split(file: Path) -> str | None:
    name = file.stem.lower()
    return next((split for split, words in SPLITS.items() if any(word in name for word in words)), None)


def _rank(file: Path, kind: str) -> int:
    """Return where a file stands among those that could be meant: whole bodies first where they are asked for."""
    whole = "wholebody" in file.stem.lower()
    return 0 if whole == (kind == "wholebody") else 1


def read(
    file: Path,
    root: Path,
    troubles: Troubles,
    *,
    layout: Layout | None = None,
    sigmas: Sequence[float] | None = None,
    images: str | None = None,
    interval: int = 1,
) -> People:
    """Return the people of one annotation file.

    Crowd regions are left out, and so are people without a visible keypoint, with a word on how many.

    Args:
        file: json of COCO's format.
        root: of the set.
        troubles: told of what is wrong.
        layout: of the keypoints; None looks for the fields of COCO-WholeBody, then at the names of the category.
        sigmas: of keypoints that are no known set.
        images: folder of the images below the root, if it is none of the usual ones.
        interval: images are read whose number is a multiple of it: UBody's are frames of videos, and every tenth is
            trained on.

    Raises:
        UserError: if the file cannot be read, or none of its images is there.
    """
    rows, listed, categories = _tables(file)
    numbered = all(isinstance(image["id"], int) for image in listed)
    listed = [image for image in listed if image["id"] % interval == 0] if numbered else listed[::interval]
    if not listed:
        every = f" whose number is a multiple of {interval} (data.pose.interval)" if interval > 1 else ""
        raise UserError(f"{file} lists no images{every}")
    if not rows:
        raise UserError(f"{file} holds no annotations")
    layout = layout or _layout(file, rows, categories, sigmas)
    home = _home(file, root, images, [str(image["file_name"]) for image in listed])
    sizes: list[tuple[int, int]] = []
    number: dict[Any, int] = {}
    paths: list[Path] = []
    for image in listed:
        path = home / str(image["file_name"])
        if image["id"] in number:
            troubles.note("images with the number of another", str(image["file_name"]))
            continue
        if not path.is_file():
            troubles.note("images that are missing", str(image["file_name"]))
            continue
        try:
            sizes.append(_size(image, path))
        except (OSError, SyntaxError, ValueError):
            troubles.note("images that cannot be read", str(image["file_name"]))
            continue
        number[image["id"]] = len(paths)
        paths.append(path)
    picture_ids = tuple(number) if numbered else tuple(range(len(paths)))
    if not paths:
        raise UserError(f"{file}: none of its {len(listed)} images is there, looked in {home}")
    kept: list[tuple[int, int, NDArray[np.float32], list[float], float]] = []
    uncounted: list[tuple[int, list[float], float]] = []
    unseen = 0
    for one in rows:
        picture = number.get(one.get("image_id"))
        if picture is None:
            continue
        where = f"annotation {one.get('id')}"
        told = Troubles("") if one.get("iscrowd") else troubles  # of a crowd nothing but its place is of use
        box = _box(one, sizes[picture], where, told)
        area = None if box is None else _area(one, box, where, told)
        points = None if one.get("iscrowd") else _points(one, layout, where, troubles)
        if box is None or area is None:
            continue
        if one.get("iscrowd"):
            uncounted.append((picture, box, area))
            continue
        if points is None:
            continue
        if not (points[:, 2] > 0).any():
            unseen += 1
            uncounted.append((picture, box, area))
            continue
        own = one.get("id")
        kept.append((picture, own if isinstance(own, int) else len(kept), points, box, area))
    if unseen:
        logging.getLogger(__name__).info("%s: %d people without a visible keypoint are left out", file, unseen)
    if not kept:
        if troubles.kinds:
            raise UserError(f"{troubles.summary}; nobody with a visible keypoint is left")
        raise UserError(f"{file}: nobody in it has a visible keypoint ({unseen} of {len(rows)} have none)")
    row_image, row_id, row_points, row_box, row_area = zip(*kept, strict=True)
    return People(
        tuple(paths),
        tuple(str(path) for path in paths),
        picture_ids,
        tuple(sizes),
        torch.tensor(row_image),
        torch.tensor([picture_ids[picture] for picture in row_image]),
        torch.tensor(row_id),
        torch.from_numpy(np.stack(row_points)),
        torch.tensor(row_box, dtype=torch.float32),
        torch.tensor(row_area, dtype=torch.float32).clamp(min=LEAST_AREA),
        layout,
        Uncounted.of(uncounted),
    )


def _tables(file: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Return annotations, images and categories of a file.

    Raises:
        UserError: if it cannot be read, or has no such tables.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{file} is no json: {str(error).splitlines()[0]}") from error
    tables = []
    for word, needed in (("annotations", ("image_id",)), ("images", ("id", "file_name")), ("categories", ())):
        table = found.get(word, [] if word == "categories" else None) if isinstance(found, dict) else None
        if not isinstance(table, list) or not all(isinstance(row, dict) for row in table):
            raise UserError(f"{file} is no json of COCO: it has no list of {word}")
        lacking = next((lack for row in table for lack in needed if not isinstance(row.get(lack), (int, str))), None)
        if lacking is not None:
            raise UserError(f"{file} is no json of COCO: one of its {word} has no {lacking}")
        tables.append(table)
    return tables[0], tables[1], tables[2]


def _size(image: Mapping[str, Any], path: Path) -> tuple[int, int]:
    """Return (height, width) as annotated; where that is missing, of the file.

    Raises:
        OSError: if the file must be asked and cannot be read.
    """
    height, width = image.get("height"), image.get("width")
    if isinstance(height, int) and isinstance(width, int) and height > 0 and width > 0:
        return height, width
    return size_of(path)


def _area(one: Mapping[str, Any], box: Sequence[float], where: str, troubles: Troubles) -> float | None:
    """Return the area as annotated; without one, what a body usually has of its box."""
    given = one.get("area")
    if given is None or given == 0:
        return 0.53 * (box[2] - box[0]) * (box[3] - box[1])
    if not isinstance(given, (int, float)) or not 0 < given < 1e12:  # false for what is no number, too
        troubles.note("people whose area is no positive number", where)
        return None
    return float(given)


def _layout(
    file: Path, rows: Sequence[Mapping[str, Any]], categories: Sequence[Mapping[str, Any]], sigmas: Any
) -> Layout:
    if any("foot_kpts" in one for one in rows):
        return WHOLEBODY
    named = next((one for one in categories if one.get("keypoints")), None)
    if named is None:
        counts = {len(one["keypoints"]) // 3 for one in rows if one.get("keypoints")}
        known = Layout.of_count(counts.pop()) if len(counts) == 1 else None
        if known is None:
            raise UserError(f"{file}: no category names keypoints: say what they are with data.pose.layout")
        return known
    links = [[one - 1, other - 1] for one, other in named.get("skeleton", [])]
    names = [str(name) for name in named["keypoints"]]
    return BODY if tuple(names) == BODY.names and sigmas is None else Layout.of_names(names, sigmas, links)


def _points(one: Mapping[str, Any], layout: Layout, where: str, troubles: Troubles) -> NDArray[np.float32] | None:
    """Return `[K, 3]` x, y, visibility of each keypoint."""
    whole = layout == WHOLEBODY and "foot_kpts" in one
    given = [value for word in (FIELDS if whole else FIELDS[:1]) for value in one.get(word) or ()]
    if len(given) != 3 * len(layout):
        troubles.note(f"people whose keypoints are not {len(layout)}", f"{where} has {len(given) / 3:g}")
        return None
    try:
        points = np.array(given, dtype=np.float32).reshape(len(layout), 3)
    except (TypeError, ValueError, OverflowError):
        points = np.full((len(layout), 3), np.nan, dtype=np.float32)
    if not (np.abs(points) < 1e6).all():  # false for what is no number, too
        troubles.note("keypoints that are no numbers", where)
        return None
    return points


def _box(one: Mapping[str, Any], size: tuple[int, int], where: str, troubles: Troubles) -> list[float] | None:
    given = one.get("bbox")
    if not isinstance(given, Sequence) or len(given) != 4:
        troubles.note("people without a box", where)
        return None
    if not all(isinstance(value, (int, float)) and abs(value) < 1e9 for value in given):  # false for NaN, too
        troubles.note("boxes that are no numbers", where)
        return None
    left, top, width, height = (float(value) for value in given)
    corners = torch.tensor([[left, top, left + width, top + height]])
    boxes, good = sound(corners, size, [where], troubles)
    return list(boxes[0].tolist()) if bool(good) else None


def _home(file: Path, root: Path, images: str | None, names: Sequence[str]) -> Path:
    """Return the folder in which the images lie: the first of the usual ones that has the first images."""
    base = root if root.is_dir() else root.parent
    if images is not None:
        return base / images
    words = SPLITS.get(_split(file) or "", ())
    own = [f"{word}{year}" for word in words for year in ("", "2017")]
    folders = [base, base / "images", *(base / name for name in own), *(base / "images" / name for name in own)]
    folders += [file.parent, base / "images" / file.parent.name, file.parent.parent / "images" / file.parent.name]
    return next((one for one in folders if any((one / name).is_file() for name in names[:16])), base)


def detections(file: str | Path) -> Iterator[tuple[str, list[float], float]]:
    """Yield image, box x1, y1, x2, y2 and score of people that a detector found.

    The image is its file's name without folders and ending, or its number as text.

    Args:
        file: COCO results (rows of `image_id`, `bbox` as x, y, width, height, and `score`), or `answers.json` that
            `tutelage predict` wrote for a detector; of the latter, what is called `person`, or everything where
            nothing is.

    Boxes without area are left out.

    Raises:
        UserError: if it is neither, naming the first row that is not as it should be.
    """
    try:
        rows = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"data.pose.boxes: {file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"data.pose.boxes: {file} is no json: {str(error).splitlines()[0]}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"data.pose.boxes: {file} is neither COCO results nor a detector's answers, both lists of rows")
    answers = any("boxes" in row for row in rows)
    for number, row in enumerate(rows):
        try:
            found = _answered(row) if answers else _result(row)
            for image, box, score in found:
                left, top, right, bottom = torch.tensor([*map(float, box)]).tolist()
                if not all(map(math.isfinite, (left, top, right, bottom, float(score)))):
                    raise ValueError("a box or a score is no number")
                if right > left and bottom > top:
                    yield Path(image).stem, [left, top, right, bottom], float(score)
        except (ValueError, KeyError, TypeError) as error:
            what = f"it has no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
            raise UserError(
                f"data.pose.boxes: row {number} of {file} is none of COCO results or of a detector's answers ({what})"
            ) from error


def _result(row: Mapping[str, Any]) -> list[tuple[str, Sequence[float], float]]:
    """Return the person of a row of COCO results, if it is one."""
    if row.get("category_id", 1) != 1:
        return []
    left, top, width, height = (float(value) for value in row["bbox"])
    image = row["file_name"] if "file_name" in row else row["image_id"]
    return [(str(image), (left, top, left + width, top + height), row.get("score", 1.0))]


def _answered(row: Mapping[str, Any]) -> list[tuple[str, Sequence[float], float]]:
    """Return the people of a row of a detector's answers."""
    boxes = row["boxes"]
    names = row.get("names") or ["person"] * len(boxes)
    scores = row.get("scores") or [1.0] * len(boxes)
    if not len(boxes) == len(names) == len(scores):
        raise ValueError(f"{len(boxes)} boxes, {len(names)} names and {len(scores)} scores")
    whole = "person" not in names
    found = zip(names, boxes, scores, strict=True)
    return [(str(row["image"]), box, score) for name, box, score in found if whole or name == "person"]
