# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from detector_case import framed, pictures
from tutelage.core import Batch, Model
from tutelage.core.error import UserError
from tutelage.core.picture import Depicting, Picture
from tutelage.data.annotations import Annotated, encoded
from tutelage.data.load import load as load_data
from tutelage.tasks.detection import Detection, Found, average_precision, codes, restored

BOXES = torch.tensor([[0.0, 0.0, 20.0, 20.0], [30.0, 30.0, 50.0, 50.0]])


def truth(
    boxes: Tensor, labels: Sequence[int], *, crowd: Sequence[bool] = (), masks: Tensor | None = None
) -> Annotated:
    crowd = crowd or [False] * len(labels)
    shapes = () if masks is None else tuple(encoded(mask, (64, 64)) for mask in masks)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return Annotated(
        torch.zeros(3, 64, 64, dtype=torch.uint8),
        (64, 64),
        boxes,
        torch.tensor(labels),
        torch.tensor(crowd),
        area,
        shapes,
    )


def told(boxes: Tensor, labels: Sequence[int], scores: Sequence[float], masks: Tensor | None = None) -> Found:
    return Found(boxes, torch.tensor(labels), ("a", "b"), torch.tensor(scores), masks)


def precision(truths: Sequence[Annotated], found: Sequence[Found], **more: Any) -> dict[str, float]:
    return average_precision(truths, found, ("a", "b"), **{"masks": False, **more})


def test_perfect_answers_score_one() -> None:
    scores = precision([truth(BOXES, [0, 1])], [told(BOXES, [0, 1], [0.9, 0.8])], per_class=True)
    assert scores == pytest.approx({"map": 1, "map50": 1, "map75": 1, "map_small": 1, "map/a": 1, "map/b": 1})


def test_half_of_the_recall_by_hand() -> None:
    # one of two things of a class found: precision 1 up to recall 1/2, 0 beyond, at 101 recalls
    scores = precision([truth(BOXES, [0, 0])], [told(BOXES[:1], [0], [0.9])])
    assert scores["map"] == pytest.approx(51 / 101)


def test_overlap_decides() -> None:
    moved = BOXES[:1] + torch.tensor([0.0, 0.0, 0.0, 8.0])  # IoU 400 / 560 = 0.714: right up to 0.70
    scores = precision([truth(BOXES[:1], [0])], [told(moved, [0], [0.9])])
    assert scores["map"] == pytest.approx(5 / 10)
    assert (scores["map50"], scores["map75"]) == pytest.approx((1, 0))


def test_crowds_count_as_neither() -> None:
    crowd = truth(BOXES, [0, 0], crowd=[False, True])
    inside = torch.tensor([[0.0, 0.0, 20.0, 20.0], [32.0, 32.0, 40.0, 40.0]])
    assert precision([crowd], [told(inside, [0, 0], [0.5, 0.9])])["map"] == pytest.approx(1)


def test_the_wrong_class_and_nothing_score_zero() -> None:
    assert precision([truth(BOXES, [0, 0])], [told(BOXES, [1, 1], [0.9, 0.8])])["map"] == 0
    assert precision([truth(BOXES, [0, 1])], [told(BOXES[:0], [], [])])["map"] == 0


def test_masks_are_compared_as_masks() -> None:
    full, half = torch.zeros(1, 64, 64, dtype=torch.bool), torch.zeros(1, 64, 64, dtype=torch.bool)
    full[:, :20, :20] = True
    half[:, :20, :13] = True  # IoU 0.65
    known = [truth(BOXES[:1], [0], masks=full)]
    assert precision(known, [told(BOXES[:1], [0], [0.9], full)], masks=True)["map"] == pytest.approx(1)
    assert precision(known, [told(BOXES[:1], [0], [0.9], half)], masks=True)["map"] == pytest.approx(4 / 10)


class Oracle(nn.Module):
    """Says what it was told, in the pixels of the batch."""

    def __init__(self, answers: list[dict[str, Tensor]]) -> None:
        super().__init__()
        self.answers = answers

    def losses(self, targets: Any) -> dict[str, Tensor]:
        return {"count": torch.tensor(float(len(targets)))}

    def detections(self) -> list[dict[str, Tensor]]:
        return self.answers

    def forward(self, pixels: Tensor, image_size: Tensor | None = None) -> "Oracle":
        return self


def test_masks_wait_for_their_score_as_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Found] = []

    def scored(truths: Any, found: Sequence[Found], *_: Any, masks: bool, **__: Any) -> dict[str, float]:
        kept.extend(found if masks else ())
        return {}

    monkeypatch.setattr("tutelage.tasks.detection.average_precision", scored)
    full = torch.zeros(1, 64, 64, dtype=torch.bool)
    full[:, :20, :20] = True
    known = [truth(BOXES[:1], [0], masks=full)]
    said = {"boxes": BOXES[:1], "labels": torch.tensor([0]), "scores": torch.tensor([0.9]), "masks": full}
    batch = Batch.of(torch.zeros(1, 3, 64, 64), torch.zeros(1), extra={"truths": known, "annotated": [True]})
    Detection(2).score([(Oracle([said]), batch)])
    assert [one.masks for one in kept] == [None]
    assert kept[0].codes == codes(full)
    assert kept[0].plain()["masks"] == told(BOXES[:1], [0], [0.9], full).plain()["masks"]


@pytest.mark.parametrize("shortest", [64, 48, 96])
def test_scores_are_taken_in_the_original_pixels(shortest: int) -> None:
    data = load_data(
        {
            "source": "scenes",
            "batch_size": 3,
            "detection": {"scenes": [2, 6], "side": 64, "shortest": shortest, "masks": True},
        },
        task="detection",
    )
    task = Detection(10, class_names=data.class_names)

    def answers() -> Any:
        for batch in data.validation.epoch():
            said = [{**one, "scores": torch.ones(len(one["labels"]))} for one in batch.target]
            yield task.call(Model(Oracle(said)), batch), batch

    scores = task.score(answers())
    assert scores["map"] == pytest.approx(1, abs=1e-6)
    assert scores["mask_map50"] > 0.95
    if shortest == 64:
        assert scores["mask_map"] == pytest.approx(1)


def test_images_without_annotation_do_not_count() -> None:
    pixels, targets = pictures(3)
    batch = framed(pixels, targets)
    batch = replace(batch, extra={"annotated": [True, False, True]})
    task = Detection(3)
    with pytest.raises(UserError, match=r"leave data\.labels out"):
        task.loss(Oracle([]), batch)
    oracle = Oracle([])
    oracle.rows = lambda rows: Oracle([{}] * len(rows))  # type: ignore[assignment]
    assert task.loss(oracle, batch)["count"] == 2
    none = replace(batch, extra={"annotated": [False] * 3})
    assert task.loss(Oracle([]), none)["count"] == 0


def test_an_unlabelled_half_of_a_run(tmp_path: Any) -> None:
    data = load_data(
        {"source": "scenes", "batch_size": 4, "labels": 2, "detection": {"scenes": [4, 2], "side": 64}},
        task="detection",
    )
    batch = next(data.train.epoch())
    assert batch.labelled.sum() == 2
    for known, one in zip(batch.labelled.tolist(), batch.target, strict=True):
        assert known or not len(one["labels"])


def test_pictures_are_drawn_and_plain() -> None:
    task: Depicting = Detection(2, class_names=("a", "b"))
    assert task.name == "detection"
    masks = torch.zeros(2, 64, 64, dtype=torch.bool)
    masks[0, :20, :20] = True
    found = told(BOXES, [0, 1], [0.9, 0.1], masks)
    seen: Picture = found
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    drawn = seen.draw(image)
    assert drawn.dtype == torch.uint8
    assert drawn[:, 10, 10].any()  # the mask
    assert not drawn[:, 35:50, 35:50].any()  # a box that is hardly believed in
    assert not image.any()
    plain = found.plain()
    assert plain["names"] == ["a", "b"]
    assert plain["boxes"][1] == [30, 30, 50, 50]
    assert plain["masks"][0]["size"] == [64, 64]
    assert replace(found, scores=None).plain().keys() == {"boxes", "labels", "names", "masks"}
    assert torch.equal(replace(found, scores=torch.zeros(2)).draw(image), image)


def test_masks_come_back_to_the_image() -> None:
    masks = torch.zeros(1, 8, 8, dtype=torch.bool)
    masks[:, :2, :4] = True  # of an image 4 x 6, padded to 8 x 8
    found = restored(masks, (4, 6), (8, 12))
    assert found.shape == (1, 8, 12)
    assert found[0, :4, :8].all()
    assert found.sum() == 32
    assert codes(masks[:0]) == []


def test_what_is_no_detector_is_named() -> None:
    batch = framed(*pictures(2))
    with pytest.raises(UserError, match="gave Tensor: a detector gives"):
        Detection(3).call(Model(Tell()), batch)
    with pytest.raises(UserError, match="a score in"):
        Detection(3, shown=2)
    with pytest.raises(UserError, match="nothing to score"):
        Detection(3).score(iter(()))


class Tell(nn.Module):
    def forward(self, pixels: Tensor, image_size: Tensor | None = None) -> Tensor:
        return pixels
