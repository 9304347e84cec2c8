# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest
from PIL import Image

from tutelage.core.error import UserError
from tutelage.data.annotations import Troubles
from tutelage.data.voc import voc

THING = "<object><name>{}</name><difficult>{}</difficult><bndbox>{}</bndbox></object>"


def box(left: int, top: int, right: int, bottom: int) -> str:
    return f"<xmin>{left}</xmin><ymin>{top}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax>"


def write(home: Path, name: str, *things: str) -> None:
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (home / folder).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (30, 20)).save(home / "JPEGImages" / f"{name}.jpg")
    size = "<size><width>30</width><height>20</height></size>"
    (home / "Annotations" / f"{name}.xml").write_text(f"<annotation>{size}{''.join(things)}</annotation>")


def test_pixels_count_from_one_and_difficult_ones_from_nothing(tmp_path: Path) -> None:
    write(tmp_path, "a", THING.format("dog", 0, box(1, 1, 2, 2)), THING.format("cat", 1, box(5, 6, 30, 20)))
    write(tmp_path, "b")
    (tmp_path / "ImageSets/Main/train.txt").write_text("a\n")
    (tmp_path / "ImageSets/Main/val.txt").write_text("b\n")
    found = voc(tmp_path, Troubles("it"))
    [one], [empty] = found["train"].images, found["validation"].images
    assert found["train"].class_names == found["validation"].class_names == ("cat", "dog")
    assert one.boxes.tolist() == [[0, 0, 2, 2], [4, 5, 30, 20]]
    assert (one.labels.tolist(), one.crowd.tolist(), one.size) == ([1, 0], [False, True], (20, 30))
    assert not len(empty.boxes)


def test_troubles(tmp_path: Path) -> None:
    write(tmp_path, "a", THING.format("dog", 0, box(5, 5, 4, 9)), "<object><name>dog</name></object>")
    write(tmp_path, "broken")
    (tmp_path / "Annotations/broken.xml").write_text("<annotation>")
    write(tmp_path, "gone")
    (tmp_path / "JPEGImages/gone.jpg").unlink()
    (tmp_path / "ImageSets/Main/trainval.txt").write_text("a\nbroken\ngone\nnone\n")
    troubles = Troubles("it")
    assert len(voc(tmp_path, troubles)["train"]) == 1
    assert {kind: count for kind, (count, _) in troubles.kinds.items()} == {
        "files that are no XML": 1,
        "images that are missing": 1,
        "listed images without annotation": 1,
        "things without a box": 1,
        "boxes without area": 1,
    }


def test_what_is_no_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder Annotations"):
        voc(tmp_path, Troubles("it"))
    (tmp_path / "Annotations").mkdir()
    with pytest.raises(UserError, match="none of its images"):
        voc(tmp_path, Troubles("it"))


def test_without_lists_everything_is_learnt_from(tmp_path: Path) -> None:
    write(tmp_path, "a", THING.format("dog", 0, box(1, 1, 9, 9)))
    assert voc(tmp_path, Troubles("it")).keys() == {"train"}
