# SPDX-License-Identifier: Apache-2.0
"""A finite set of images, by index."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self, final, runtime_checkable

import torch
from torch import Tensor

from tutelage.core import Batch
from tutelage.functional.noise import keys, mix


@runtime_checkable
class Samples(Protocol):
    """What a loader reads. The position in the set is the sample's id, the key of all randomness about it."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names by class index."""

    @property
    def targets(self) -> Tensor:
        """`[N]` int64 class by sample id, -1 where unlabelled."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Tensor:
        """Return one image `[C, H, W]`, uint8 or float in [0, 1]."""

    def name(self, index: int) -> str:
        """Return what to call a sample in an error: its file, or the set and its number."""

    def keep(self, index: Tensor) -> Self:
        """Return the set of these samples, in this order; ids are counted anew."""

    def relabel(self, targets: Tensor) -> Self:
        """Return the same samples with other targets."""


@runtime_checkable
class Held(Samples, Protocol):
    """Samples of one size that lie in memory: a batch is one indexing operation."""

    def read_many(self, index: Tensor) -> Tensor:
        """Return `[B, C, H, W]`."""


@runtime_checkable
class Composed(Samples, Protocol):
    """Samples that are no images: they make of what was read what models are called with."""

    def model_facts(self) -> dict[str, Any]:
        """Return what a model must know of the samples, as keywords of `tutelage.models.load.load`."""

    def compose(self, batch: Batch, *, train: bool) -> Batch:
        """Return the batch as models take it, from one whose inputs are what was read."""


@runtime_checkable
class Dense(Samples, Protocol):
    """Images with geometry: boxes, masks, class maps or keypoints change as their image does.

    `targets` says which samples are annotated: 0, or -1 where nothing is known of the image.
    """

    def model_facts(self) -> dict[str, Any]:
        """Return what a model must know of the samples, as keywords of `tutelage.models.load.load`."""

    def read(self, index: int) -> Any:
        """Return one record as it lies on disk."""

    def augmented(self, augment: Any) -> Self:
        """Return the same samples, changed in training as this `augment` of a recipe says."""

    def seen(self, record: Any, key: int, *, train: bool) -> Any:
        """Return a record as a model sees it: resized, cropped, in training augmented, by the key alone."""

    def collate(self, records: Sequence[Any], index: Tensor, view: Tensor) -> Batch:
        """Return records as one batch, padded once to a common size.

        Args:
            records: as `seen` gives them.
            index: `[B]` sample ids.
            view: `[B]` keys of their augmentation.
        """


@final
@dataclass(frozen=True)
class Arrays:
    """Images in memory.

    Args:
        images: `[N, C, H, W]` uint8, or float in [0, 1].
        targets: `[N]` int64, -1 where unlabelled.
        class_names: by class index.
        source: what to call the set in an error.
    """

    images: Tensor
    targets: Tensor
    class_names: tuple[str, ...]
    source: str = "samples"

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Tensor:
        """Return one image `[C, H, W]`."""
        return self.images[index]

    def read_many(self, index: Tensor) -> Tensor:
        """Return `[B, C, H, W]`."""
        return self.images[index]

    def name(self, index: int) -> str:
        """Return the set and the number."""
        return f"{self.source}[{index}]"

    def keep(self, index: Tensor) -> "Arrays":
        """Return the set of these samples, in this order."""
        return replace(self, images=self.images[index], targets=self.targets[index])

    def relabel(self, targets: Tensor) -> "Arrays":
        """Return the same images with other targets."""
        return replace(self, targets=targets)


@final
@dataclass(frozen=True)
class Joined:
    """Several sets of the same classes, one after the other.

    Args:
        parts: the sets.
        place: `[N, 2]` which set, and which of its samples.
        targets: `[N]` int64.
    """

    parts: tuple[Samples, ...]
    place: Tensor
    targets: Tensor

    @classmethod
    def of(cls, *parts: Samples) -> "Joined":
        """Return the sets as one."""
        spans = [torch.arange(len(part)) for part in parts]
        which = torch.cat([torch.full_like(span, number) for number, span in enumerate(spans)])
        return cls(parts, torch.stack([which, torch.cat(spans)], 1), torch.cat([part.targets for part in parts]))

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names by class index: those of the first set."""
        return self.parts[0].class_names

    def __len__(self) -> int:
        return len(self.place)

    def _at(self, index: int) -> tuple[Samples, int]:
        part, place = self.place[index].tolist()
        return self.parts[part], place

    def read(self, index: int) -> Tensor:
        """Return one image `[C, H, W]`."""
        part, place = self._at(index)
        return part.read(place)

    def name(self, index: int) -> str:
        """Return the sample's name in its own set."""
        part, place = self._at(index)
        return part.name(place)

    def keep(self, index: Tensor) -> "Joined":
        """Return the set of these samples, in this order."""
        return replace(self, place=self.place[index], targets=self.targets[index])

    def relabel(self, targets: Tensor) -> "Joined":
        """Return the same samples with other targets."""
        return replace(self, targets=targets)


def stratified(targets: Tensor, count: int, seed: int) -> Tensor:
    """Return sample ids, the same share of every class.

    Shares are rounded by largest remainder, and no class goes empty while `count` allows. Within a class the
    order is a function of the seed alone: a larger choice contains a smaller one wherever shares grow.

    Args:
        targets: `[N]` classes; samples with -1 are never chosen.
        count: how many to choose.
        seed: of the choice.

    Returns:
        `[count]` int64, ascending.

    Example:
        >>> stratified(torch.tensor([0, 0, 0, 0, 1, 1, -1]), 3, seed=0).shape
        torch.Size([3])
    """
    classes, sizes = targets[targets >= 0].unique(return_counts=True)
    quota = sizes.double() * count / max(int(sizes.sum()), 1)
    taken = quota.floor().long()
    if count >= len(classes):
        taken = taken.clamp(min=1)
    # ties go to the lower class: stable sort
    remainders = (quota - taken).argsort(descending=True, stable=True)
    short = count - int(taken.sum())
    taken[remainders[: max(short, 0)]] += 1
    while short < 0:  # the floor of one a class took too many: the largest choices give back
        taken[taken.argmax()] -= 1
        short += 1
    chosen = []
    for label, number in zip(classes.tolist(), taken.tolist(), strict=True):
        members = (targets == label).nonzero().flatten()
        order = keys(mix(seed, label), torch.arange(len(members))).argsort(stable=True)
        chosen.append(members[order[:number]])
    return torch.cat(chosen).sort().values if chosen else torch.zeros(0, dtype=torch.long)


def without(size: int, index: Tensor) -> Tensor:
    """Return the ids in `range(size)` that are not in `index`, ascending."""
    left = torch.ones(size, dtype=torch.bool)
    left[index] = False
    return left.nonzero().flatten()


def class_words(numbers: Sequence[int]) -> tuple[str, ...]:
    """Return class numbers as names, for sets that name none."""
    return tuple(str(number) for number in numbers)


def to_unit(images: Tensor) -> Tensor:
    """Return pixels as float in [0, 1]."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images
