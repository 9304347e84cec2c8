# SPDX-License-Identifier: Apache-2.0
from pathlib import Path
from typing import Any

import pytest
import torch

from tutelage.core import Batch
from tutelage.core.error import UserError
from tutelage.data.annotations import Annotated, decoded, encoded
from tutelage.data.detection import AUGMENTATIONS, Options
from tutelage.data.load import Splits, load
from tutelage.data.record import Record, resized
from tutelage.data.samples import Dense
from tutelage.data.scenes import boxes_of


def scenes(augment: Any = None, source: str = "scenes", **options: Any) -> Splits:
    given = {"scenes": [6, 4], "side": 64, "masks": True, **options}
    spec = {"source": source, "batch_size": 3, "augment": augment, "detection": given}
    return load(spec, task="detection", seed=1)


def first(data: Splits) -> Batch:
    return next(data.train.epoch())


def test_a_batch_is_padded_once_and_says_where() -> None:
    data = scenes("none", shortest=[40, 50], longest=70)
    assert isinstance(data.train.samples, Dense)
    batch = first(data)
    frame = batch.frame
    assert frame is not None
    assert frame.size == tuple(batch.inputs.shape[-2:]) == (64, 64)
    assert set(frame.image_size.flatten().tolist()) <= {40, 50}
    assert len(set(frame.image_size[:, 0].tolist())) == 2
    for number, (height, width) in enumerate(frame.image_size.tolist()):
        assert not batch.inputs[number, :, height:].any()
        assert not batch.inputs[number, :, :, width:].any()
    boxes = torch.cat([one["boxes"] for one in batch.target])
    assert torch.equal(boxes, frame.boxes)
    assert frame.masks is not None
    assert frame.masks.shape == (len(boxes), 64, 64)
    assert frame.box_image.bincount(minlength=3).tolist() == [len(one["labels"]) for one in batch.target]


@pytest.mark.parametrize("augment", ["none", ["flip"], ["zoom_out", "flip"], ["crop"], list(AUGMENTATIONS[2:])])
def test_boxes_go_with_their_masks(augment: Any) -> None:
    data = scenes(augment, shortest=[64, 80], longest=200)
    met = 0
    for epoch in range(3):
        for batch in data.train.epoch(epoch):
            assert batch.frame is not None
            assert batch.frame.masks is not None
            tight = boxes_of(batch.frame.masks)
            seen = batch.frame.masks.flatten(1).any(1)
            side = (batch.frame.boxes - tight)[seen].abs().amax() if seen.any() else torch.zeros(())
            assert side <= 4  # a resize rounds, and what is left of a thing after a cut may not fill its box
            met += int(seen.sum())
    assert met > 30


def test_what_is_seen_is_a_function_of_the_key() -> None:
    data = scenes(list(AUGMENTATIONS), shortest=[48, 64])
    state = torch.random.get_rng_state()
    one, two = first(data), first(scenes(list(AUGMENTATIONS), shortest=[48, 64]))
    assert torch.equal(one.inputs, two.inputs)
    assert torch.equal(state, torch.random.get_rng_state())
    again = next(data.train.epoch(1))
    assert one.inputs.shape != again.inputs.shape or not torch.equal(one.inputs, again.inputs)
    still = next(data.validation.epoch(0)), next(data.validation.epoch(1))
    assert torch.equal(still[0].inputs, still[1].inputs)


def test_sides_keep_their_ratio_unless_both_are_given() -> None:
    free = scenes(None, shortest=48, longest=48)
    assert first(free).frame.image_size.unique().tolist() == [48]  # type: ignore[union-attr]
    spec = {"source": "scenes", "batch_size": 2, "image_size": [32, 96], "detection": {"scenes": [2, 2], "side": 64}}
    batch = next(load(spec, task="detection").train.epoch())
    assert batch.inputs.shape == (2, 3, 32, 96)
    assert batch.extra["scale"].tolist() == [[0.5, 1.5]] * 2


def test_files_and_workers(tmp_path: Path) -> None:
    import json

    from PIL import Image

    images, annotations = [], []
    for number in range(4):
        Image.new("RGB", (50, 30), (number * 40, 0, 0)).save(tmp_path / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": 30, "width": 50})
        annotations.append(
            {"id": number + 1, "image_id": number, "category_id": 1, "bbox": [5, 5, 20, 10], "area": 200}
        )
    annotations[0] |= {"iscrowd": 1}
    file = {"images": images, "categories": [{"id": 1, "name": "a"}], "annotations": annotations}
    (tmp_path / "train.json").write_text(json.dumps(file))
    (tmp_path / "val.json").write_text(json.dumps(file))
    spec = {"source": f"coco:{tmp_path}", "batch_size": 4, "detection": {"shortest": 60, "longest": 90}}
    data = load(spec, task="detection")
    batch = next(data.validation.epoch())
    assert batch.frame is not None
    assert batch.frame.image_size.tolist() == [[54, 90]] * 4
    assert batch.inputs.shape == (4, 3, 64, 96)
    assert [len(one["labels"]) for one in batch.target] == [0, 1, 1, 1]  # a crowd is not learnt
    assert [truth.crowd.tolist() for truth in batch.extra["truths"]] == [[True], [False], [False], [False]]
    torch.testing.assert_close(batch.target[1]["boxes"], torch.tensor([[9.0, 9.0, 45.0, 27.0]]))
    apart = load({**spec, "workers": 1}, task="detection")
    assert torch.equal(next(apart.train.epoch()).inputs, next(data.train.epoch()).inputs)
    Image.new("RGB", (30, 50)).save(tmp_path / "0.png")
    with pytest.raises(UserError, match="it is 30 x 50, and annotated as 50 x 30"):
        next(load(spec, task="detection").validation.epoch())


def test_files_may_stay_as_large_as_they_are() -> None:
    assert Options.parse({"shortest": None}, "coco").longest is None
    assert Options.parse({"shortest": 600}, "coco").longest == 1333
    assert Options.parse(None, "coco").shortest == 800


def test_masks_are_resized_around_the_middles_of_pixels() -> None:
    masks = torch.zeros(1, 4, 4, dtype=torch.bool)
    masks[0, 1:3, 1:3] = True
    none = torch.zeros(0)
    truth = Annotated(Path("a.png"), (4, 4), none.view(0, 4), none.long(), none.bool(), none)
    whole = Record(torch.zeros(3, 4, 4, dtype=torch.uint8), torch.tensor([[1.0, 1, 3, 3]]), none.long(), masks, truth)
    for size in ((3, 3), (5, 5)):
        small = resized(whole, size)
        assert small.masks is not None
        assert torch.equal(small.masks[0], small.masks[0].flip(0, 1))  # as symmetric as it was


def test_bad_annotations_are_fatal_or_left_out(tmp_path: Path) -> None:
    import json

    from PIL import Image

    Image.new("RGB", (50, 30)).save(tmp_path / "a.png")
    thing = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 0, 10], "area": 200}
    file = {
        "images": [{"id": 1, "file_name": "a.png", "height": 30, "width": 50}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [thing, {**thing, "id": 2, "bbox": [5, 5, 9, 10]}],
    }
    for split in ("train", "val"):
        (tmp_path / f"{split}.json").write_text(json.dumps(file))
    spec = {"source": f"coco:{tmp_path}", "batch_size": 1}
    with pytest.raises(UserError, match=r"coco:.*: 2 boxes without area \(first annotation 1\)"):
        load(spec, task="detection")
    data = load({**spec, "on_error": "skip"}, task="detection")
    assert len(next(data.train.epoch()).target[0]["labels"]) == 1


def test_a_validation_share_is_held_out(tmp_path: Path) -> None:
    import json

    from PIL import Image

    names = [f"{number}.png" for number in range(10)]
    for name in names:
        Image.new("RGB", (40, 40)).save(tmp_path / name)
    images = [{"id": n, "file_name": name, "height": 40, "width": 40} for n, name in enumerate(names)]
    (tmp_path / "all.json").write_text(
        json.dumps({"images": images, "categories": [{"id": 1, "name": "a"}], "annotations": []})
    )
    data = load({"source": f"coco:{tmp_path}", "validation_share": 0.3, "batch_size": 2}, task="detection")
    assert (len(data.train.samples), len(data.validation.samples)) == (7, 3)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"source": "coca:x"}, "did you mean coco"),
        ({"source": "coco"}, "write coco:PATH"),
        ({"source": "scenes", "detection": {"sise": 3}}, "did you mean side"),
        ({"source": "scenes", "detection": {"shortest": 0}}, "counts pixels"),
        ({"source": "scenes", "detection": {"shortest": 9, "longest": 3}}, "less than shortest"),
        ({"source": "scenes", "detection": {"multiple": 0}}, "at least 1"),
        ({"source": "scenes", "detection": {"scenes": [3]}}, "to train on, to validate on"),
        ({"source": "scenes", "augment": ["flop"]}, "did you mean flip"),
        ({"source": "scenes", "augment": {"train": []}}, "takes a list of"),
        ({"source": "scenes", "mixup": 0.2}, "leave it out"),
    ],
)
def test_words_that_mean_nothing_are_named(spec: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load(spec, task="detection")


def test_codes_go_both_ways() -> None:
    mask = torch.rand(9, 7) > 0.5
    assert torch.equal(decoded(encoded(mask, (9, 7))), mask)
