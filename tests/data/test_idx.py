# SPDX-License-Identifier: Apache-2.0
import gzip
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tutelage.core.error import UserError
from tutelage.data.idx import idx

PIXELS = np.random.default_rng(0).integers(0, 255, (7, 28, 20), dtype=np.uint8)
LABELS = np.array([0, 1, 9, 3, 2, 2, 0], dtype=np.uint8)


def packed(array: np.ndarray) -> bytes:
    sides = b"".join(side.to_bytes(4, "big") for side in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sides + array.tobytes()


def written(root: Path, compressed: bool = False, test: str = "t10k") -> Path:
    parts = {"train": slice(0, 5), test: slice(5, 7)}
    for prefix, rows in parts.items():
        for what, array in (("images-idx3-ubyte", PIXELS[rows]), ("labels-idx1-ubyte", LABELS[rows])):
            raw = packed(array)
            name = f"{prefix}-{what}" + (".gz" if compressed else "")
            (root / name).write_bytes(gzip.compress(raw) if compressed else raw)
    return root


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("test", ["t10k", "test"])
def test_images_and_labels(tmp_path: Path, compressed: bool, test: str) -> None:
    train, held_out = idx(written(tmp_path, compressed, test))
    assert train.images.shape == (5, 1, 28, 20)
    assert (train.images[:, 0].numpy() == PIXELS[:5]).all()
    assert (held_out.images[:, 0].numpy() == PIXELS[5:]).all()
    assert train.targets.tolist() == LABELS[:5].tolist()
    assert held_out.targets.dtype == torch.int64
    assert train.class_names == held_out.class_names == tuple("0123456789")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "{root} holds no train-labels-idx1-ubyte (or .gz)"),
        (b"", "{file} is no idx file of bytes with 1 dimensions"),
        (packed(PIXELS), "{file} is no idx file of bytes with 1 dimensions"),
        (packed(LABELS)[:-1], "{file} is damaged: 6 bytes for the shape [7]"),
        (packed(LABELS), "{images} holds 5 images, {file} 7 labels"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, change: bytes | None, message: str) -> None:
    file = written(tmp_path) / "train-labels-idx1-ubyte"
    file.unlink()
    if change is not None:
        file.write_bytes(change)
    expected = message.format(root=tmp_path, file=file, images=tmp_path / "train-images-idx3-ubyte")
    with pytest.raises(UserError, match=f"^{re.escape(expected)}$"):
        idx(tmp_path)


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    file = written(tmp_path, compressed=True) / "train-images-idx3-ubyte.gz"
    for damaged in (file.read_bytes()[:50], b"no archive"):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=re.escape(f"{file} is damaged (")):
            idx(tmp_path)
