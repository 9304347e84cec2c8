# SPDX-License-Identifier: Apache-2.0
"""MNIST, Fashion-MNIST and their kin: idx files, plain or compressed.

Reference: LeCun, Cortes, Burges, The MNIST Database, 1998 (the format is described there).
"""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tutelage.core.error import UserError
from tutelage.data.samples import Arrays, class_words

IMAGES, LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"
UNSIGNED = 0x08


def idx(root: str | Path) -> tuple[Arrays, Arrays]:
    """Return the training and test images, `[1, H, W]` uint8.

    Args:
        root: the folder of `train-images-idx3-ubyte`, `train-labels-idx1-ubyte` and their `t10k` (or `test`)
            fellows, each plain or with `.gz`.

    Raises:
        UserError: naming the file that is missing or damaged.
    """
    base = Path(root)
    train = _split(base, ("train",), None)
    return train, _split(base, ("t10k", "test"), len(train.class_names))


def _split(base: Path, prefixes: tuple[str, ...], classes: int | None) -> Arrays:
    images, labels = (_find(base, prefixes, what) for what in (IMAGES, LABELS))
    pixels, targets = read(images, 3), read(labels, 1).long()
    if len(pixels) != len(targets):
        raise UserError(f"{images} holds {len(pixels)} images, {labels} {len(targets)} labels")
    count = max(int(targets.max()) + 1, classes or 0)
    return Arrays(pixels[:, None], targets, class_words(range(count)), str(images))


def _find(base: Path, prefixes: tuple[str, ...], what: str) -> Path:
    for prefix in prefixes:
        # some copies have a dot before idx
        for name in (f"{prefix}-{what}", f"{prefix}-{what.replace('-idx', '.idx')}"):
            for file in (base / name, base / f"{name}.gz", base / "raw" / name, base / "raw" / f"{name}.gz"):
                if file.is_file():
                    return file
    raise UserError(f"{base} holds no {prefixes[0]}-{what} (or .gz)")


def read(file: Path, dimensions: int) -> Tensor:
    """Return the array of an idx file of bytes.

    Raises:
        UserError: if it is damaged, of another type, or of other dimensions.
    """
    raw = file.read_bytes()
    if file.suffix == ".gz":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{file} is damaged ({error})") from error
    head = 4 + 4 * dimensions
    if len(raw) < head or raw[:2] != b"\0\0" or raw[2] != UNSIGNED or raw[3] != dimensions:
        raise UserError(f"{file} is no idx file of bytes with {dimensions} dimensions")
    shape = [int.from_bytes(raw[at : at + 4], "big") for at in range(4, head, 4)]
    if len(raw) - head != math.prod(shape) or not len(raw) - head:
        raise UserError(f"{file} is damaged: {len(raw) - head} bytes for the shape {shape}")
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=head).reshape(shape).copy())
