# SPDX-License-Identifier: Apache-2.0
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.pictures import picture, tree
from tutelage.core.error import UserError
from tutelage.data.folder import ENDINGS, Files, folder, images_below, read_image, unlabelled


def refused(root: Path, message: str, **options: float) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        folder(root, **options)  # type: ignore[arg-type]


def names(files: Files, root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in files.paths]


def test_splits_and_classes_are_read_from_folder_names(tmp_path: Path) -> None:
    root = tree(tmp_path, {"train/dog": 2, "train/cat": 3, "val/cat": 1, "val/dog": 1, "test/dog": 1, "test/cat": 1})
    sets = folder(root)
    assert list(sets) == ["train", "validation", "test"]
    assert sets["train"].class_names == ("cat", "dog")
    assert sets["train"].targets.tolist() == [0, 0, 0, 1, 1]
    assert names(sets["train"], root)[0] == "train/cat/0.png"
    assert sets["validation"].targets.tolist() == [0, 1]
    assert names(sets["test"], root) == ["test/cat/0.png", "test/dog/0.png"]


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_validation_has_several_names(tmp_path: Path, name: str) -> None:
    root = tree(tmp_path, {"training/a": 2, f"{name}/a": 1})
    assert len(folder(root)["validation"]) == 1


def test_a_test_split_alone_serves_for_validation(tmp_path: Path) -> None:
    sets = folder(tree(tmp_path, {"train/a": 2, "test/a": 1}))
    assert list(sets) == ["train", "validation"]


@pytest.mark.parametrize("above", ["", "train/"])
def test_without_validation_a_fixed_stratified_share_is_held_out(tmp_path: Path, above: str) -> None:
    root = tree(tmp_path, {f"{above}a": 20, f"{above}b": 10})
    sets = folder(root, validation_share=0.3)
    assert sets["validation"].targets.bincount().tolist() == [6, 3]
    assert sets["train"].targets.bincount().tolist() == [14, 7]
    assert set(names(sets["train"], root)).isdisjoint(names(sets["validation"], root))
    torch.manual_seed(7)
    assert folder(root, validation_share=0.3)["validation"].paths == sets["validation"].paths


def test_files_are_found_deeper_and_others_left_out(tmp_path: Path) -> None:
    picture(tmp_path / "a" / "more" / "1.PNG", 1)
    picture(tmp_path / "a" / ".hidden" / "2.png", 2)
    (tmp_path / "a" / "notes.txt").write_text("x")
    assert [path.name for path in images_below(tmp_path)] == ["1.PNG"]


def test_pixels_are_read_in_colour_or_grey(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    path = tmp_path / "x.png"
    Image.fromarray(pixels).save(path)
    colour = read_image(path, 3)
    assert colour.shape == (3, 4, 6)
    assert (colour.permute(1, 2, 0).numpy() == pixels).all()
    assert read_image(path, 1).shape == (1, 4, 6)


def test_grey_palette_and_transparent_images_become_colour(tmp_path: Path) -> None:
    for mode in ("L", "P", "RGBA", "1", "I;16"):
        path = tmp_path / f"{mode.replace(';', '')}.png"
        Image.new(mode, (3, 2)).save(path)
        assert read_image(path, 3).shape == (3, 2, 3)


def test_the_cameras_note_turns_the_image(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (6, 4)).save(path, exif=exif)
    assert read_image(path, 3).shape == (3, 6, 4)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n", b"GIF89a"])
def test_what_is_no_image_raises_oserror(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with pytest.raises(OSError, match=r".+"):
        read_image(path, 3)


def test_a_missing_folder(tmp_path: Path) -> None:
    refused(tmp_path / "no", f"data.source: the folder {tmp_path / 'no'} does not exist")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", f"data.source: the folder {tmp_path / 'file'} is a file")


def test_a_folder_without_classes(tmp_path: Path) -> None:
    refused(tmp_path, f"{tmp_path} holds no folder a class: it is empty")
    picture(tmp_path / "x.png", 0)
    refused(tmp_path, f"{tmp_path} holds no folder a class: images lie in it directly: make a folder a class")


def test_splits_without_train(tmp_path: Path) -> None:
    tree(tmp_path, {"val/a": 1, "test/a": 1})
    refused(tmp_path, f"{tmp_path} has val, test but no folder train")


def test_an_empty_class(tmp_path: Path) -> None:
    tree(tmp_path, {"train/a": 1, "val/a": 1})
    (tmp_path / "train" / "b").mkdir()
    where = tmp_path / "train" / "b"
    refused(tmp_path, f"class 'b' is empty: no image in {where} ({' '.join(sorted(ENDINGS))})")


def test_a_class_missing_from_validation(tmp_path: Path) -> None:
    tree(tmp_path, {f"train/{name}": 1 for name in "abcde"} | {"val/a": 1})
    refused(tmp_path, f"{tmp_path / 'val'} lacks 4 of 5 classes: b, c, d, ...")


def test_a_class_unknown_in_train(tmp_path: Path) -> None:
    tree(tmp_path, {"train/horse": 1, "val/horse": 1, "val/hrose": 1})
    refused(
        tmp_path,
        f"{tmp_path / 'val' / 'hrose'}: class 'hrose' is not among the training classes; did you mean horse?",
    )


def test_nothing_left_to_hold_out(tmp_path: Path) -> None:
    tree(tmp_path, {"a": 3, "b": 1})
    refused(tmp_path, "class 'b' has a single image: none is left for validation; add some, or a folder val")
    refused(
        tmp_path,
        f"{tmp_path} has no validation images, and data.validation_share is 1.5: it must lie in (0, 1)",
        validation_share=1.5,
    )


def test_training_files_among_those_scored(tmp_path: Path) -> None:
    root = tree(tmp_path, {"train/a": 3, "train/b": 3, "val/a": 2, "val/b": 2}, seed=5)
    assert len(folder(root)["validation"]) == 4
    shutil.copy(root / "train/b/1.png", root / "val/a/twin.png")
    shutil.copy(root / "train/a/2.png", root / "val/b/twin.png")
    refused(
        root,
        f"2 of 6 validation images are also training images, so scores would flatter: {root / 'val/a/twin.png'} is "
        f"{root / 'train/b/1.png'}; remove them, or set data.allow_duplicates: true",
    )
    assert len(folder(root, allow_duplicates=True)["validation"]) == 6


def test_duplicates_across_a_split_made_here_are_found(tmp_path: Path) -> None:
    root = tree(tmp_path, {"a": 1})
    for number in range(1, 6):
        shutil.copy(root / "a/0.png", root / f"a/{number}.png")
    with pytest.raises(UserError, match="of 1 validation images are also training images"):
        folder(root)


def test_unlabelled_images(tmp_path: Path) -> None:
    found = unlabelled(tree(tmp_path, {"x": 2, "y/z": 1}), ("a", "b"))
    assert found.targets.tolist() == [-1, -1, -1]
    assert found.class_names == ("a", "b")
    with pytest.raises(UserError, match=re.escape(f"data.unlabelled: the folder {tmp_path / 'no'} does not exist")):
        unlabelled(tmp_path / "no", ())
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=re.escape(f"data.unlabelled: no image below {tmp_path / 'empty'} (.bmp")):
        unlabelled(tmp_path / "empty", ())
