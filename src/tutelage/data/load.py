# SPDX-License-Identifier: Apache-2.0
"""The `data` section of a recipe, made into loaders."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, final

import torch

from tutelage.core import Batch, Facts
from tutelage.core.error import UserError, nearest
from tutelage.data.loader import Loader
from tutelage.data.samples import Samples, stratified

#: Sets by split: train, validation and, where there is one, test.
Sets = dict[str, Samples]


@final
@dataclass(frozen=True)
class Splits:
    """Loaders of one data set.

    Args:
        train: shuffled and augmented.
        validation: in order, as they are.
        test: the same, or None.
    """

    train: Loader
    validation: Loader
    test: Loader | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names by class index."""
        return self.train.class_names

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def sample(self, size: int = 2) -> Batch:
        """Return a small batch for a dry run: the first training samples as they are seen in evaluation."""
        samples = self.train.samples.keep(torch.arange(min(size, len(self.train.samples))))
        return next(Loader(samples, size, train=False, transform=self.validation.transform).epoch())

    def facts(self, total_steps: int, seed: int = 0, accumulate: int = 1) -> Facts:
        """Return what terms may know of the run before its first step."""
        return Facts(
            num_classes=self.num_classes,
            class_names=self.class_names,
            num_samples=len(self.train.samples),
            targets=self.train.samples.targets,
            steps_per_epoch=-(-self.train.steps_per_epoch // accumulate),
            total_steps=total_steps,
            seed=seed,
        )


@final
@dataclass(frozen=True)
class Spec:
    """The words of a recipe's `data` section.

    Args:
        source: `digits`, a folder, or `kind:place`.
        labels: so many training images (or this share of them) stay labelled; None keeps all labels.
        label_seed: chooses which; apart from the run's seed.
        unlabelled: a folder of further images without labels.
        validation_share: held out for validation where the source has no split.
        batch_size: samples a step, over all ranks.
        labelled_per_batch: see `Loader`.
        workers: reading processes.
        augment: see `tutelage.data.augment.build`.
        image_size: pixels of a square, or (height, width), to which images are brought.
        mixup: alpha of the Beta distribution, 0 for none.
        cutmix: the same.
        repeats: views of a sample in one epoch.
        on_error: `raise` or `skip`.
    """

    source: str
    labels: int | float | None = None
    label_seed: int = 0
    unlabelled: str | None = None
    validation_share: float = 0.1
    batch_size: int = 64
    labelled_per_batch: int | None = None
    workers: int = 0
    augment: Any = None
    image_size: Any = None
    mixup: float = 0.0
    cutmix: float = 0.0
    repeats: int = 1
    on_error: Literal["raise", "skip"] = "raise"
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, given: "Mapping[str, Any] | str") -> "Spec":
        """Read a mapping, or a source alone.

        Raises:
            UserError: on an unknown word, or without `source`.
        """
        if isinstance(given, str):
            return cls(given)
        words = [part.name for part in fields(cls)]
        for word in given:
            if word not in words:
                raise UserError(f"data.{word} is not known{nearest(str(word), words)}")
        if "source" not in given:
            raise UserError(f"data.source is missing: {', '.join(SOURCES)}, or a folder")
        return cls(**given)


def _digits(place: str, spec: Spec) -> Sets:
    from tutelage.data.digits import digits

    train, validation = digits()
    return {"train": train, "validation": validation}


#: Reads a kind of source: what stands after the colon, and the section.
SOURCES: dict[str, Callable[[str, Spec], Sets]] = {"digits": _digits}


def load(spec: Mapping[str, Any] | str, *, seed: int = 0, rank: int = 0, world_size: int = 1) -> Splits:
    """Return the loaders of a recipe's `data` section.

    Args:
        spec: the section, or its `source` alone.
        seed: of order and augmentation.
        rank: of this process.
        world_size: number of processes.

    Raises:
        UserError: naming the word of the section, or the file, that is wrong.

    Example:
        >>> data = load({"source": "digits", "labels": 50}, seed=0)
        >>> int((data.train.samples.targets >= 0).sum()), data.num_classes
        (50, 10)
    """
    section = Spec.parse(spec)
    sets = _read(section)
    train = _fewer_labels(sets["train"], section)
    alike: dict[str, Any] = {"seed": seed, "workers": section.workers, "on_error": section.on_error}
    alike |= {"rank": rank, "world_size": world_size}
    held_out = {
        name: Loader(sets[name], section.batch_size, train=False, **alike)
        for name in ("validation", "test")
        if name in sets
    }
    loader = Loader(
        train,
        section.batch_size,
        train=True,
        labelled_per_batch=section.labelled_per_batch,
        repeats=section.repeats,
        **alike,
    )
    return Splits(loader, held_out["validation"], held_out.get("test"))


def _read(spec: Spec) -> Sets:
    kind, _, place = spec.source.partition(":")
    if kind not in SOURCES:
        raise UserError(f"data.source {spec.source!r} is not known{nearest(kind, SOURCES)}")
    return SOURCES[kind](place, spec)


def _fewer_labels(train: Samples, spec: Spec) -> Samples:
    if spec.labels is None:
        return train
    known = int((train.targets >= 0).sum())
    wanted = round(spec.labels * known) if isinstance(spec.labels, float) else spec.labels
    classes = len(train.class_names)
    if not classes <= wanted <= known:
        raise UserError(f"data.labels must keep between {classes} (one a class) and {known}, not {wanted}")
    kept = stratified(train.targets, wanted, spec.label_seed)
    targets = torch.full_like(train.targets, -1)
    targets[kept] = train.targets[kept]
    return train.relabel(targets)
