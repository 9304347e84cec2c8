# SPDX-License-Identifier: Apache-2.0
"""Any classification set of torchvision, from a local folder."""

import inspect
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from tutelage.core.error import UserError, nearest
from tutelage.data.samples import class_words

#: What the constructors call their splits.
SPLITS = {
    "train": ({"train": True}, {"split": "train"}, {"image_set": "train"}),
    "validation": ({"split": "val"}, {"split": "valid"}, {"split": "validation"}),
    "test": ({"train": False}, {"split": "test"}),
}


@final
@dataclass(frozen=True)
class Pairs:
    """A map-style set of (image, class) pairs.

    Args:
        pairs: indexed, gives a PIL image or an array, and a class.
        index: `[N]` places in `pairs`.
        targets: `[N]` int64.
        class_names: by class index.
        source: what to call the set in an error.
    """

    pairs: Any
    index: Tensor
    targets: Tensor
    class_names: tuple[str, ...]
    source: str

    def __len__(self) -> int:
        return len(self.index)

    def read(self, index: int) -> Tensor:
        """Return `[C, H, W]` uint8."""
        return as_pixels(self.pairs[int(self.index[index])][0])

    def name(self, index: int) -> str:
        """Return the set and the number."""
        return f"{self.source}[{int(self.index[index])}]"

    def keep(self, index: Tensor) -> "Pairs":
        """Return the set of these samples, in this order."""
        return replace(self, index=self.index[index], targets=self.targets[index])

    def relabel(self, targets: Tensor) -> "Pairs":
        """Return the same images with other targets."""
        return replace(self, targets=targets)


def as_pixels(image: Any) -> Tensor:
    """Return a PIL image, array or tensor as `[C, H, W]`."""
    if isinstance(image, Tensor):
        return image if image.ndim == 3 else image[None]
    if not isinstance(image, np.ndarray) and image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    pixels = torch.from_numpy(np.array(image))
    return pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels[None]


def torchvision(name: str, root: str | Path, *, download: bool = False) -> dict[str, Pairs]:
    """Return the splits of a set of torchvision: `train` and `validation`, and `test` where there are three.

    Args:
        name: of the class, e.g. `Flowers102`.
        root: where its files lie.
        download: fetch them if they do not.

    Raises:
        UserError: on an unknown name, a set that is no classification of images, or missing files.
    """
    from torchvision import datasets

    names = [word for word in datasets.__all__ if isinstance(getattr(datasets, word), type)]
    if name not in names:
        raise UserError(f"data.source: torchvision has no set {name!r}{nearest(name, names)}")
    make = getattr(datasets, name)
    taken = inspect.signature(make).parameters
    sets: dict[str, Pairs] = {}
    for split, spellings in SPLITS.items():
        found = _open(make, taken, spellings, root, download, name)
        if found is not None:
            sets[split] = found
    if "train" not in sets:
        raise UserError(f"data.source: torchvision's {name} has no split for training")
    if "validation" not in sets and "test" in sets:
        sets["validation"] = sets.pop("test")
    return sets


def _open(make: Any, taken: Any, spellings: Any, root: str | Path, download: bool, name: str) -> Pairs | None:
    more = {"download": download} if "download" in taken else {}
    for words in spellings:
        if not words.keys() <= taken.keys():
            continue
        try:
            pairs = make(root=str(root), **words, **more)
        except ValueError as error:
            if "Unknown value" in str(error) or "split" in str(error):
                continue  # the set spells this split otherwise, or has none
            raise UserError(f"data.source: torchvision's {name}: {error}") from error
        except (RuntimeError, OSError, ModuleNotFoundError) as error:
            hint = "" if download else "; data.download: true fetches it"
            raise UserError(f"data.source: torchvision's {name} in {root}: {error}{hint}") from error
        targets = _targets(pairs, name)
        words_of = getattr(pairs, "classes", None) or class_words(range(int(targets.max()) + 1))
        plain = tuple(word[0] if isinstance(word, tuple) else str(word) for word in words_of)
        return Pairs(pairs, torch.arange(len(targets)), targets, plain, f"{name}({next(iter(words.values()))})")
    return None


def _targets(pairs: Any, name: str) -> Tensor:
    """Return the classes, from the set's own table where it has one."""
    for word in ("targets", "labels", "_labels", "_samples", "samples"):
        found = getattr(pairs, word, None)
        if found is None or not len(found):
            continue
        rows = [row[1] for row in found] if "samples" in word else found
        flat = torch.as_tensor(np.asarray(rows))
        if flat.ndim == 1 and not flat.is_floating_point():
            return flat.long()
    if len(pairs) and isinstance(pairs[0], tuple) and isinstance(pairs[0][1], int):
        return torch.tensor([pairs[number][1] for number in range(len(pairs))])
    raise UserError(f"data.source: torchvision's {name} does not give one class an image")
