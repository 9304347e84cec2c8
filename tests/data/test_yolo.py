# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest
from PIL import Image

from tutelage.core.error import UserError
from tutelage.data.annotations import Troubles
from tutelage.data.yolo import yolo


def write(home: Path, split: str, name: str, text: str | None) -> None:
    for folder in ("images", "labels"):
        (home / folder / split).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 20)).save(home / "images" / split / f"{name}.png")
    if text is not None:
        (home / "labels" / split / f"{name}.txt").write_text(text)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    write(tmp_path, "train", "a", "1 0.5 0.5 0.5 0.5\n0 0 0 0.5 0 0.5 1 0 1\n\n")
    write(tmp_path, "train", "b", None)
    write(tmp_path, "val", "c", "")
    (tmp_path / "data.yaml").write_text("names: {0: cat, 1: dog}\ntrain: images/train\nval: images/val\n")
    return tmp_path


def test_boxes_and_polygons(home: Path) -> None:
    found = yolo(home, Troubles("it"))
    assert found["train"].class_names == ("cat", "dog")
    one, empty = found["train"].images
    assert one.boxes.tolist() == [[10, 5, 30, 15], [0, 0, 20, 20]]
    assert one.labels.tolist() == [1, 0]
    assert one.masks.flatten(1).sum(1).tolist() == [200, 400]
    assert not len(empty.boxes)
    assert len(found["validation"]) == 1


def test_lists_of_images_and_names(home: Path) -> None:
    (home / "list.txt").write_text("./images/train/a.png\nimages/train/b.png\n")
    (home / "data.yaml").write_text("names: [cat, dog]\ntrain: list.txt\n")
    assert len(yolo(home / "data.yaml", Troubles("it"))["train"]) == 2


def test_troubles(home: Path) -> None:
    write(home, "train", "a", "2 0.5 0.5 0.5 0.5\n0 a b c d\n0 0.1 0.1 0.2\n0 0.5 0.5 0 0.5\n1 0.5 0.5 0.5 0.5\n")
    (home / "images/train/z.png").write_text("none")
    troubles = Troubles("it")
    found = yolo(home, troubles)["train"]
    assert len(found.images[0].boxes) == 1
    assert {kind: (count, Path(place).name) for kind, (count, place) in troubles.kinds.items()} == {
        "classes beyond the 2 that have names": (1, "a.txt:1"),
        "lines that are no numbers": (1, "a.txt:2"),
        "polygons of fewer than three points, or half a point": (1, "a.txt:3"),
        "boxes without area": (1, "a.txt:4"),
        "files that are no images": (1, "z.png"),
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: images/train", "has `names` and `train`"),
        ("names: {1: dog}\ntrain: images/train", "numbered 0 to 0"),
        ("names: [dog]\ntrain: images/nowhere", "no file or folder"),
        ("names: [dog\n", "cannot be read"),
    ],
)
def test_what_is_no_set_is_named(home: Path, text: str, said: str) -> None:
    (home / "data.yaml").write_text(text)
    with pytest.raises(UserError, match=said):
        yolo(home, Troubles("it"))


def test_two_yaml_files(home: Path) -> None:
    (home / "more.yaml").write_text("names: [a]")
    with pytest.raises(UserError, match="holds 2 yaml files"):
        yolo(home, Troubles("it"))
