# SPDX-License-Identifier: Apache-2.0
"""Sets of Hugging Face `datasets`: a folder written by `save_to_disk`, local files, or a name of the hub."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from tutelage.core.error import UserError, nearest
from tutelage.data.samples import class_words
from tutelage.data.torchvision import as_pixels

SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val"), "test": ("test",)}
LABELS = ("label", "labels", "fine_label", "class", "target")


@final
@dataclass(frozen=True)
class Rows:
    """Rows of a table with an image column.

    Args:
        table: a `datasets.Dataset`.
        image: name of the column.
        targets: `[N]` int64.
        class_names: by class index.
        source: what to call the set in an error.
    """

    table: Any
    image: str
    targets: Tensor
    class_names: tuple[str, ...]
    source: str

    def __len__(self) -> int:
        return len(self.targets)

    def read(self, index: int) -> Tensor:
        """Return `[C, H, W]` uint8."""
        return as_pixels(self.table[index][self.image])

    def name(self, index: int) -> str:
        """Return the set and the row."""
        return f"{self.source}[{index}]"

    def keep(self, index: Tensor) -> "Rows":
        """Return the set of these rows, in this order."""
        return replace(self, table=self.table.select(index.tolist()), targets=self.targets[index])

    def relabel(self, targets: Tensor) -> "Rows":
        """Return the same rows with other targets."""
        return replace(self, targets=targets)


def hub(place: str, *, image: str | None = None, label: str | None = None, download: bool = False) -> dict[str, Rows]:
    """Return the splits of a set: `train` and, where there are, `validation` and `test`.

    Args:
        place: a folder written by `save_to_disk`, or a name (`name` or `name:configuration`) of the hub.
        image: column of the images; the one of that type by default.
        label: column of the classes; the one of that type, or named so, by default.
        download: fetch from the hub what is not in its cache.

    Raises:
        UserError: if `datasets` is not installed, the set cannot be had, or columns cannot be told.
    """
    found = tables(place, download)
    sets: dict[str, Rows] = {}
    for split, table in found.items():
        known = sets["train"].class_names if "train" in sets else ()
        sets[split] = _rows(table, image, label, f"{place}/{split}", known)
    return sets


def tables(place: str, download: bool = False) -> dict[str, Any]:
    """Return the tables of a set by split: `train` and, where there are, `validation` and `test`.

    Without a validation split the test split is it.

    Args:
        place: a folder written by `save_to_disk`, or a name (`name` or `name:configuration`) of the hub.
        download: fetch from the hub what is not in its cache.

    Raises:
        UserError: if `datasets` is not installed, or the set cannot be had.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError("hf: sets need datasets: pip install 'tutelage[hf]'") from error
    name, _, configuration = place.partition(":")
    try:
        if Path(place).is_dir():
            found = datasets.load_from_disk(place)
        else:
            mode = datasets.DownloadConfig(local_files_only=not download)
            found = datasets.load_dataset(name, configuration or None, download_config=mode)
    except (OSError, ValueError, RuntimeError) as error:
        hint = "" if download or Path(place).is_dir() else "; data.download: true fetches it"
        raise UserError(f"data.source: 'hf:{place}' cannot be had ({str(error).splitlines()[0]}){hint}") from error
    given = {"train": found} if isinstance(found, datasets.Dataset) else dict(found)
    splits = {
        split: next(given[word] for word in names if word in given)
        for split, names in SPLITS.items()
        if any(word in given for word in names)
    }
    if "train" not in splits:
        raise UserError(f"data.source: 'hf:{place}' has no split train; it has {', '.join(given)}")
    if "validation" not in splits and "test" in splits:
        splits["validation"] = splits.pop("test")
    return splits


def _rows(table: Any, image: str | None, label: str | None, source: str, known: tuple[str, ...]) -> Rows:
    kinds = {column: type(kind).__name__ for column, kind in table.features.items()}
    image = _column("image", image, [c for c, kind in kinds.items() if kind == "Image"], kinds, source)
    typed = [c for c, kind in kinds.items() if kind == "ClassLabel"]
    named = [c for c in LABELS if c in kinds]
    one = [c for c in named if c in typed][:1] or (typed if len(typed) == 1 else named[:1])
    label = _column("label", label, one, kinds, source)
    values = table[label]
    names = tuple(getattr(table.features[label], "names", None) or ())
    if values and isinstance(values[0], str):
        names = names or known or tuple(sorted(set(values)))
        places = {word: number for number, word in enumerate(names)}
        strange = next((word for word in values if word not in places), None)
        if strange is not None:
            raise UserError(f"{source}: class {strange!r} is not among the training classes{nearest(strange, names)}")
        values = [places[word] for word in values]
    targets = torch.tensor([-1 if value is None else int(value) for value in values])
    names = names or known or class_words(range(int(targets.max()) + 1))
    return Rows(table, image, targets, names, source)


def _column(what: str, given: str | None, found: list[str], kinds: dict[str, str], source: str) -> str:
    if given is not None:
        if given not in kinds:
            raise UserError(f"data.{what}_column: {source} has no column {given!r}{nearest(given, kinds)}")
        return given
    if len(found) != 1:
        columns = ", ".join(f"{column} ({kind})" for column, kind in kinds.items())
        raise UserError(f"{source}: which column is the {what}? Say data.{what}_column; columns: {columns}")
    return found[0]
