# SPDX-License-Identifier: Apache-2.0
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.pictures import tree
from data.test_cifar import PIXELS, python_version
from data.test_idx import PIXELS as DIGITS
from data.test_idx import written
from tutelage.core.error import UserError
from tutelage.data.torchvision import as_pixels, torchvision


def test_a_set_with_train_and_test(tmp_path: Path) -> None:
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    written(tmp_path / "MNIST" / "raw")
    sets = torchvision("MNIST", tmp_path)
    assert list(sets) == ["train", "validation"]
    train = sets["train"]
    assert train.read(3).shape == (1, 28, 20)
    assert (train.read(3)[0].numpy() == DIGITS[3]).all()
    assert train.targets.tolist() == [0, 1, 9, 3, 2]
    assert train.class_names[0] == "0 - zero"
    kept = train.keep(torch.tensor([4, 0]))
    assert kept.targets.tolist() == [2, 0]
    assert (kept.read(0)[0].numpy() == DIGITS[4]).all()
    assert kept.name(0) == "MNIST(True)[4]"
    assert kept.relabel(torch.tensor([-1, 0])).targets.tolist() == [-1, 0]


def test_a_set_with_named_splits(tmp_path: Path) -> None:
    folders = {f"{part}/{name}": 1 for part in ("train", "val") for name in WORDNET}
    tree(tmp_path / "imagenette2", folders, ending="jpeg")
    sets = torchvision("Imagenette", tmp_path)
    assert list(sets) == ["train", "validation"]
    assert sets["train"].read(0).shape == (3, 8, 8)
    assert sets["train"].targets.tolist() == list(range(10))
    assert "tench" in sets["train"].class_names


WORDNET = (
    *("n01440764", "n02102040", "n02979186", "n03000684", "n03028079"),
    *("n03394916", "n03417042", "n03425413", "n03445777", "n03888257"),
)


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "RGBA"])
def test_pixels_of_any_image(mode: str) -> None:
    assert as_pixels(Image.new(mode, (5, 4))).shape == (1 if mode == "L" else 3, 4, 5)


def test_pixels_of_arrays_and_tensors() -> None:
    assert as_pixels(np.zeros((4, 5, 3), np.uint8)).shape == (3, 4, 5)
    assert as_pixels(torch.zeros(4, 5)).shape == (1, 4, 5)
    assert as_pixels(torch.zeros(3, 4, 5)).shape == (3, 4, 5)
    assert (as_pixels(PIXELS[0].transpose(1, 2, 0)).numpy() == PIXELS[0]).all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("MNISTT", "data.source: torchvision has no set 'MNISTT'; did you mean "),
        ("Flowers102", "data.source: torchvision's Flowers102 in "),
        ("CIFAR10", "data.source: torchvision's CIFAR10 in "),
        ("VOCDetection", "data.source: torchvision's VOCDetection in "),
    ],
)
def test_what_cannot_be_had_is_named(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        torchvision(name, tmp_path)
    assert name == "MNISTT" or "data.download: true fetches it" in str(caught.value)


def test_a_set_that_is_not_classification(tmp_path: Path) -> None:
    python_version(tmp_path, "cifar10")
    with pytest.raises(UserError, match="torchvision's FakeData has no split for training"):
        torchvision("FakeData", tmp_path)
