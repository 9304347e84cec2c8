# SPDX-License-Identifier: Apache-2.0
"""Keypoints of one person a crop: classification of each coordinate, AP by object keypoint similarity."""

import contextlib
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from tutelage.core import Batch, Model
from tutelage.core.card import Averages
from tutelage.core.error import UserError, nearest
from tutelage.core.keypoints import WHOLEBODY, Layout
from tutelage.core.picture import Picture
from tutelage.functional import openpose
from tutelage.functional.simcc import decode, decode_dark, encode, simcc_kl, unflip

#: Keypoint scores below this do not count into a person's score.
COUNTED = 0.2
#: Radius of a drawn point of the body and beyond it, and width of a line, as shares of the image's shorter side.
POINT, SMALL_POINT, LINE = 0.006, 0.002, 0.005
#: What a batch says of all people of its images, where the boxes are a detector's.
EVERYBODY = ("everybody", "everybody_box", "everybody_area", "everybody_image")
COLOURS = (
    *((255, 0, 0), (255, 128, 0), (255, 220, 0), (128, 255, 0), (0, 220, 0), (0, 255, 160), (0, 220, 255)),
    *((0, 110, 255), (60, 0, 255), (160, 0, 255), (255, 0, 220), (255, 0, 110)),
)


def oks(found: Tensor, truth: Tensor, area: Tensor, sigmas: Tensor) -> Tensor:
    """Return the object keypoint similarity of found and true people, one to one.

        OKS = mean over annotated k of exp( -d_k^2 / (8 sigma_k^2 area) )

    Args:
        found: `[..., K, 2]` x, y.
        truth: `[..., K, 3]` x, y, visibility; 0 is not annotated.
        area: `[...]` square pixels of the person.
        sigmas: `[K]`.

    Returns:
        `[...]` in [0, 1]; 0 for people without an annotated keypoint.

    Example:
        >>> truth = torch.tensor([[0.0, 0.0, 2.0], [9.0, 9.0, 0.0]])
        >>> oks(torch.zeros(2, 2), truth, torch.tensor(4.0), torch.ones(2))
        tensor(1.)

    Reference: COCO keypoint evaluation, cocodataset.org.
    """
    shown = truth[..., 2] > 0
    gap = (found - truth[..., :2]).square().sum(-1)
    near = torch.exp(-gap / (8 * sigmas.square() * area[..., None]))
    return (near * shown).sum(-1) / shown.sum(-1).clamp(min=1)


def to_openpose(points: Tensor, scores: Tensor, threshold: float = 0.3) -> tuple[Tensor, Tensor]:
    """Return keypoints in OpenPose's order, with a neck between the shoulders.

    Convention:
        - the neck is the mean of the shoulders; its score is 1 if both of theirs exceed the threshold, else 0
        - the points beyond the body stand one place later

    Args:
        points: `[..., K, 2]`, K at least 17.
        scores: `[..., K]`.
        threshold: of the shoulders.

    Returns:
        `[..., K + 1, 2]` and `[..., K + 1]`.
    """
    left, right = openpose.SHOULDERS
    neck = (points[..., left, :] + points[..., right, :]) / 2
    there = ((scores[..., left] > threshold) & (scores[..., right] > threshold)).to(scores.dtype)
    split = openpose.NECK
    points = torch.cat([points[..., :split, :], neck[..., None, :], points[..., split:, :]], -2)
    scores = torch.cat([scores[..., :split], there[..., None], scores[..., split:]], -1)
    order = list(openpose.order(points.shape[-2] - 1))
    return points[..., order, :], scores[..., order]


@final
@dataclass(frozen=True)
class Skeletons:
    """The people found in one image, or the truth about them.

    Args:
        points: `[M, K, 2]` x, y in the pixels of the image.
        scores: `[M, K]`.
        boxes: `[M, 4]` x1, y1, x2, y2 that they were looked for in.
        links: pairs that are joined.
        shown: score from which a point is drawn.
    """

    points: Tensor
    scores: Tensor
    boxes: Tensor
    links: tuple[tuple[int, int], ...]
    shown: float = 0.3

    @property
    def person_scores(self) -> Tensor:
        """`[M]`, see `person_score`."""
        return person_score(self.scores)

    def plain(self) -> dict[str, Any]:
        """Return the people as rows of COCO's keypoint results: x, y, score of each point, one after the other."""
        rows = torch.cat([self.points, self.scores[..., None]], -1).flatten(1).tolist()
        return {
            "people": [
                {
                    "category_id": 1,
                    "keypoints": [round(value, 3) for value in row],
                    "score": round(score, 4),
                    "bbox": [round(v, 2) for v in (x1, y1, x2 - x1, y2 - y1)],
                }
                for row, score, (x1, y1, x2, y2) in zip(
                    rows, self.person_scores.tolist(), self.boxes.tolist(), strict=True
                )
            ]
        }

    def draw(self, image: Tensor) -> Tensor:
        """Return a copy of an image `[3, H, W]` uint8 with lines and points on it."""
        from PIL import Image, ImageDraw

        # torchvision's draw_keypoints paints every line white
        picture = Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
        pen = ImageDraw.Draw(picture)
        side = min(image.shape[1:])
        width, radii = max(1, round(side * LINE)), (max(1.0, side * POINT), max(0.5, side * SMALL_POINT))
        seen = (self.scores >= self.shown).tolist()
        for person, there in zip(self.points.tolist(), seen, strict=True):
            for number, (one, other) in enumerate(self.links):
                if there[one] and there[other]:
                    pen.line([*person[one], *person[other]], COLOURS[number % len(COLOURS)], width)
            for number, (x, y) in enumerate(person):
                if there[number]:
                    r = radii[number >= openpose.NECK + 1]
                    pen.ellipse([x - r, y - r, x + r, y + r], (255, 255, 255))
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).to(image.device)


def person_score(scores: Tensor) -> Tensor:
    """Return `[M]` mean of the keypoint scores above a threshold, 0 where none is."""
    high = scores > COUNTED
    return (scores * high).sum(-1) / high.sum(-1).clamp(min=1)


def parts_of(layout: Layout) -> tuple[str, ...]:
    """Return the names of the parts that are scored by themselves; of one part there is nothing to say but `ap`."""
    if len(layout.parts) < 2:
        return ()
    return (*layout.parts, *(("hand", "whole") if "left_hand" in layout.parts else ()))


@final
class Pose:
    """One person a crop. A model answers with raw logits `(x [B, K, Wx], y [B, K, Wy])`.

    The loss is RTMPose's: the mean over annotated people of the divergence of `simcc_kl`, times `batch`, for the
    published loss is a sum over the people of one process and its ratio to other losses depends on their number.

    Args:
        num_keypoints: K; None takes what the model gives.
        layout: of the keypoints; None takes the known set with so many.
        beta: multiplies logits and labels.
        split: bins a pixel.
        sigma: of the labels of x and y in bins; None is sqrt(side / 8), as published for both input sizes.
        batch: people whose losses the published code sums.
        flip: images are scored mirrored, too, and the logits averaged.
        dark: refine points between bins.
        openpose: pictures have OpenPose's order, with a neck.
        shown: score from which a point is drawn.
        headline: the score by which runs are compared: `ap`, or that of a part, such as `body`.

    Raises:
        UserError: if an option makes no sense.
    """

    name = "pose"
    averages: Averages = "labelled"
    provides: tuple[str, ...] = ("stem", "stages", "map", "logits.x", "logits.y")

    def __init__(
        self,
        num_keypoints: int | None = None,
        *,
        layout: str | Mapping[str, Any] | None = None,
        beta: float = 10.0,
        split: float = 2.0,
        sigma: tuple[float, float] | None = None,
        batch: float = 64.0,
        flip: bool = True,
        dark: bool = False,
        openpose: bool = False,
        shown: float = 0.3,
        headline: str = "ap",
    ) -> None:
        for word, value in (("beta", beta), ("split", split), ("batch", batch)):
            if not value > 0:
                raise UserError(f"{word} must be > 0, not {value}")
        self.layout = Layout.parse(layout) if layout is not None else None
        self.num_keypoints = num_keypoints or (len(self.layout) if self.layout else None)
        if self.layout is None and self.num_keypoints is not None:
            self.layout = Layout.of_count(self.num_keypoints)
        if self.layout is not None and len(self.layout) != self.num_keypoints:
            raise UserError(f"the layout has {len(self.layout)} keypoints, and num_keypoints is {self.num_keypoints}")
        if openpose and self.layout is not None and "body" not in self.layout.parts:
            raise UserError("openpose needs the 17 keypoints of COCO's body first")
        scored = ("ap", *parts_of(self.layout or WHOLEBODY))
        if headline not in scored:
            raise UserError(f"headline: these keypoints have no score {headline!r}{nearest(headline, scored)}")
        self.beta, self.split, self.batch = beta, split, batch
        self.sigma = (float(sigma[0]), float(sigma[1])) if sigma is not None else None
        self.flip, self.dark, self.openpose, self.shown = flip, dark, openpose, shown
        self.headline = headline

    def call(self, model: Model, batch: Batch) -> Any:
        """Return the model's logits of x and y."""
        return model(batch.inputs)

    def logits(self, output: Any) -> None:
        """There is no one tensor of scores: terms read `logits.x` and `logits.y`."""
        return

    def loss(self, output: Any, batch: Batch) -> Tensor:
        """Return the loss averaged over annotated people, times `batch`; a connected zero if there are none.

        Raises:
            UserError: if the model has other keypoints or bins than the data asks for.
        """
        x, y = self._axes(output, batch)
        size = (batch.inputs.shape[2], batch.inputs.shape[3])
        label_x, label_y, weight = encode(
            batch.target[..., :2], batch.target[..., 2], size, sigma=self._sigma(size), split=self.split
        )
        if x.shape != label_x.shape or y.shape != label_y.shape:
            given, asked = ([list(one.shape[1:]) for one in pair] for pair in ((x, y), (label_x, label_y)))
            raise UserError(
                f"the model gives logits {given}; crops of {size[0]} x {size[1]} with {batch.target.shape[1]} "
                f"keypoints ask for {asked}"
            )
        rows = simcc_kl(x, y, label_x, label_y, weight, beta=self.beta).where(batch.labelled, 0.0)
        return self.batch * rows.sum() / batch.labelled.sum().clamp(min=1)

    def _sigma(self, size: tuple[int, int]) -> tuple[float, float]:
        # the published 4.9 and 5.66 of 192 x 256, and 6.0 and 6.93 of 288 x 384
        return self.sigma or (round((size[1] / 8) ** 0.5, 2), round((size[0] / 8) ** 0.5, 2))

    def _axes(self, output: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        if not (isinstance(output, (tuple, list)) and len(output) == 2):
            raise UserError("pose needs logits of x and of y, two tensors [B, K, bins]: is it a pose model?")
        x, y = output
        if self.num_keypoints is not None and x.shape[1] != self.num_keypoints:
            raise UserError(f"the model has {x.shape[1]} keypoints, the data {self.num_keypoints}")
        return x, y

    # --- evaluation --------------------------------------------------------------------------------------

    def answer(self, model: Model, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return a model's logits as they are scored: averaged with those of the mirrored crops, where `flip` is on."""
        x, y = self._axes(self.call(model, batch), batch)
        if not self.flip or self.layout is None:
            return x, y
        swap = torch.tensor(self.layout.swap, device=x.device)
        mirrored = model(batch.inputs.flip(3))
        again_x, again_y = unflip(mirrored[0], mirrored[1], swap)
        return (x + again_x) / 2, (y + again_y) / 2

    def points(self, output: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return `[B, K, 2]` points in the pixels of the images, and `[B, K]` scores."""
        x, y = self._axes(output, batch)
        if self.dark:
            size = (batch.inputs.shape[2], batch.inputs.shape[3])
            points, scores = decode_dark(x.float(), y.float(), sigma=self._sigma(size), split=self.split)
        else:
            points, scores = decode(x.float(), y.float(), split=self.split)
        matrix = batch.extra["matrix"].to(points)
        return points @ matrix[:, :, :2].mT + matrix[:, None, :, 2], scores

    def score(self, answers: Iterable[tuple[Any, Batch]]) -> dict[str, float]:
        """Return `ap`, `ap50`, `ap75` and `ar` of all keypoints, the mean similarity `oks`, and the loss.

        Of a whole body also the AP of its parts: `body`, `foot`, `face`, `hand` (the mean of both hands) and `whole`,
        which is `ap` by the name papers give it. AP is COCO's, with the people's annotated boxes. Where the boxes are
        a detector's, a person's score is the box's times that of the keypoints, the worse of two people of one
        similarity goes, and there is neither `oks` nor loss.

        Raises:
            UserError: if nobody is annotated.
        """
        rows: dict[str, list[Tensor]] = {}
        losses, count, detected = 0.0, 0, False
        for output, batch in answers:
            points, scores = self.points(output, batch)
            kept, extra = batch.labelled, batch.extra
            detected = "everybody" in extra
            own = person_score(scores)
            words = EVERYBODY if detected else ("truth", "box", "area", "image_id")
            truth = [extra[word] if detected else extra[word][kept] for word in words]
            given = {
                **{"points": points[kept], "scores": (own * extra["box_score"] if detected else own)[kept]},
                **{"images": extra["image_id"][kept], "sizes": _cut_out(batch)[kept]},
                **dict(zip(("truth", "boxes", "area", "truth_images"), truth, strict=True)),
            }
            for word, tensor in given.items():
                rows.setdefault(word, []).append(tensor.cpu())
            losses += float(self.loss(output, batch)) * int(kept.sum())
            count += int(kept.sum())
        if not count:
            raise UserError("nothing to score: nobody is annotated in this split")
        found = {word: torch.cat(parts) for word, parts in rows.items()}
        layout = self.layout or Layout.of_count(found["points"].shape[1])
        if layout is None:
            raise UserError(f"{found['points'].shape[1]} keypoints are no known set: give sigmas (data.pose.sigmas)")
        sigmas, sizes = torch.tensor(layout.sigmas), found.pop("sizes")
        people = Scored(**found)
        if detected:
            people = people.kept(distinct(people, sizes, sigmas))
        parts = {"": slice(None)}
        if len(layout.parts) > 1:
            parts |= {name: slice(*span) for name, span in layout.parts.items()}
        table = {name: average_precision(people.part(span), sigmas[span]) for name, span in parts.items()}
        result = table.pop("")
        if not detected:
            result["oks"] = float(oks(people.points, people.truth, people.area, sigmas).mean())
        for name, one in table.items():
            result[name] = one["ap"]
        if "left_hand" in result:
            result["hand"] = (result["left_hand"] + result["right_hand"]) / 2
            result["whole"] = result["ap"]
        return result if detected else {**result, "loss": losses / count}

    # --- pictures ----------------------------------------------------------------------------------------

    def pictures(self, output: Any, batch: Batch) -> list[Picture]:
        """Return the people found in each image, in the pixels of the image as it lies on disk."""
        points, scores = self.points(output, batch)
        return self._by_image(points, scores, batch)

    def truths(self, batch: Batch) -> list[Picture]:
        """Return what the data says of each image."""
        matrix = batch.extra["matrix"]
        points = batch.target[..., :2] @ matrix[:, :, :2].mT + matrix[:, None, :, 2]
        return self._by_image(points, batch.target[..., 2], batch)

    def coco(self, answers: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return plain answers by image file as COCO's keypoint results; an image of a number is called by it."""
        stems = {path: Path(path).stem for path in answers}
        return [
            {"image_id": int(stems[path]) if stems[path].isdigit() else stems[path], **person}
            for path, found in answers.items()
            for person in found["people"]
        ]

    def _by_image(self, points: Tensor, scores: Tensor, batch: Batch) -> list[Picture]:
        layout = self.layout or Layout.of_count(points.shape[1])
        links = layout.links if layout is not None else ()
        if self.openpose:
            points, scores = to_openpose(points, scores, self.shown)
            links = openpose.links(links)
        owner, boxes = batch.extra["owner"], batch.extra["box"]
        return [
            Skeletons(points[mine], scores[mine], boxes[mine], links, self.shown)
            for mine in ((owner == number).nonzero().flatten() for number in range(len(batch.index)))
        ]


@final
@dataclass(frozen=True)
class Scored:
    """People as found and as annotated.

    Args:
        points: `[M, K, 2]` as found.
        scores: `[M]`.
        images: `[M]` numbers of images.
        truth: `[G, K, 3]` x, y, visibility.
        boxes: `[G, 4]` x1, y1, x2, y2: an answer about whom nothing is known of counts as neither right nor wrong if it
            lies near his box.
        area: `[G]` square pixels.
        truth_images: `[G]`.
    """

    points: Tensor
    scores: Tensor
    images: Tensor
    truth: Tensor
    boxes: Tensor
    area: Tensor
    truth_images: Tensor

    def part(self, span: slice) -> "Scored":
        """Return a part of the keypoints; the people's scores stay those of all of them."""
        return replace(self, points=self.points[:, span], truth=self.truth[:, span])

    def kept(self, index: Tensor) -> "Scored":
        """Return some of the people found."""
        return replace(self, points=self.points[index], scores=self.scores[index], images=self.images[index])


def distinct(people: Scored, sizes: Tensor, sigmas: Tensor, threshold: float = 0.9) -> Tensor:
    """Return which people stay, best first in each image: none that is too similar to a better one.

    Args:
        people: found in boxes that may overlap.
        sizes: `[M]` square pixels of what is cut out for each; distances are over the mean of two.
        sigmas: `[K]`.
        threshold: of the similarity, averaged over all keypoints.

    Returns:
        Indices, image after image.
    """
    stay: list[int] = []
    for image in people.images.unique().tolist():
        mine = (people.images == image).nonzero().flatten()
        mine = mine[people.scores[mine].argsort(descending=True, stable=True)]
        points, size = people.points[mine], sizes[mine]
        gap = (points[:, None] - points[None]).square().sum(-1)
        mean = (size[:, None] + size[None]) / 2
        near = torch.exp(-gap / (8 * sigmas.square() * mean[..., None])).mean(-1)
        left = torch.ones(len(mine), dtype=torch.bool)
        for number in range(len(mine)):
            if left[number]:
                left[number + 1 :] &= near[number, number + 1 :] <= threshold
        stay += mine[left].tolist()
    return torch.tensor(stay, dtype=torch.long)


def average_precision(people: Scored, sigmas: Tensor) -> dict[str, float]:
    """Return COCO's `ap`, `ap50`, `ap75` and `ar` over people; NaN never: without an annotated keypoint they are 0."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    shown = people.truth[..., 2] > 0
    if not shown.any():
        return dict.fromkeys(("ap", "ap50", "ap75", "ar"), 0.0)
    images = [{"id": one} for one in sorted({*people.images.tolist(), *people.truth_images.tolist()})]
    annotated = _rows(people.truth, people.truth_images, people.boxes, area=people.area, num_keypoints=shown.sum(1))
    ones = torch.ones_like(people.points[..., :1])
    answers = _rows(torch.cat([people.points, ones], -1), people.images, score=people.scores)
    tables = []
    with contextlib.redirect_stdout(io.StringIO()):
        for rows in (annotated, answers):
            table = COCO()
            table.dataset = {"images": images, "categories": [{"id": 1}], "annotations": rows}
            table.createIndex()
            tables.append(table)
        evaluation = COCOeval(*tables, "keypoints")
        evaluation.params.kpt_oks_sigmas = sigmas.numpy().astype(np.float64)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    numbers = [max(float(evaluation.stats[place]), 0.0) for place in (0, 1, 2, 5)]
    return dict(zip(("ap", "ap50", "ap75", "ar"), numbers, strict=True))


def _cut_out(batch: Batch) -> Tensor:
    """Return `[B]`, the square pixels of its image that each crop shows."""
    height, width = batch.inputs.shape[2:]
    area: Tensor = torch.linalg.det(batch.extra["matrix"][:, :, :2]).abs() * height * width
    return area


def _rows(points: Tensor, images: Tensor, boxes: Tensor | None = None, **more: Tensor) -> list[dict[str, Any]]:
    """Return annotations or answers as COCO writes them; without boxes, those around the points."""
    flat, image = points.flatten(1).double().tolist(), images.tolist()
    if boxes is None:
        boxes = torch.cat([points[..., :2].amin(1), points[..., :2].amax(1)], 1)
    low, high = boxes[:, :2], boxes[:, 2:]
    box = torch.cat([low, high - low], 1).tolist()
    size = (high - low).prod(1)
    words = {word: value.tolist() for word, value in {"area": size, **more}.items()}
    return [
        {
            **{"id": n + 1, "image_id": image[n], "category_id": 1, "iscrowd": 0, "ignore": 0},
            **{"keypoints": flat[n], "bbox": box[n], **{word: value[n] for word, value in words.items()}},
        }
        for n in range(len(image))
    ]
