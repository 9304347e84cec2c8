# SPDX-License-Identifier: Apache-2.0
"""Data sets that are objects in Python: anyone's map-style set of (image, class)."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset, default_collate

from tutelage.core.error import UserError
from tutelage.data.samples import Samples, class_words
from tutelage.data.torchvision import Pairs

#: Where sets keep their classes.
TABLES = ("targets", "labels", "_labels")


def sets_of(given: Any) -> dict[str, Samples]:
    """Return the sets of an object, by split.

    Of a DataLoader its data set is read: order, batches and augmentation are functions of the run's seed, so that a
    run resumes. Images are `[C, H, W]` in [0, 1], or PIL images.

    Args:
        given: a Dataset, a DataLoader or `Samples`; a pair of them (training, validation); or a mapping with
            `train`, and perhaps `validation` and `test`.

    Raises:
        UserError: on anything else, or a set that does not give one class an image.

    Example:
        >>> sets = sets_of(TensorDataset(torch.zeros(4, 1, 8, 8), torch.tensor([0, 1, 0, 1])))
        >>> len(sets["train"]), sets["train"].class_names
        (4, ('0', '1'))
    """
    if isinstance(given, Mapping):
        unknown = given.keys() - {"train", "validation", "test"}
        if unknown or "train" not in given:
            raise UserError(f"data: a mapping of sets has train, validation and test, not {', '.join(map(str, given))}")
        named = dict(given)
    elif isinstance(given, (tuple, list)):
        if len(given) != 2:
            raise UserError(f"data: a pair of sets is (training, validation), not {len(given)} of them")
        named = {"train": given[0], "validation": given[1]}
    else:
        named = {"train": given}
    return {split: samples(one, split) for split, one in named.items()}


def samples(given: Any, name: str = "data") -> Samples:
    """Return one set as samples.

    Raises:
        UserError: if it cannot be read by index, or does not give one class an image.
    """
    if isinstance(given, Samples):
        return given
    if isinstance(given, DataLoader):
        if given.collate_fn is not default_collate:
            raise UserError(
                f"{name}: a DataLoader with a collate_fn of its own makes batches that are not understood here: pass "
                "its data set, or take the step into your own loop"
            )
        given = given.dataset
    if not (isinstance(given, Dataset) and hasattr(given, "__len__") and hasattr(given, "__getitem__")):
        raise UserError(
            f"{name}: expected a data set with a length, or a DataLoader of one, not {type(given).__name__}"
        )
    targets = targets_of(given, name)
    names = names_of(given) or class_words(range(int(targets.max()) + 1 if len(targets) else 0))
    return Pairs(given, torch.arange(len(targets)), targets, names, f"{name}: {type(given).__name__}")


def targets_of(given: Any, name: str) -> Tensor:
    """Return `[N]` classes: from the set's own table where it has one, else from every sample in turn.

    Raises:
        UserError: if it does not give one class an image.
    """
    if isinstance(given, Subset):
        return targets_of(given.dataset, name)[torch.as_tensor(list(given.indices), dtype=torch.long)]
    if isinstance(given, ConcatDataset):
        return torch.cat([targets_of(part, name) for part in given.datasets])
    found: Any = given.tensors[1] if isinstance(given, TensorDataset) and len(given.tensors) == 2 else None
    for word in TABLES:
        table = getattr(given, word, None)
        if found is None and table is not None and len(table) == len(given):
            found = table
    if found is None:
        found = [_pair(given[number], name)[1] for number in range(len(given))]
    labels = found if isinstance(found, Tensor) else torch.as_tensor(np.asarray(found))
    if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise UserError(f"{name}: {type(given).__name__} does not give one class an image")
    return labels.long()


def names_of(given: Any) -> tuple[str, ...]:
    """Return the names of the classes, where a set has any."""
    if isinstance(given, Subset):
        return names_of(given.dataset)
    if isinstance(given, ConcatDataset):
        return names_of(given.datasets[0])
    return tuple(word[0] if isinstance(word, tuple) else str(word) for word in getattr(given, "classes", None) or ())


def _pair(sample: Any, name: str) -> tuple[Any, Any]:
    if not (isinstance(sample, (tuple, list)) and len(sample) == 2):
        raise UserError(f"{name}: a sample is a pair (image, class), not {type(sample).__name__}")
    return sample[0], sample[1]
