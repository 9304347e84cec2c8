# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tutelage.core.error import UserError
from tutelage.data.annotations import Troubles, encoded
from tutelage.data.coco import coco

CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]


def thing(number: int, image: int, box: list[float], category: int = 7, **more: Any) -> dict[str, Any]:
    area = box[2] * box[3]
    return {"id": number, "image_id": image, "category_id": category, "bbox": box, "area": area, "iscrowd": 0, **more}


def write(
    file: Path, annotations: list[dict[str, Any]], names: tuple[str, ...] = ("a.png", "b.png"), **more: Any
) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    images = [{"id": n, "file_name": name, "height": 20, "width": 30} for n, name in enumerate(names, start=1)]
    file.write_text(json.dumps({"images": images, "categories": CATEGORIES, "annotations": annotations, **more}))


def picture(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (30, 20)).save(file)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    for split in ("train2017", "val2017"):
        for name in ("a.png", "b.png"):
            picture(tmp_path / split / name)
    polygon = [[2, 2, 10, 2, 10, 8, 2, 8]]
    crowd = {"size": [20, 30], "counts": [0, 40, 560]}
    found = [
        thing(1, 1, [2, 2, 8, 6], segmentation=polygon),
        thing(2, 1, [0, 0, 2, 20], category=3, segmentation=crowd, iscrowd=1),
    ]
    for split in ("train2017", "val2017"):
        write(tmp_path / "annotations" / f"instances_{split}.json", found)
    write(tmp_path / "annotations" / "captions_train2017.json", [])
    return tmp_path


def test_a_folder_as_coco_publishes_it(home: Path) -> None:
    troubles = Troubles("it")
    found = coco(home, troubles)
    assert not troubles.kinds
    assert found.keys() == {"train", "validation"}
    assert found["train"].class_names == ("cat", "dog")
    one, empty = found["train"].images
    assert one.picture == home / "train2017" / "a.png"
    assert one.boxes.tolist() == [[2, 2, 10, 8], [0, 0, 2, 20]]
    assert (one.labels.tolist(), one.crowd.tolist(), one.area.tolist()) == ([1, 0], [False, True], [48, 40])
    assert one.masks.flatten(1).sum(1).tolist() == [48, 40]
    assert empty.boxes.shape == (0, 4)
    assert empty.masks.shape == (0, 20, 30)


def test_a_json_beside_its_images(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        write(tmp_path / split / "_annotations.coco.json", [thing(1, 1, [2, 2, 8, 6])], ("a.png",))
        picture(tmp_path / split / "a.png")
    found = coco(tmp_path, Troubles("it"))
    assert [found[split].images[0].picture.parent.name for split in found] == ["train", "valid"]  # type: ignore[union-attr]
    assert coco(tmp_path / "train" / "_annotations.coco.json", Troubles("it")).keys() == {"train"}


def test_one_file_of_a_folder(home: Path) -> None:
    found = coco(home / "annotations" / "instances_val2017.json", Troubles("it"))
    assert found["train"].images[0].picture == home / "val2017" / "a.png"


def test_every_kind_of_trouble_is_counted(tmp_path: Path) -> None:
    bad = [
        thing(1, 1, [2, 2, 8, 6]),
        thing(2, 9, [2, 2, 8, 6]),
        thing(3, 1, [2, 2, 8, 6], category=5),
        thing(4, 1, [2, 2, 0, 6]),
        thing(5, 1, [40, 2, 8, 6]),
        thing(6, 1, [2, 2, 8, 6], segmentation=[[1, 1, 5, 5]]),
        {**thing(7, 1, [2, 2, 8, 6]), "bbox": [2, 2, 8]},
        thing(8, 1, [2, 2, 8, 6], segmentation={"counts": [1]}),
    ]
    write(tmp_path / "train.json", bad, ("a.png", "gone.png"))
    picture(tmp_path / "a.png")
    troubles = Troubles("it")
    [one] = coco(tmp_path, troubles)["train"].images
    assert len(one.boxes) == 1
    assert troubles.kinds == {
        "annotations of images that are not listed": (1, "annotation 2"),
        "annotations of unknown categories": (1, "annotation 3"),
        "polygons of fewer than three points": (1, "annotation 6"),
        "annotations without a box": (1, "annotation 7"),
        "masks that are neither polygons nor run-length codes": (1, "annotation 8"),
        "boxes without area": (1, "annotation 4"),
        "boxes outside their image": (1, "annotation 5"),
        "images that are missing": (1, "gone.png"),
    }


def test_what_is_no_set_is_named(tmp_path: Path, home: Path) -> None:
    with pytest.raises(UserError, match="no file or folder"):
        coco(tmp_path / "nowhere", Troubles("it"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no json"):
        coco(tmp_path / "empty", Troubles("it"))
    (tmp_path / "empty" / "train.json").write_text("[")
    with pytest.raises(UserError, match="is no json of COCO"):
        coco(tmp_path / "empty", Troubles("it"))
    write(tmp_path / "empty" / "train.json", [])
    with pytest.raises(UserError, match=r"none of its 2 images is there, such as a\.png"):
        coco(tmp_path / "empty", Troubles("it"))
    file = home / "annotations" / "instances_val2017.json"
    spec = json.loads(file.read_text())
    file.write_text(json.dumps({**spec, "categories": spec["categories"][:1]}))
    with pytest.raises(UserError, match="categories of validation are not those of train"):
        coco(home, Troubles("it"))


def test_a_test_split_that_others_score_is_passed_over(home: Path) -> None:
    file = home / "annotations" / "image_info_test2017.json"
    write(file, [])
    told = json.loads(file.read_text())
    file.write_text(json.dumps({word: told[word] for word in ("images", "categories")}))
    assert coco(home, Troubles("it")).keys() == {"train", "validation"}
    file.rename(file.with_name("image_info_train2018.json"))
    (home / "annotations" / "instances_train2017.json").unlink()
    (home / "annotations" / "captions_train2017.json").unlink()
    with pytest.raises(UserError, match="is no json of COCO: it has no 'annotations'"):
        coco(home, Troubles("it"))


def test_a_category_without_a_name_and_an_image_without_a_size(tmp_path: Path) -> None:
    file = tmp_path / "train.json"
    write(file, [thing(1, 1, [2, 2, 8, 6])], ("a.png", "b.png", "c.png"))
    told = json.loads(file.read_text())
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    del told["images"][1]["height"]
    del told["images"][2]["file_name"]
    file.write_text(json.dumps(told))
    troubles = Troubles("it")
    assert len(coco(tmp_path, troubles)["train"]) == 1
    assert troubles.kinds == {"images without id, file_name, height or width": (2, "b.png")}
    file.write_text(json.dumps({**told, "categories": [{"id": 7}]}))
    with pytest.raises(UserError, match=r"is no json of COCO: a category has no id or no name: \{'id': 7\}"):
        coco(tmp_path, Troubles("it"))


@pytest.mark.parametrize("seed", range(5))
def test_damaged_run_length_codes_are_counted(tmp_path: Path, seed: int) -> None:
    mask = torch.rand(20, 30, generator=torch.Generator().manual_seed(seed)) > (seed + 1) / 7
    if seed == 4:
        mask = torch.zeros(20, 30, dtype=torch.bool)
        mask[3:17, 4:28] = True
    whole = encoded(mask, (20, 30))["counts"].decode()
    codes = [
        *({"counts": whole, "size": [20, 30]}, {"counts": [600], "size": [20, 30]}),
        *({"counts": whole[:-1], "size": [20, 30]}, {"counts": whole + "o", "size": [20, 30]}),
        *({"counts": "\u00e9", "size": [20, 30]}, {"counts": whole, "size": [30, 20]}),
        *({"counts": [599], "size": [20, 30]}, {"counts": [-1, 601], "size": [20, 30]}),
    ]
    things = [thing(number, 1, [2, 2, 8, 6], segmentation=code) for number, code in enumerate(codes)]
    write(tmp_path / "train.json", things, ("a.png",))
    picture(tmp_path / "a.png")
    troubles = Troubles("it")
    [one] = coco(tmp_path, troubles)["train"].images
    assert torch.equal(one.masks[0], mask)
    assert len(one.masks) == 2
    kind = "run-length codes that are damaged, or of another size than their image"
    assert troubles.kinds == {kind: (6, "annotation 2")}


def test_boxes_are_float(home: Path) -> None:
    assert coco(home, Troubles("it"))["train"].images[1].boxes.dtype == torch.float32
