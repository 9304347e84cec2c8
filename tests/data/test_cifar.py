# SPDX-License-Identifier: Apache-2.0
import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tutelage.core.error import UserError
from tutelage.data.cifar import EDITIONS, cifar, read_pickle

DRAW = np.random.default_rng(0)
PIXELS = DRAW.integers(0, 255, (12, 3, 32, 32), dtype=np.uint8)


def write_pickle(path: Path, value: Any, protocol: int = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(value, protocol=protocol))


def python_version(root: Path, edition: str, protocol: int = 2) -> Path:
    """The authors' layout: byte strings as keys, rows of 3,072 bytes."""
    one = EDITIONS[edition]
    place = root / one.folders[0]
    count = 2
    for number, name in enumerate((*one.train, *one.test)):
        rows = PIXELS[number * count : (number + 1) * count].reshape(count, -1)
        write_pickle(place / name, {b"data": rows, one.label: [number % 3, one.classes - 1]}, protocol)
    meta, key = one.names
    write_pickle(place / meta, {key: [f"class {n}".encode() for n in range(one.classes)]}, protocol)
    return root


def binary_version(root: Path, edition: str) -> Path:
    one = EDITIONS[edition]
    place = root / one.folders[1]
    place.mkdir(parents=True)
    for number, name in enumerate((*one.binary_train, *one.binary_test)):
        rows = PIXELS[number * 2 : number * 2 + 2].reshape(2, -1)
        labels = np.array([[number % 3], [one.classes - 1]], dtype=np.uint8)
        coarse = [np.full((2, 1), 7, dtype=np.uint8)] * (one.binary_labels - 1)
        (place / name).write_bytes(np.concatenate([*coarse, labels, rows], axis=1).tobytes())
    return root


@pytest.mark.parametrize("edition", ["cifar10", "cifar100"])
@pytest.mark.parametrize("version", [python_version, binary_version])
def test_both_versions_give_the_same_images(tmp_path: Path, edition: str, version: Any) -> None:
    train, test = cifar(version(tmp_path, edition), edition)
    parts = len(EDITIONS[edition].train)
    assert train.images.dtype == torch.uint8
    assert (train.images.numpy() == PIXELS[: 2 * parts]).all()
    assert (test.images.numpy() == PIXELS[2 * parts : 2 * parts + 2]).all()
    last = EDITIONS[edition].classes - 1
    assert train.targets.tolist() == [label for n in range(parts) for label in (n % 3, last)]
    assert test.targets.tolist() == [parts % 3, last]
    assert len(train.class_names) == EDITIONS[edition].classes
    assert train.class_names[3] == ("class 3" if version is python_version else "3")


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_every_protocol_of_pickle_is_read(tmp_path: Path, protocol: int) -> None:
    train, _ = cifar(python_version(tmp_path, "cifar10", protocol) / "cifar-10-batches-py", "cifar10")
    assert (train.images.numpy() == PIXELS[:10]).all()


class Trap:
    """Unpickled, it calls a function."""

    def __init__(self, call: Any, *args: Any) -> None:
        self.call = call, args

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("call", [os.mkdir, eval, np.fromfile, Path])
def test_a_pickle_that_runs_something_is_refused(tmp_path: Path, call: Any) -> None:
    python_version(tmp_path, "cifar10")
    file = tmp_path / "cifar-10-batches-py" / "data_batch_2"
    write_pickle(file, {b"data": Trap(call, str(tmp_path / "made"))})
    with pytest.raises(UserError, match=r"is no plain table of arrays \(it names .*\): refused, it could run code"):
        cifar(tmp_path, "cifar10")
    assert not (tmp_path / "made").exists()


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    expected = (
        f"{tmp_path} holds no cifar10: expected data_batch_1 (Python version) or data_batch_1.bin (binary version), "
        "there or in cifar-10-batches-py"
    )
    with pytest.raises(UserError, match=f"^{re.escape(expected)}$"):
        cifar(tmp_path, "cifar10")
    place = python_version(tmp_path, "cifar10") / "cifar-10-batches-py"
    (place / "data_batch_3").unlink()
    with pytest.raises(
        UserError, match=re.escape(f"{place / 'data_batch_3'} is missing: is the archive unpacked as a whole?")
    ):
        cifar(tmp_path, "cifar10")
    (place / "data_batch_3").write_bytes((place / "data_batch_1").read_bytes()[:500])
    with pytest.raises(UserError, match=re.escape(str(place / "data_batch_3"))):
        cifar(tmp_path, "cifar10")
    write_pickle(place / "data_batch_3", {b"data": PIXELS[0]})
    with pytest.raises(
        UserError, match=re.escape(f"{place / 'data_batch_3'} is no batch of cifar10 (KeyError(b'labels'))")
    ):
        cifar(tmp_path, "cifar10")


def test_a_cut_binary_file_is_named(tmp_path: Path) -> None:
    place = binary_version(tmp_path, "cifar100") / "cifar-100-binary"
    (place / "train.bin").write_bytes(b"\0" * 100)
    with pytest.raises(UserError, match=re.escape(f"{place / 'train.bin'} is no binary batch of cifar100: 100 bytes")):
        cifar(tmp_path, "cifar100")


def test_labels_out_of_range_are_named(tmp_path: Path) -> None:
    place = python_version(tmp_path, "cifar10") / "cifar-10-batches-py"
    write_pickle(place / "test_batch", {b"data": PIXELS[:2].reshape(2, -1), b"labels": [3, 10]})
    said = f"{place / 'test_batch'}: image 1 has class 10, out of range: the classes are 0 to 9"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        cifar(tmp_path, "cifar10")
    write_pickle(place / "test_batch", {b"data": PIXELS[:2].reshape(2, -1), b"labels": [3]})
    with pytest.raises(UserError, match=f"^{re.escape(str(place / 'test_batch'))}: 1 labels for 2 images$"):
        cifar(tmp_path, "cifar10")


def test_a_pickle_of_something_else(tmp_path: Path) -> None:
    write_pickle(tmp_path / "x", [1, 2])
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'x'} holds list, not a mapping")):
        read_pickle(tmp_path / "x")
