# SPDX-License-Identifier: Apache-2.0
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tutelage.core.error import UserError
from tutelage.data import masks, segmentation
from tutelage.data.load import Spec, load
from tutelage.data.segmentation import ClassMaps, Options, read

CLASSES = np.arange(12, dtype=np.uint8).reshape(3, 4) % 3


def picture(path: Path, size: tuple[int, int] = (3, 4)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), 100, np.uint8)).save(path)


def grey(path: Path, values: np.ndarray[Any, Any] = CLASSES) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def palette(path: Path, values: np.ndarray[Any, Any] = CLASSES) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("P", values.shape[::-1])
    image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0] + [7] * 759)
    image.putdata(values.flatten().tolist())
    image.save(path)


def colours(path: Path, values: np.ndarray[Any, Any] = CLASSES) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = np.array([[128, 64, 128], [0, 0, 230], [0, 0, 0]], np.uint8)
    Image.fromarray(table[values]).save(path)


def sets(kind: str, place: Path, *, on_error: Any = "raise", **options: Any) -> dict[str, ClassMaps]:
    return read(kind, str(place), Spec(f"{kind}:{place}", segmentation=options, on_error=on_error))


# layouts


def as_folders(root: Path, mask: Callable[[Path], None], image: str, other: str, after: str = "") -> None:
    """Two training images and one to validate on; `{split}` stands in the folders."""
    for split, names in (("train", ("a", "b")), ("val", ("c",))):
        for name in names:
            picture(root / image.format(split=split) / f"{name}.jpg")
            mask(root / other.format(split=split) / f"{name}{after}.png")


@pytest.mark.parametrize(
    ("image", "other", "after"),
    [
        ("images/{split}", "masks/{split}", ""),
        ("{split}/images", "{split}/labels", "_mask"),
        ("{split}_images", "{split}_labels", ""),
        ("{split}", "{split}annot", ""),
        ("701_StillsRaw_full/{split}", "LabeledApproved_full/{split}", "_L"),
    ],
)
def test_layouts_are_told_by_their_folders(tmp_path: Path, image: str, other: str, after: str) -> None:
    as_folders(tmp_path, grey, image, other, after)
    found = sets("masks", tmp_path)
    assert {split: len(one) for split, one in found.items()} == {"train": 2, "validation": 1}
    assert found["train"].class_names == ("0", "1", "2")
    assert found["train"].read(1).classes.tolist() == CLASSES.tolist()
    assert Path(found["validation"].name(0)).name == "c.jpg"


def test_folders_of_other_names_are_given(tmp_path: Path) -> None:
    as_folders(tmp_path, grey, "photos/{split}", "truth/{split}")
    assert len(sets("masks", tmp_path, images="photos", masks="truth")["train"]) == 2
    with pytest.raises(UserError, match="holds no images beside masks"):
        sets("masks", tmp_path)
    with pytest.raises(UserError, match=re.escape(f"data.segmentation.images: {tmp_path} has no folder 'photo'; did")):
        sets("masks", tmp_path, images="photo", masks="truth")


def test_without_splits_some_images_are_held_out(tmp_path: Path) -> None:
    for name in "abcdefghij":
        picture(tmp_path / "images" / f"{name}.jpg")
        grey(tmp_path / "masks" / f"{name}.png")
    assert list(sets("masks", tmp_path)) == ["train"]
    found = load({"source": f"masks:{tmp_path}", "validation_share": 0.2, "batch_size": 2}, task="segmentation")
    assert (len(found.train.samples), len(found.validation.samples)) == (8, 2)


def test_voc_is_read_by_its_lists(tmp_path: Path) -> None:
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for split, names in (("train", ("a", "b")), ("val", ("c",)), ("test", ("d",))):
        (lists / f"{split}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            picture(tmp_path / "JPEGImages" / f"{name}.jpg")
            if split != "test":
                edge = CLASSES.copy()
                edge[0, 0] = 255
                grey(tmp_path / "SegmentationClass" / f"{name}.png", edge)
    found = sets("voc", tmp_path)
    assert {split: len(one) for split, one in found.items()} == {"train": 2, "validation": 1}
    assert found["train"].class_names[:2] == ("background", "aeroplane")
    assert len(found["train"].class_names) == 21
    assert found["train"].read(0).classes[0].tolist() == [-1, 1, 2, 0]
    (lists / "train.txt").unlink()
    with pytest.raises(UserError, match="is it a VOC folder"):
        sets("voc", tmp_path)


@pytest.mark.parametrize(("word", "values"), [("labelTrainIds", (0, 18, 255)), ("labelIds", (7, 33, 4))])
def test_cityscapes_in_both_numberings(tmp_path: Path, word: str, values: tuple[int, int, int]) -> None:
    for split, city in (("train", "aachen"), ("val", "ulm")):
        for name in ("0_0", "0_1"):
            picture(tmp_path / "leftImg8bit" / split / city / f"{city}_{name}_leftImg8bit.png", (1, 3))
            grey(tmp_path / "gtFine" / split / city / f"{city}_{name}_gtFine_{word}.png", np.array([values], np.uint8))
    found = sets("cityscapes", tmp_path)
    assert found["train"].class_names[0] == "road"
    assert len(found["train"].class_names) == 19
    assert found["validation"].read(1).classes.tolist() == [[0, 18, -1]]


def test_camvid_has_eleven_classes_and_void(tmp_path: Path) -> None:
    as_folders(tmp_path, lambda path: grey(path, np.array([[0, 10, 11, 255]] * 3, np.uint8)), "{split}", "{split}annot")
    found = sets("camvid", tmp_path)["train"]
    assert len(found.class_names) == 11
    assert found.read(0).classes[0].tolist() == [0, 10, -1, -1]


def test_masks_of_a_palette_are_read_as_numbers(tmp_path: Path) -> None:
    as_folders(tmp_path, palette, "images/{split}", "masks/{split}")
    assert sets("masks", tmp_path, classes=3)["train"].read(0).classes.tolist() == CLASSES.tolist()


def test_masks_in_colour(tmp_path: Path) -> None:
    as_folders(tmp_path, colours, "images/{split}", "masks/{split}")
    given = {"road": [128, 64, 128], "person": [0, 0, 230], "void": [0, 0, 0]}
    found = sets("masks", tmp_path, colors=given)["train"]
    assert found.class_names == ("road", "person")
    expected = np.where(CLASSES == 2, -1, CLASSES.astype(int))
    assert found.read(0).classes.tolist() == expected.tolist()
    (tmp_path / "label_colors.txt").write_text("128 64 128\troad\n0 0 230 a person\n0 0 0 Void\n")
    found = sets("masks", tmp_path)["train"]
    assert found.class_names == ("road", "a person")
    assert found.read(0).classes.tolist() == expected.tolist()


# classes


def test_names_stand_in_a_list_a_file_or_the_folder(tmp_path: Path) -> None:
    as_folders(tmp_path, grey, "images/{split}", "masks/{split}")
    assert sets("masks", tmp_path, classes=["a", "b", "c"])["train"].class_names == ("a", "b", "c")
    (tmp_path / "classes.json").write_text(json.dumps(["sky", "tree", "Unlabelled(2, ignore)"]))
    found = sets("masks", tmp_path)["train"]
    assert found.class_names == ("sky", "tree")
    assert set(found.read(0).classes.flatten().tolist()) == {0, 1, -1}
    other = tmp_path / "names.txt"
    other.write_text("x\ny\nz\n")
    assert sets("masks", tmp_path, classes=str(other))["train"].class_names == ("x", "y", "z")


def test_values_and_names_may_be_ignored(tmp_path: Path) -> None:
    as_folders(tmp_path, grey, "images/{split}", "masks/{split}")
    found = sets("masks", tmp_path, classes=["a", "b"], ignore=[2])["train"]
    assert set(found.read(0).classes.flatten().tolist()) == {0, 1, -1}
    found = sets("masks", tmp_path, classes=["a", "b", "c"], ignore=["b"])["train"]
    assert found.class_names == ("a", "c")
    assert found.read(0).classes[0].tolist() == [0, -1, 1, 0]
    found = sets("masks", tmp_path, first=1)["train"]  # as ADE20K counts
    assert found.class_names == ("0", "1")
    assert found.read(0).classes[0].tolist() == [-1, 0, 1, -1]


# what is wrong


def spoilt(root: Path, mask: np.ndarray[Any, Any]) -> Path:
    as_folders(root, grey, "images/{split}", "masks/{split}")
    grey(root / "masks" / "train" / "b.png", mask)
    return root


def test_a_mask_of_another_size_is_named(tmp_path: Path) -> None:
    spoilt(tmp_path, np.zeros((2, 4), np.uint8))
    message = (
        f"masks:{tmp_path} (train): 1 masks of another size than their image (first "
        f"{tmp_path}/images/train/b.jpg: its mask has 2 x 4 pixels, the image 3 x 4); "
    )
    with pytest.raises(UserError, match=re.escape(message)):
        sets("masks", tmp_path, classes=3)


def test_a_class_out_of_range_is_named(tmp_path: Path) -> None:
    spoilt(tmp_path, np.array([[0, 9, 9, 7]] * 3, np.uint8))
    with pytest.raises(UserError, match=r"b.jpg: values 9, 7 of 9 pixels stand for no class; classes are 0 to 2"):
        sets("masks", tmp_path, classes=3)


def test_an_unknown_colour_is_named(tmp_path: Path) -> None:
    as_folders(tmp_path, colours, "images/{split}", "masks/{split}")
    with pytest.raises(UserError, match=r"colour \(0, 0, 0\) of 4 pixels stands for no class; name it in data.segm"):
        sets("masks", tmp_path, colors={"road": [128, 64, 128], "person": [0, 0, 230]})
    with pytest.raises(UserError, match=r"the mask is a colour image \(RGB\): say what its colours mean"):
        sets("masks", tmp_path, classes=3)


def test_masks_of_a_large_set_are_looked_at_when_their_turn_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoilt(tmp_path, np.array([[0, 9, 9, 7]] * 3, np.uint8))
    monkeypatch.setattr(segmentation, "CHECKED", 23)
    found = load({"source": f"masks:{tmp_path}", "batch_size": 2, "segmentation": {"classes": 3}}, task="segmentation")
    with pytest.raises(UserError, match=r"b.jpg: values 9, 7 of 9 pixels stand for no class; .* data.on_error: skip"):
        list(found.train.epoch(0))
    spoilt(tmp_path, np.zeros((2, 4), np.uint8))
    with pytest.raises(UserError, match="1 masks of another size"):
        sets("masks", tmp_path, classes=3)


def test_faults_are_left_out_where_that_is_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spoilt(tmp_path, np.zeros((2, 4), np.uint8))
    found = sets("masks", tmp_path, on_error="skip", classes=3)
    assert [Path(found["train"].name(n)).stem for n in range(len(found["train"]))] == ["a"]
    assert "1 masks of another size than their image" in caplog.text


def test_a_broken_file_is_counted(tmp_path: Path) -> None:
    spoilt(tmp_path, CLASSES)
    (tmp_path / "masks" / "train" / "a.png").write_text("no picture")
    with pytest.raises(UserError, match=r"1 images or masks that cannot be read \(first .*a.jpg: no image\)"):
        sets("masks", tmp_path, classes=3)


def test_images_without_a_mask_are_unlabelled(tmp_path: Path) -> None:
    as_folders(tmp_path, grey, "images/{split}", "masks/{split}")
    (tmp_path / "masks" / "train" / "b.png").unlink()
    found = sets("masks", tmp_path)["train"]
    assert found.targets.tolist() == [0, -1]
    assert (found.read(1).classes == -1).all()
    (tmp_path / "masks" / "train" / "a.png").unlink()
    with pytest.raises(UserError, match=r"none of 2 images has a mask, such as .*a.jpg"):
        sets("masks", tmp_path, classes=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clases": 3}, "data.segmentation.clases is not known; did you mean classes?"),
        ({"classes": ["a", "a", "b"]}, "data.segmentation.classes: 'a' is there twice"),
        ({"classes": "no.txt"}, "data.segmentation.classes: no file no.txt"),
        ({"classes": ["void"]}, "data.segmentation.classes: no class is left"),
        ({"classes": ["a"], "colors": {"a": [1, 2]}}, "data.segmentation.colors.a: red, green and blue"),
        ({"classes": ["a", "b"], "colors": {"a": [1, 2, 3]}}, "data.segmentation.colors: the class 'b' has none"),
        ({"colors": [1]}, "data.segmentation.colors gives red, green and blue by class name"),
        ({"scenes": [1]}, "data.segmentation.scenes is [to train on, to validate on], not [1]"),
        ({"multiple": 0}, "data.segmentation.multiple counts pixels, at least 1, not 0"),
    ],
)
def test_options_that_make_no_sense(tmp_path: Path, options: Mapping[str, Any], message: str) -> None:
    as_folders(tmp_path, grey, "images/{split}", "masks/{split}")
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        sets("masks", tmp_path, **options)


def test_no_folder_and_no_images(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"no folder {re.escape(str(tmp_path / 'gone'))}"):
        sets("masks", tmp_path / "gone")
    (tmp_path / "images" / "train").mkdir(parents=True)
    (tmp_path / "masks" / "train").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no images"):
        sets("masks", tmp_path)


def test_codes_say_what_values_mean() -> None:
    codes = masks.Codes.of({3: 1, 0: 0, 7: -1})
    assert codes.decode(torch.tensor([[7, 3, 0]])).tolist() == [[-1, 1, 0]]
    with pytest.raises(ValueError, match="value 4 of 2 pixels stands for no class"):
        codes.decode(torch.tensor([4, 4, 0]))
    assert Options.parse({"ignore": 3}).ignore == (3,)
