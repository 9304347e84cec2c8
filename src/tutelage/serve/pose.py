# SPDX-License-Identifier: Apache-2.0
"""Two-stage pose in ONNX Runtime: a detector finds people, a pose model their keypoints. PyTorch is not imported.

    python -m tutelage.serve.pose pose.onnx images/ --detector detector.onnx --out drawn/

It prints what it draws and writes, and how many images it does in a second.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
from numpy.typing import NDArray

from tutelage.data.video import decoded, is_video
from tutelage.functional import openpose
from tutelage.serve import simcc, yolox

Array = NDArray[np.floating]
#: How a model wants its pixels: in [0, 1], with RTMPose's normalisation, or by the name of its input: `pixels` is what
#: this library exports, any other name what others publish.
Pixels = Literal["auto", "unit", "normalised"]
IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
COLOURS = ((255, 0, 0), (255, 160, 0), (220, 255, 0), (0, 220, 80), (0, 200, 255), (60, 60, 255), (200, 0, 255))
PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")  # the first that is there
SHOWN = 0.3  # score from which a point is drawn


def _session(path: str | Path) -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise ValueError("ONNX Runtime is missing: pip install onnxruntime") from None
    if not Path(path).is_file():
        raise ValueError(f"no file {path}")
    try:
        there = onnxruntime.get_available_providers()
        return onnxruntime.InferenceSession(str(path), providers=[one for one in PROVIDERS if one in there])
    except Exception as error:  # its errors share no class
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


@final
class PeopleDetector:
    """A detector of people: one that this library exported, or a YOLOX whose answers are raw, as published for DWPose.

    An exported one takes `[1, 3, H, W]` pixels in [0, 1] and answers with `boxes`, `scores` and `labels`; YOLOX takes
    pixels in [0, 255] and answers with `[1, A, 5 + C]`.

    Args:
        path: the ONNX file.
        least: score that a person must exceed.
        person: number of the class.
        bgr: a YOLOX wants blue, green, red, as it was trained.

    Raises:
        ValueError: if the file cannot be used.
    """

    def __init__(self, path: str | Path, *, least: float = 0.3, person: int = 0, bgr: bool = True) -> None:
        self.session, self.least, self.person, self.bgr = _session(path), least, person, bgr
        first, outputs = self.session.get_inputs()[0], [one.name for one in self.session.get_outputs()]
        if len(first.shape) != 4:
            raise ValueError(f"{path} is no detector: wanted is one input [1, 3, H, W]")
        height, width = first.shape[2:]
        if not (isinstance(height, int) and isinstance(width, int)):
            height, width = 640, 640
        self.name, self.size = first.name, (height, width)
        self.settled = outputs[:3] == ["boxes", "scores", "labels"]
        if not self.settled and len(outputs) != 1:
            raise ValueError(f"{path} is no detector: wanted are boxes, scores and labels, or the raw answers of YOLOX")

    def __call__(self, image: NDArray[np.uint8]) -> Array:
        """Return boxes `[P, 4]` x1, y1, x2, y2 of the people in an image `[H, W, 3]`, red first."""
        if self.settled:
            padded, ratio = yolox.letterbox(image, self.size, fill=0)
            boxes, scores, labels = self.session.run(None, {self.name: padded[None] / np.float32(255)})[:3]
            return simcc.with_area(boxes[(scores > self.least) & (labels == self.person)] / ratio)
        padded, ratio = yolox.letterbox(image[:, :, ::-1] if self.bgr else image, self.size)
        raw = self.session.run(None, {self.name: padded[None]})[0]
        rows, scores = yolox.corners(yolox.decoded(raw[0], self.size), ratio)
        return simcc.with_area(yolox.people(yolox.detections(rows, scores), least=self.least, person=self.person))


@final
class PoseModel:
    """A pose model with two outputs, logits of x and of y.

    Args:
        path: the ONNX file; its input is `[B, 3, H, W]`.
        pixels: what it takes; see `Pixels`.
        padding: factor on boxes; it must be that of training.
        split: bins a pixel.

    Raises:
        ValueError: if the file cannot be used.
    """

    def __init__(self, path: str | Path, *, pixels: Pixels = "auto", padding: float = 1.25, split: float = 2.0) -> None:
        self.session, self.padding, self.split = _session(path), padding, split
        first = self.session.get_inputs()[0]
        batch, _, height, width = first.shape
        if not (isinstance(height, int) and isinstance(width, int)) or len(self.session.get_outputs()) != 2:
            raise ValueError(f"{path} is no pose model: wanted are one input [B, 3, H, W] and two outputs, x and y")
        self.name, self.size, self.one = first.name, (height, width), batch == 1
        normalised = pixels == "normalised" or (pixels == "auto" and first.name != "pixels")
        self.mean = np.array(simcc.MEAN if normalised else (0.0,), np.float32)
        self.std = np.array(simcc.STD if normalised else (255.0,), np.float32)

    def __call__(self, image: NDArray[np.uint8], boxes: Array) -> tuple[Array, Array]:
        """Return points `[P, K, 2]` in the pixels of an image `[H, W, 3]`, red first, and scores `[P, K]`.

        Args:
            image: uint8.
            boxes: `[P, 4]`; without any the whole image is one box.
        """
        boxes = boxes if len(boxes) else simcc.whole(image)
        centre, sides = simcc.enlarged(boxes, self.padding)
        sides = simcc.widened(sides, self.size)
        found = simcc.crops(image, simcc.warp(centre, sides, self.size), self.size)
        given = np.ascontiguousarray(((found - self.mean) / self.std).transpose(0, 3, 1, 2))
        rows = [given[n : n + 1] for n in range(len(given))] if self.one else [given]
        answers = [self.session.run(None, {self.name: one}) for one in rows]
        x, y = (np.concatenate([one[axis] for one in answers]) for axis in (0, 1))
        points, scores = simcc.peaks(x, y, self.split)
        return simcc.to_image(points, centre, sides, self.size), scores


@final
@dataclass
class TwoStage:
    """A detector and a pose model, and the time they took.

    Args:
        pose: finds keypoints.
        detector: finds people; None takes each image as one person's box.
        seconds: of each part, summed.
        images: how many were seen.
    """

    pose: PoseModel
    detector: PeopleDetector | None = None
    seconds: dict[str, float] = field(default_factory=lambda: {"detector": 0.0, "pose": 0.0})
    images: int = 0

    def __call__(self, image: NDArray[np.uint8]) -> tuple[Array, Array, Array]:
        """Return points `[P, K, 2]`, scores `[P, K]` and boxes `[P, 4]` of the people in an image `[H, W, 3]`."""
        begun = time.perf_counter()
        boxes = self.detector(image) if self.detector is not None else np.zeros((0, 4))
        between = time.perf_counter()
        points, scores = self.pose(image, boxes)
        self.seconds["detector"] += between - begun
        self.seconds["pose"] += time.perf_counter() - between
        self.images += 1
        return points, scores, boxes if len(boxes) else simcc.whole(image)

    @property
    def speed(self) -> str:
        """Images in a second, in words."""
        total = max(sum(self.seconds.values()), 1e-9)
        parts = ", ".join(f"{name} {1000 * s / max(self.images, 1):.1f} ms" for name, s in self.seconds.items())
        return f"{self.images} images, {self.images / total:.1f} a second ({parts} an image)"


def results(image_id: str, points: Array, scores: Array, boxes: Array) -> list[dict[str, Any]]:
    """Return people as rows of COCO's keypoint results."""
    rows = np.concatenate([points, scores[..., None]], -1).reshape(len(points), -1)
    high = scores > 0.2
    mean = (scores * high).sum(1) / np.maximum(high.sum(1), 1)
    return [
        {
            "image_id": int(image_id) if image_id.isdigit() else image_id,
            "category_id": 1,
            "keypoints": [round(float(value), 3) for value in row],
            "score": round(float(score), 4),
            "bbox": [round(float(v), 2) for v in (x1, y1, x2 - x1, y2 - y1)],
        }
        for row, score, (x1, y1, x2, y2) in zip(rows, mean, boxes, strict=True)
    ]


def links(count: int, *, neck: bool = False) -> tuple[tuple[int, int], ...]:
    """Return the lines of a drawing: of a body with so many keypoints, 17 or 133.

    Args:
        count: keypoints, without the neck.
        neck: in OpenPose's order.
    """
    body = ((15, 13), (13, 11), (16, 14), (14, 12), (11, 12), (5, 11), (6, 12), (5, 6), (5, 7), (6, 8), (7, 9), (8, 10))
    found: tuple[tuple[int, int], ...] = (*body, (1, 2), (0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6))
    if count == 133:
        found += ((15, 17), (15, 18), (15, 19), (16, 20), (16, 21), (16, 22))
        for root in (91, 112):
            for finger in range(5):
                first = root + 1 + 4 * finger
                found += ((root, first), (first, first + 1), (first + 1, first + 2), (first + 2, first + 3))
    return openpose.links(found) if neck else found


def drawn(image: NDArray[np.uint8], points: Array, scores: Array, lines: Sequence[tuple[int, int]]) -> Any:
    """Return a picture with skeletons, as Pillow has it."""
    from PIL import Image, ImageDraw

    picture = Image.fromarray(image)
    pen = ImageDraw.Draw(picture)
    width = max(1, round(min(image.shape[:2]) * 0.005))
    for person, score in zip(points, scores, strict=True):
        for number, (one, other) in enumerate(lines):
            if score[one] >= SHOWN and score[other] >= SHOWN:
                ends = [*map(float, person[one]), *map(float, person[other])]
                pen.line(ends, COLOURS[number % len(COLOURS)], width)
        for (x, y), there in zip(person, score >= SHOWN, strict=True):
            if there:
                pen.ellipse([x - width, y - width, x + width, y + width], (255, 255, 255))
    return picture


def frames(place: Path) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Yield names and pictures `[H, W, 3]` of an image, of the images of a folder, or of a video's frames.

    Raises:
        ValueError: if there is nothing, or a video cannot be read here.
    """
    from PIL import Image

    if is_video(place):
        yield from ((f"{place.stem}-{number:06d}", image) for number, image in enumerate(decoded(place)))
        return
    files = sorted(one for one in place.iterdir() if one.suffix.lower() in IMAGES) if place.is_dir() else [place]
    if not files or not files[0].is_file():
        raise ValueError(f"no images in {place}")
    for file in files:
        try:
            with Image.open(file) as found:
                yield file.stem, np.asarray(found.convert("RGB"))
        except OSError as error:
            print(f"{file}: {error}: left out", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the two stages over images; return the exit code."""
    parser = argparse.ArgumentParser(prog="tutelage.serve.pose", description="Two-stage pose in ONNX Runtime.")
    parser.add_argument("pose", type=Path, help="ONNX file of the pose model")
    parser.add_argument("images", type=Path, help="an image, a folder of images or frames, or a video")
    parser.add_argument("--detector", type=Path, help="ONNX file of a detector; without it an image is one person")
    parser.add_argument("--person", type=int, default=0, help="number of the detector's class for people")
    parser.add_argument("--out", type=Path, help="folder for drawings and coco.json")
    parser.add_argument("--openpose", action="store_true", help="OpenPose's order, with the neck")
    parser.add_argument("--pixels", choices=("auto", "unit", "normalised"), default="auto")
    asked = parser.parse_args(arguments)
    try:
        detector = PeopleDetector(asked.detector, person=asked.person) if asked.detector is not None else None
        engine = TwoStage(PoseModel(asked.pose, pixels=asked.pixels), detector)
        rows: list[dict[str, Any]] = []
        for name, image in frames(asked.images):
            points, scores, boxes = engine(image)
            lines = links(points.shape[1], neck=asked.openpose)
            if asked.openpose:
                points, scores = simcc.to_openpose(points, scores)
            rows += results(name, points, scores, boxes)
            if asked.out is not None:
                asked.out.mkdir(parents=True, exist_ok=True)
                drawn(image, points, scores, lines).save(asked.out / f"{name}.png")
        if asked.out is not None:
            (asked.out / "coco.json").write_text(json.dumps(rows) + "\n", encoding="utf-8")
        print(f"{len(rows)} people; {engine.speed}")
    except ValueError as error:
        print(f"tutelage.serve.pose: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
