# SPDX-License-Identifier: Apache-2.0
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tutelage.core.error import UserError
from tutelage.core.keypoints import BODY, WHOLEBODY
from tutelage.data.annotations import Troubles
from tutelage.data.load import Spec, load
from tutelage.data.people import FIELDS, detections, files_of
from tutelage.data.people import read as read_people
from tutelage.data.pose import Changes, Record, crop, images
from tutelage.functional.noise import mix
from tutelage.run.recipe import load as load_recipe
from tutelage.run.recipe import shipped
from tutelage.run.stages import recipes_of

COUNTS = (17, 6, 68, 21, 21)


def person(number: int, image: int, **change: Any) -> dict[str, Any]:
    points = [v for k in range(17) for v in (20.0 + k, 10.0 + 2 * k, 2)]
    return {
        **{"id": number, "image_id": image, "category_id": 1, "iscrowd": 0, "num_keypoints": 17},
        **{"bbox": [15, 5, 30, 45], "area": 700.0, "keypoints": points},
        **change,
    }


def whole(number: int, image: int) -> dict[str, Any]:
    rows = [[v for k in range(count) for v in (20.0 + k % 20, 10.0 + k % 30, 2)] for count in COUNTS]
    return person(number, image, **dict(zip(FIELDS, rows, strict=True)))


def written(root: Path, annotations: list[dict[str, Any]], name: str = "person_keypoints_train.json") -> Path:
    """Two images of 64 x 80 pixels, and annotations of them."""
    root.mkdir(parents=True, exist_ok=True)
    listed = []
    for number in (1, 2):
        file = f"{number:012d}.jpg"
        Image.new("RGB", (80, 64), (60 * number,) * 3).save(root / file)
        listed.append({"id": number, "file_name": file, "height": 64, "width": 80})
    table = {
        "images": listed,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "person", "keypoints": list(BODY.names), "skeleton": []}],
    }
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(json.dumps(table))
    return root


def read(root: Path, kind: str = "coco", **data: Any) -> Any:
    return load({"source": f"{kind}:{root}", "batch_size": 1, "image_size": [64, 48], **data}, task="pose")


def test_coco_is_read(tmp_path: Path) -> None:
    root = written(tmp_path, [person(7, 1), person(8, 2), person(9, 2)])
    written(tmp_path, [person(1, 1)], "person_keypoints_val.json")
    data = read(root)
    assert len(data.train.samples) == 3
    assert len(data.validation.samples) == 1
    assert data.model_facts()["geometry"] == {"num_keypoints": 17, "layout": "body"}
    batch = next(data.validation.epoch(0))
    assert batch.inputs.shape == (1, 3, 64, 48)
    assert batch.target.shape == (1, 17, 3)
    back = batch.target[0, :, :2] @ batch.extra["matrix"][0, :, :2].T + batch.extra["matrix"][0, :, 2]
    assert torch.allclose(back, torch.tensor([[20.0 + k, 10.0 + 2 * k] for k in range(17)]), atol=1e-4)
    assert batch.frame is not None
    # the box of 30 x 45 times 1.25 is too narrow for 48 x 64, and is 37.5 x 50 of 42.2 x 56.25
    scale = 64 / 56.25
    assert batch.frame.boxes[0].tolist() == pytest.approx(
        [24 - 15 * scale, 32 - 22.5 * scale, 24 + 15 * scale, 32 + 22.5 * scale], abs=1e-3
    )


def test_a_whole_body_and_frames_of_videos_are_read(tmp_path: Path) -> None:
    root = written(tmp_path / "whole", [whole(1, 1), whole(2, 2)], "coco_wholebody_train_v1.0.json")
    data = read(root, "wholebody", validation_share=0.5)
    assert data.model_facts()["geometry"] == {"num_keypoints": 133, "layout": "wholebody"}
    place = written(tmp_path / "ubody" / "images" / "talk", [])
    table = json.loads((place / "person_keypoints_train.json").read_text())
    scene = tmp_path / "ubody" / "annotations" / "talk"
    scene.mkdir(parents=True)
    (scene / "keypoint_annotation.json").write_text(json.dumps({**table, "annotations": [whole(1, 1), whole(2, 2)]}))
    frames = read(tmp_path / "ubody", "ubody", pose={"interval": 1}, validation_share=0.5)
    assert len(frames.train.samples) + len(frames.validation.samples) == 2
    both = read(root, "wholebody", validation_share=0.5, pose={"also": f"ubody:{tmp_path / 'ubody'}", "interval": 2})
    assert len(both.train.samples) + len(both.validation.samples) == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"keypoints": [1.0, 2.0, 2]}, "1 people whose keypoints are not 17 (first annotation 5 has 1)"),
        ({"keypoints": [float("nan")] * 51}, "1 keypoints that are no numbers (first annotation 5)"),
        ({"bbox": [200, 5, 30, 45]}, "1 boxes outside their image (first annotation 5)"),
        ({"bbox": [1, 5, 0, 45]}, "1 boxes without area (first annotation 5)"),
        ({"bbox": [60, 5, 30, 45]}, "1 boxes over an edge (first annotation 5)"),
        ({"bbox": None}, "1 people without a box (first annotation 5)"),
        ({"bbox": ["a", 5, 30, 45]}, "1 boxes that are no numbers (first annotation 5)"),
        ({"bbox": [float("nan")] * 4}, "1 boxes that are no numbers (first annotation 5)"),
        ({"keypoints": ["a"] * 51}, "1 keypoints that are no numbers (first annotation 5)"),
        ({"area": float("nan")}, "1 people whose area is no positive number (first annotation 5)"),
        ({"area": -3}, "1 people whose area is no positive number (first annotation 5)"),
        ({"area": "large"}, "1 people whose area is no positive number (first annotation 5)"),
    ],
)
def test_bad_annotations_are_named_or_skipped(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    root = written(tmp_path, [person(1, 1), person(2, 2), person(5, 1, **change)])
    with pytest.raises(UserError) as found:
        read(root)
    assert said in str(found.value)
    assert "data.on_error: skip" in str(found.value)
    kept = read(root, on_error="skip")
    over = "over an edge" in said  # such a box is cut
    assert len(kept.train.samples) + len(kept.validation.samples) == 2 + over
    assert bool(torch.isfinite(kept.train.samples.people.area).all())


def test_people_without_a_visible_keypoint_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blind = person(3, 1, keypoints=[0.0] * 51)
    with caplog.at_level(logging.INFO):
        data = read(written(tmp_path, [person(1, 1), person(2, 2), blind, person(4, 1, iscrowd=1)]))
    assert len(data.train.samples) + len(data.validation.samples) == 2
    assert "1 people without a visible keypoint are left out" in caplog.text
    with pytest.raises(UserError, match="nobody in it has a visible keypoint"):
        read(written(tmp_path / "none", [blind]))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"pose": {"pading": 2}}, "data.pose.pading is not known; did you mean padding"),
        ({"pose": {"padding": 0}}, "data.pose.padding is a factor > 0"),
        ({"pose": {"layout": "wholebod"}}, "keypoints 'wholebod' are not known; did you mean wholebody"),
        ({"pose": {"annotations": "none.json"}}, "data.pose.annotations: no file"),
        ({"pose": {"annotations": {"dev": "a.json"}}}, "splits are train, validation, test"),
        ({"pose": {"also": "yolo:there"}}, "data.pose.also: 'yolo:there' is no source"),
        ({"augment": {"flipp": 1}}, "data.augment.flipp is not known; did you mean flip"),
        ({"augment": {"scale": [2, 1]}}, "data.augment.scale is"),
        ({"augment": {"flip": 2}}, "data.augment.flip is a number in"),
        ({"augment": {"erase": "much"}}, "data.augment.erase is a number in [0, 1], not 'much'"),
        ({"augment": {"scale": ["a", 2]}}, "data.augment.scale is [smallest, largest], both > 0, not ['a', 2]"),
        ({"augment": {"rotate": "x"}}, "data.augment.rotate is a number >= 0 (degrees), not 'x'"),
        ({"augment": {"rotate": float("nan")}}, "data.augment.rotate is a number >= 0 (degrees), not nan"),
        ({"augment": {"shift": [1]}}, "data.augment.shift is a number >= 0 (a share of the box), not [1]"),
        ({"pose": {"padding": "big"}}, "data.pose.padding is a factor > 0, not 'big'"),
        ({"pose": {"padding": float("nan")}}, "data.pose.padding is a factor > 0, not nan"),
        ({"pose": {"box_score": "x"}}, "data.pose.box_score is a number, not 'x'"),
        ({"pose": {"sigmas": ["x"]}}, "data.pose.sigmas are numbers, one a keypoint, not ['x']"),
        ({"image_size": 0}, "data.image_size counts pixels of a crop, (height, width), not 0"),
    ],
)
def test_bad_words_are_named(tmp_path: Path, data: dict[str, Any], said: str) -> None:
    root = written(tmp_path, [person(1, 1), person(2, 2)])
    with pytest.raises(UserError) as found:
        read(root, **data)
    assert said in str(found.value)


def test_missing_sigmas_and_files_are_named(tmp_path: Path) -> None:
    root = written(tmp_path, [])
    file = root / "person_keypoints_train.json"
    table = json.loads(file.read_text())
    table["categories"][0]["keypoints"] = ["left_horn", "right_horn", "tail"]
    table["annotations"] = [person(n, n, keypoints=[20, 20, 2, 30, 20, 2, 25, 40, 1]) for n in (1, 2)]
    file.write_text(json.dumps(table))
    with pytest.raises(UserError, match=r"3 keypoints .* are no known set.*give data\.pose\.sigmas"):
        read(root)
    data = read(root, pose={"sigmas": [0.1, 0.1, 0.2]}, validation_share=0.5)
    assert data.model_facts()["geometry"]["layout"]["swap"] == (1, 0, 2)
    with pytest.raises(UserError, match="no json file with train and keypoints"):
        files_of(tmp_path / "nothing", "coco")
    file.write_text("{}")
    with pytest.raises(UserError, match="is no json of COCO: it has no list of annotations"):
        read(root)
    with pytest.raises(UserError, match=r"data\.source: no file or folder"):
        read(tmp_path / "nowhere")


# --- crops ---------------------------------------------------------------------------------------------------


def marked(points: Tensor, size: tuple[int, int] = (120, 100)) -> Tensor:
    """A black image with a bright square of five pixels a side at every point."""
    image = torch.zeros(3, *size, dtype=torch.uint8)
    for x, y in points[:, :2].round().long().tolist():
        image[:, y - 2 : y + 3, x - 2 : x + 3] = 255
    return image


@pytest.mark.parametrize("key", range(12))
def test_pixels_and_points_move_together(key: int) -> None:
    """Wherever a crop is turned, scaled, moved or mirrored, the bright squares stay under the keypoints."""
    points = torch.zeros(17, 3)
    points[[5, 6, 11, 12], :] = torch.tensor([[40.0, 40, 2], [60, 42, 2], [44, 80, 2], [58, 82, 2]])
    record = Record(marked(points[[5, 6, 11, 12]]), points, torch.tensor([25.0, 25, 75, 100]))
    changes = Changes(flip=0.5, shift=0.1, scale=(0.9, 1.3), rotate=60.0)
    found = crop(record, BODY, (96, 72), 1.25, changes, mix(1, key))
    shown = found.points[0][found.points[0, :, 2] > 0]
    assert len(shown) == 4
    inside = [(x, y) for x, y, _ in shown.tolist() if 2 <= x <= 69 and 2 <= y <= 93]
    assert inside
    for x, y in inside:
        assert found.pixels[0, :, round(y), round(x)].float().mean() > 200
    # a point changes its name where the crop is mirrored
    mirrored = float(torch.linalg.det(found.matrix[0, :, :2])) < 0
    back = torch.linalg.solve(found.matrix[0, :, :2], points[6 if mirrored else 5, :2] - found.matrix[0, :, 2])
    assert torch.allclose(found.points[0, 5, :2], back, atol=1e-3)


def test_a_probability_of_one_is_a_number_and_no_word() -> None:
    assert Changes.parse({"flip": 1, "blur": 1.0}) == Changes(flip=1, blur=1.0)
    assert Changes.parse({"flip": False, "scale": False}) == Changes()
    assert Changes.parse({"flip": True, "hsv": None}) == Changes(flip=0.5, hsv=(5.0, 30.0, 30.0))
    assert Changes.parse(None) == Changes(0.5, 0.3, 0.16, (0.6, 1.4), 80.0, 0.3, None, 0.0, 0.0, 1.0)


def test_a_crop_is_a_function_of_its_key() -> None:
    data = load({"source": "figures", "batch_size": 4, "pose": {"number": 8, "held_out": 4}}, task="pose", seed=5)
    samples: Any = data.train.samples
    one, again, other = (samples.seen(samples.read(2), key, train=True) for key in (9, 9, 10))
    assert torch.equal(one.pixels, again.pixels)
    assert not torch.equal(one.pixels, other.pixels)
    still = [samples.seen(samples.read(2), key, train=False) for key in (9, 10)]
    assert torch.equal(still[0].pixels, still[1].pixels)


def test_half_a_body_is_cut_where_enough_is_visible() -> None:
    points = torch.cat([torch.rand(17, 2) * 40 + 20, torch.full((17, 1), 2.0)], 1)
    points[11:, 1] += 40
    record = Record(torch.zeros(3, 130, 100, dtype=torch.uint8), points, torch.tensor([15.0, 15, 70, 110]))
    spans = {
        round(float(crop(record, BODY, (64, 48), 1.25, Changes(half_body=1.0), key).matrix[0, 0, 0]), 3)
        for key in range(16)
    }
    assert len(spans) == 2, "the upper half, or the lower one"
    middles = []
    for key in range(16):  # what stands in the middle of the crop
        matrix = crop(record, BODY, (64, 48), 1.25, Changes(half_body=1.0), key).matrix[0]
        middles.append(matrix[:, :2] @ torch.tensor([24.0, 32.0]) + matrix[:, 2])
    for half in (points[:11, :2].mean(0), points[11:, :2].mean(0)):
        assert min(float((middle - half).abs().amax()) for middle in middles) < 1e-3
    few = Record(record.image, points * (torch.arange(17) < 8)[:, None], record.box)
    plain = crop(few, BODY, (64, 48), 1.25, None, 0).matrix
    assert torch.equal(crop(few, BODY, (64, 48), 1.25, Changes(half_body=1.0), 3).matrix, plain)


def test_a_box_beyond_the_image_is_black_and_never_nan() -> None:
    record = Record(torch.full((3, 8, 8), 200, dtype=torch.uint8), torch.zeros(17, 3), torch.tensor([90.0, 90, 91, 92]))
    found = crop(record, BODY, (32, 24), 1.25, None, 0)
    assert not found.pixels.any()
    assert found.matrix.isfinite().all()


def test_labels_can_be_withheld() -> None:
    given = {"source": "figures", "labels": 2, "batch_size": 8, "pose": {"number": 8, "held_out": 4}}
    batch = next(load(given, task="pose").train.epoch(0))
    assert int(batch.labelled.sum()) == 2
    assert not batch.target[~batch.labelled][..., 2].any()
    assert batch.target[batch.labelled][..., 2].any()
    assert load(given, task="pose").model_facts()["geometry"]["num_keypoints"] == len(WHOLEBODY)


# --- files ---------------------------------------------------------------------------------------------------


def changed(root: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Change what the file of a set says."""
    file = root / "person_keypoints_train.json"
    table = json.loads(file.read_text())
    change(table)
    file.write_text(json.dumps(table))
    return root


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ([1], "is no json of COCO: it has no list of annotations"),
        ({"annotations": [3], "images": []}, "it has no list of annotations"),
        ({"annotations": [], "images": [{"id": 1}]}, "one of its images has no file_name"),
        ({"annotations": [{"id": 1}], "images": []}, "one of its annotations has no image_id"),
        ({"annotations": [{"image_id": 1}], "images": []}, "lists no images"),
        ({"annotations": [], "images": [{"id": 1, "file_name": "1.jpg"}]}, "holds no annotations"),
        ("", "is no json: "),
    ],
)
def test_files_that_are_no_annotations_are_named(tmp_path: Path, table: Any, said: str) -> None:
    root = written(tmp_path, [])
    (root / "person_keypoints_train.json").write_text(json.dumps(table) if table else "")
    with pytest.raises(UserError, match=re.escape(said)):
        read(root)


def test_a_size_that_is_missing_is_that_of_the_file_and_a_wrong_one_is_named(tmp_path: Path) -> None:
    root = written(tmp_path, [person(1, 1), person(2, 2)])
    changed(root, lambda table: table["images"].__setitem__(0, {**table["images"][0], "height": None}))
    samples = read(root, validation_share=0.5).train.samples
    assert samples.people.sizes == ((64, 80), (64, 80))
    changed(root, lambda table: [image.update(height=640, width=800) for image in table["images"]].clear())
    with pytest.raises(UserError, match="the image is 80 x 64, and annotated as 800 x 640"):
        next(read(root, validation_share=0.5).train.epoch(0))


def test_images_may_have_names_for_numbers(tmp_path: Path) -> None:
    root = written(tmp_path, [person(1, 1), person(2, 2)])

    def named(table: dict[str, Any]) -> None:
        for image, row in zip(table["images"], table["annotations"], strict=True):
            image["id"] = row["image_id"] = f"image {image['id']}"

    people = read(changed(root, named), validation_share=0.5).train.samples.people
    assert people.picture_ids == (0, 1)


def test_every_tenth_frame_is_one_whose_number_says_so(tmp_path: Path) -> None:
    root = written(tmp_path, [person(1, 1), person(2, 2)])
    for interval, ids in ((1, [1, 2]), (2, [2])):
        found = read_people(root / "person_keypoints_train.json", root, Troubles(""), interval=interval)
        assert found.image_ids.tolist() == ids
    with pytest.raises(UserError, match=r"lists no images whose number is a multiple of 10 \(data\.pose\.interval\)"):
        read_people(root / "person_keypoints_train.json", root, Troubles(""), interval=10)


def test_videos_that_ubody_tests_on_are_not_trained_on(tmp_path: Path) -> None:
    root = tmp_path / "UBody"
    for number, video in enumerate(("first", "second_Trim1")):
        place = written(root / "images" / f"talk{number}" / video, [])
        table = json.loads((place / "person_keypoints_train.json").read_text())
        for image in table["images"]:
            image["file_name"] = f"{video}/{image['file_name']}"
        table["annotations"] = [whole(2 * number + 1, 1), whole(2 * number + 2, 2)]
        file = root / "annotations" / f"talk{number}" / "keypoint_annotation.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(table))
    every: dict[str, Any] = {"interval": 1}
    assert len(read(root, "ubody", validation_share=0.5, pose=every).train.samples) == 2
    files = [f"annotations/talk{number}/keypoint_annotation.json" for number in range(2)]
    named = read(root, "ubody", pose={**every, "annotations": {"train": files[0], "validation": files[1]}})
    assert [len(part.samples) for part in (named.train, named.validation)] == [2, 2]
    (root / "splits").mkdir()
    np.save(root / "splits" / "intra_scene_test_list.npy", np.array(["second"]))
    data = read(root, "ubody", pose=every)
    for samples, video, ids in (
        (data.train.samples, "first", [1, 2]),
        (data.validation.samples, "second_Trim1", [3, 4]),
    ):
        assert [Path(name).parent.name for name in samples.people.names] == [video] * 2
        assert samples.people.ids.tolist() == ids
    coco = written(tmp_path / "coco", [whole(7, 1), whole(8, 2)], "coco_wholebody_train_v1.0.json")
    also = read(coco, "wholebody", validation_share=0.4, pose={**every, "also": f"ubody:{root}"})
    assert len(also.train.samples) + len(also.validation.samples) == 4
    np.save(root / "splits" / "intra_scene_test_list.npy", np.array(["first", "second"]))
    with pytest.raises(
        UserError, match=r"intra_scene_test_list\.npy names every video there is: nothing is left to train"
    ):
        read(root, "ubody", pose=every)
    (root / "splits" / "intra_scene_test_list.npy").write_text("no array")
    with pytest.raises(UserError, match=r"intra_scene_test_list\.npy cannot be read"):
        read(root, "ubody", pose=every)


def test_some_pictures_are_taken_with_their_people(tmp_path: Path) -> None:
    crowd = person(9, 2, iscrowd=1, bbox=[1, 1, 70, 60])
    root = written(tmp_path, [person(1, 1), person(2, 2), person(3, 2), person(4, 1, keypoints=[0.0] * 51), crowd])
    people = read_people(root / "person_keypoints_train.json", root, Troubles(""))
    assert people.uncounted.image.tolist() == [0, 1]
    second = people.within([False, True])
    assert (second.image.tolist(), second.ids.tolist(), second.picture_ids) == ([0, 0], [2, 3], (2,))
    assert (second.uncounted.image.tolist(), second.uncounted.boxes.tolist()) == ([0], [[1, 1, 71, 61]])
    twice = type(people).joined([people, second])
    assert twice.image.tolist() == [0, 1, 1, 2, 2]
    assert twice.uncounted.image.tolist() == [0, 1, 2]
    assert twice.picture_ids == (0, 1, 2)  # both files call a picture 2, and scores go by picture
    assert twice.image_ids.tolist() == twice.image.tolist()


# --- boxes of a detector -------------------------------------------------------------------------------------


def test_boxes_of_a_detector_are_cropped(tmp_path: Path) -> None:
    root = written(tmp_path, [])
    paths = sorted(root.glob("*.jpg"))
    rows = [
        {"image_id": 1, "category_id": 1, "bbox": [5, 5, 20, 40], "score": 0.9},
        {"image_id": 1, "category_id": 1, "bbox": [30, 5, 20, 40], "score": 0.8},
        {"image_id": 1, "category_id": 1, "bbox": [50, 5, 20, 40], "score": 0.1},
        {"image_id": 1, "category_id": 3, "bbox": [0, 0, 9, 9], "score": 0.9},
    ]
    (root / "results.json").write_text(json.dumps(rows))
    pose = {"boxes": str(root / "results.json")}
    samples = images(paths, Spec(source="coco:x", image_size=(64, 48), pose=pose))
    crops = [samples.seen(samples.read(number), 0, train=False) for number in (0, 1)]
    assert [len(one.pixels) for one in crops] == [2, 1]
    batch = samples.collate(crops, torch.tensor([0, 1]), torch.zeros(2, dtype=torch.long))
    assert batch.extra["owner"].tolist() == [0, 0, 1]
    assert batch.extra["box"][2].tolist() == [0, 0, 80, 64]
    answers = [
        {
            "image": str(paths[1]),
            "boxes": [[1, 2, 30, 40], [0, 0, 5, 5]],
            "names": ["person", "dog"],
            "scores": [0.7, 1],
        }
    ]
    (root / "answers.json").write_text(json.dumps(answers))
    assert list(detections(root / "answers.json")) == [(paths[1].stem, [1, 2, 30, 40], 0.7)]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ({"a": 1}, "is neither COCO results nor a detector's answers, both lists of rows"),
        (["a"], "is neither COCO results nor a detector's answers, both lists of rows"),
        ([{"image_id": 1, "bbox": [1, 2, 3]}], "row 0 of "),
        ([{"image_id": 1, "score": 1}], "it has no 'bbox'"),
        ([{"bbox": [1, 2, 3, 4]}], "it has no 'image_id'"),
        ([{"image_id": 1, "bbox": [float("nan")] * 4}], "a box or a score is no number"),
        ([{"image_id": 1, "bbox": [0, 0, float("inf"), 3]}], "a box or a score is no number"),
        ([{"image_id": 1, "bbox": [0, 0, 3, 3], "score": float("nan")}], "a box or a score is no number"),
        ([{"image": "a.jpg", "boxes": [[1, 2, 3]]}], "row 0 of "),
        ([{"image": "a.jpg", "boxes": [[1, 2, 3, 4]], "scores": [1, 1]}], "1 boxes, 1 names and 2 scores"),
        ([{"boxes": [[1, 2, 3, 4]]}], "it has no 'image'"),
    ],
)
def test_boxes_that_are_none_are_named(tmp_path: Path, rows: Any, said: str) -> None:
    (tmp_path / "wrong.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match=re.escape(said)):
        list(detections(tmp_path / "wrong.json"))


def test_boxes_without_area_are_left_out(tmp_path: Path) -> None:
    boxes = [[5, 5, 0, 3], [5, 5, -3, 4], [5, 5, 1e-9, 1e-9], [5, 5, 10, 20]]
    (tmp_path / "boxes.json").write_text(json.dumps([{"image_id": 7, "bbox": box, "score": 0.5} for box in boxes]))
    assert list(detections(tmp_path / "boxes.json")) == [("7", [5, 5, 15, 25], 0.5)]


# --- shipped recipes -----------------------------------------------------------------------------------------


def test_shipped_recipes_augment_as_rtmpose_does() -> None:
    """The published pipelines, of the first epochs and of the last thirty; a second stage ends before these come."""
    weak = Changes(0.5, 0.3, 0.0, (0.75, 1.25), 60.0, 0.0, (5.0, 30.0, 30.0), 0.1, 0.1, 0.5)
    names = [name for name in shipped() if "rtmpose" in name or name.startswith("dwpose/yang")]
    assert len(names) == 11
    for name in names:
        large = name.endswith("x_self_384x288")
        scale, rotate = ((0.5, 1.5), 90.0) if large else ((0.6, 1.4), 80.0)
        strong = Changes(0.5, 0.3, 0.16, scale, rotate, 0.0, (5.0, 30.0, 30.0), 0.1, 0.1, 1.0)
        for stage, one in recipes_of(load_recipe(name)).items():
            assert Changes.parse(one.data.augment) == strong, name
            late = one.data.augment_late
            assert (late is None) == (stage == "second" or large), name
            assert late is None or (late.epochs, Changes.parse(late.augment)) == (30, weak), name
