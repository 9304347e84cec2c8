# SPDX-License-Identifier: Apache-2.0
"""Annotated people: keypoints, boxes and areas, from COCO, COCO-WholeBody and UBody files.

References: Lin et al., Microsoft COCO, ECCV 2014; Jin et al., Whole-Body Human Pose Estimation in the Wild, ECCV 2020;
Lin et al., One-Stage 3D Whole-Body Mesh Recovery with Component Aware Transformer (UBody), CVPR 2023.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from tutelage.core.error import UserError
from tutelage.core.keypoints import BODY, WHOLEBODY, Layout
from tutelage.data.annotations import Troubles, sound

SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val"), "test": ("test",)}
#: What the name of a file of keypoints may hold, the best first.
NAMES = ("wholebody", "keypoint", "pose")
#: Where the points of a whole body stand, in order.
FIELDS = ("keypoints", "foot_kpts", "face_kpts", "lefthand_kpts", "righthand_kpts")
#: What people have one row each of.
ROWS = ("image", "image_ids", "ids", "points", "boxes", "area")
LEAST_AREA = 1.0  # square pixels: distances are divided by its root


@final
@dataclass(frozen=True)
class People:
    """People in images, in the pixels of the images.

    Args:
        pictures: files, or `[3, H, W]` uint8, each once.
        names: of the pictures.
        image: `[N]` int64, the picture of each person.
        image_ids: `[N]` int64, as the annotations call it.
        ids: `[N]` int64, of the annotation.
        points: `[N, K, 3]` x, y, visibility (0 not annotated).
        boxes: `[N, 4]` x1, y1, x2, y2.
        area: `[N]` square pixels.
        layout: of the keypoints.
    """

    pictures: tuple[Path | Tensor, ...]
    names: tuple[str, ...]
    image: Tensor
    image_ids: Tensor
    ids: Tensor
    points: Tensor
    boxes: Tensor
    area: Tensor
    layout: Layout

    def __len__(self) -> int:
        return len(self.ids)

    def keep(self, index: Tensor) -> "People":
        """Return these people, in this order."""
        return replace(self, **{word: getattr(self, word)[index] for word in ROWS})

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
        rows = {word: torch.cat([getattr(part, word) for part in parts]) for word in ROWS if word != "image"}
        return cls(
            pictures=tuple(picture for part in parts for picture in part.pictures),
            names=tuple(name for part in parts for name in part.names),
            image=torch.cat([part.image + start for part, start in zip(parts, starts, strict=True)]),
            layout=first.layout,
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
        interval: of the images in order of the file, every so many is read: UBody's are frames of videos.

    Raises:
        UserError: if the file cannot be read, or none of its images is there.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        rows, listed = found["annotations"], found["images"][::interval]
        categories = found.get("categories", [])
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise UserError(f"{file} is no json of COCO: {what}") from error
    layout = layout or _layout(file, rows, categories, sigmas)
    home = _home(file, root, images, [str(image["file_name"]) for image in listed])
    size: dict[Any, tuple[int, int]] = {}
    number: dict[Any, int] = {}
    paths: list[Path] = []
    for image in listed:
        path = home / str(image["file_name"])
        if not path.is_file():
            troubles.note("images that are missing", str(image["file_name"]))
            continue
        number[image["id"]] = len(paths)
        size[image["id"]] = (int(image["height"]), int(image["width"]))
        paths.append(path)
    if not paths:
        raise UserError(f"{file}: none of its {len(listed)} images is there, looked in {home}")
    kept: list[tuple[int, int, int, list[float], list[float], float]] = []
    unseen = 0
    for one in rows:
        if one.get("image_id") not in number or one.get("iscrowd"):
            continue
        where = f"annotation {one.get('id')}"
        points = _points(one, layout, where, troubles)
        box = _box(one, size[one["image_id"]], where, troubles)
        if points is None or box is None:
            continue
        if not any(visibility > 0 for visibility in points[2::3]):
            unseen += 1
            continue
        area = float(one.get("area") or 0.53 * (box[2] - box[0]) * (box[3] - box[1]))
        kept.append((number[one["image_id"]], one["image_id"], int(one.get("id", len(kept))), points, box, area))
    if unseen:
        logging.getLogger(__name__).info("%s: %d people without a visible keypoint are left out", file, unseen)
    if not kept:
        raise UserError(f"{file}: nobody in it has a visible keypoint ({unseen} of {len(rows)} have none)")
    row_image, row_image_id, row_id, row_points, row_box, row_area = zip(*kept, strict=True)
    return People(
        tuple(paths),
        tuple(str(path) for path in paths),
        torch.tensor(row_image),
        torch.tensor(row_image_id),
        torch.tensor(row_id),
        torch.tensor(row_points, dtype=torch.float32).view(len(kept), len(layout), 3),
        torch.tensor(row_box, dtype=torch.float32),
        torch.tensor(row_area, dtype=torch.float32).clamp(min=LEAST_AREA),
        layout,
    )


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


def _points(one: Mapping[str, Any], layout: Layout, where: str, troubles: Troubles) -> list[float] | None:
    """Return x, y, visibility of each keypoint in one row."""
    whole = layout == WHOLEBODY and "foot_kpts" in one
    points = [float(v) for word in (FIELDS if whole else FIELDS[:1]) for v in one.get(word) or ()]
    if len(points) != 3 * len(layout):
        troubles.note(f"people whose keypoints are not {len(layout)}", f"{where} has {len(points) / 3:g}")
        return None
    if not all(abs(value) < 1e6 for value in points):  # false for what is no number, too
        troubles.note("keypoints that are no numbers", where)
        return None
    return points


def _box(one: Mapping[str, Any], size: tuple[int, int], where: str, troubles: Troubles) -> list[float] | None:
    given = one.get("bbox")
    if not isinstance(given, Sequence) or len(given) != 4:
        troubles.note("people without a box", where)
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

    Raises:
        UserError: if it is neither.
    """
    try:
        rows = json.loads(Path(file).read_text(encoding="utf-8"))
        if any("boxes" in row for row in rows):
            for row in rows:
                names = row.get("names") or ["person"] * len(row["boxes"])
                scores = row.get("scores") or [1.0] * len(names)
                whole = "person" not in names
                for name, box, score in zip(names, row["boxes"], scores, strict=True):
                    if whole or name == "person":
                        yield Path(row["image"]).stem, [float(edge) for edge in box], float(score)
            return
        for row in rows:
            if row.get("category_id", 1) != 1:
                continue
            left, top, width, height = (float(value) for value in row["bbox"])
            image = row.get("file_name", row["image_id"])
            yield Path(str(image)).stem, [left, top, left + width, top + height], float(row.get("score", 1.0))
    except OSError as error:
        raise UserError(f"data.pose.boxes: {file} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"data.pose.boxes: {file} is neither COCO results nor a detector's answers ({error})"
        ) from error
