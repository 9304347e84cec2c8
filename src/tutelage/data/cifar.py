# SPDX-License-Identifier: Apache-2.0
"""CIFAR-10 and CIFAR-100 as their authors distribute them: Python pickles or binary files.

Reference: Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
"""

import io
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tutelage.core.error import UserError
from tutelage.data.samples import Arrays, class_words

SIDE = 32
PIXELS = 3 * SIDE * SIDE


@dataclass(frozen=True)
class Edition:
    """How one of the two sets lies in its files."""

    folders: tuple[str, ...]
    train: tuple[str, ...]
    test: tuple[str, ...]
    label: bytes
    names: tuple[str, bytes]
    binary_train: tuple[str, ...]
    binary_test: tuple[str, ...]
    binary_labels: int
    binary_names: str
    classes: int


EDITIONS = {
    "cifar10": Edition(
        folders=("cifar-10-batches-py", "cifar-10-batches-bin"),
        train=tuple(f"data_batch_{number}" for number in range(1, 6)),
        test=("test_batch",),
        label=b"labels",
        names=("batches.meta", b"label_names"),
        binary_train=tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
        binary_test=("test_batch.bin",),
        binary_labels=1,
        binary_names="batches.meta.txt",
        classes=10,
    ),
    "cifar100": Edition(
        folders=("cifar-100-python", "cifar-100-binary"),
        train=("train",),
        test=("test",),
        label=b"fine_labels",
        names=("meta", b"fine_label_names"),
        binary_train=("train.bin",),
        binary_test=("test.bin",),
        binary_labels=2,  # the coarse label first, then the fine one
        binary_names="fine_label_names.txt",
        classes=100,
    ),
}


def cifar(root: str | Path, edition: str) -> tuple[Arrays, Arrays]:
    """Return the training and test images, `[3, 32, 32]` uint8, in the order of the files.

    Args:
        root: the folder of the batches, or the one above it.
        edition: `cifar10` or `cifar100`.

    Raises:
        UserError: if files are missing, damaged, or hold anything but arrays and plain values.
    """
    one = EDITIONS[edition]
    base = Path(root)
    places = [base, *(base / name for name in one.folders)]
    for place in places:
        if (place / one.train[0]).is_file():
            return _pickled(place, one.train, one, edition), _pickled(place, one.test, one, edition)
        if (place / one.binary_train[0]).is_file():
            return _binary(place, one.binary_train, one, edition), _binary(place, one.binary_test, one, edition)
    raise UserError(
        f"{base} holds no {edition}: expected {one.train[0]} (Python version) or {one.binary_train[0]} "
        f"(binary version), there or in {one.folders[0]}"
    )


def _pickled(place: Path, files: Sequence[str], one: Edition, edition: str) -> Arrays:
    pixels, labels = [], []
    for name in files:
        found = read_pickle(_present(place / name))
        try:
            pixels.append(np.asarray(found[b"data"], dtype=np.uint8).reshape(-1, 3, SIDE, SIDE))
            labels += [int(label) for label in found[one.label]]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{place / name} is no batch of {edition} ({error!r})") from error
    meta, key = one.names
    words = class_words(range(one.classes))
    if (place / meta).is_file():
        words = tuple(word.decode() for word in read_pickle(place / meta)[key])
    return _checked(np.concatenate(pixels), labels, words, one, place / files[0])


def _binary(place: Path, files: Sequence[str], one: Edition, edition: str) -> Arrays:
    rows = []
    for name in files:
        raw = np.frombuffer(_present(place / name).read_bytes(), dtype=np.uint8)
        if not len(raw) or len(raw) % (one.binary_labels + PIXELS):
            raise UserError(f"{place / name} is no binary batch of {edition}: {len(raw)} bytes")
        rows.append(raw.reshape(-1, one.binary_labels + PIXELS))
    table = np.concatenate(rows)
    words = class_words(range(one.classes))
    if (place / one.binary_names).is_file():
        words = tuple((place / one.binary_names).read_text().split())
    pixels = table[:, one.binary_labels :].reshape(-1, 3, SIDE, SIDE)
    return _checked(pixels, table[:, one.binary_labels - 1].tolist(), words, one, place / files[0])


def _present(file: Path) -> Path:
    if not file.is_file():
        raise UserError(f"{file} is missing: is the archive unpacked as a whole?")
    return file


def _checked(pixels: Any, labels: list[int], words: tuple[str, ...], one: Edition, file: Path) -> Arrays:
    if len(words) != one.classes:
        raise UserError(f"{file.parent}: {len(words)} class names for {one.classes} classes")
    if len(labels) != len(pixels):
        raise UserError(f"{file}: {len(labels)} labels for {len(pixels)} images")
    wrong = next((number for number, label in enumerate(labels) if not 0 <= label < one.classes), None)
    if wrong is not None:
        raise UserError(
            f"{file}: image {wrong} has class {labels[wrong]}, out of range: the classes are 0 to {one.classes - 1}"
        )
    return Arrays(torch.from_numpy(pixels.copy()), torch.tensor(labels), words, str(file))


class _Plain(pickle.Unpickler):
    """Reads arrays, numbers, strings and containers; nothing a pickle names is called but numpy's own."""

    ALLOWED = frozenset(
        {
            ("numpy", "dtype"),
            ("numpy", "ndarray"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        # files written by old versions name the module by its old path
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def read_pickle(file: Path) -> dict[bytes, Any]:
    """Return the mapping in a pickle of arrays and plain values.

    Raises:
        UserError: if the file is damaged, or names anything that could run.
    """
    try:
        found = _Plain(io.BytesIO(file.read_bytes()), encoding="bytes").load()
    except pickle.UnpicklingError as error:
        raise UserError(f"{file} is no plain table of arrays ({error}): refused, it could run code") from error
    except (EOFError, IndexError, ValueError, KeyError, AttributeError, ImportError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error!r})") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} holds {type(found).__name__}, not a mapping")
    return {key.encode() if isinstance(key, str) else key: value for key, value in found.items()}
