# SPDX-License-Identifier: Apache-2.0
"""The `data` section of a recipe, made into loaders."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor

from tutelage.core import Batch, Facts
from tutelage.core.error import UserError, check_words, nearest
from tutelage.core.task import DENSE
from tutelage.data import augment
from tutelage.data.loader import UNREADABLE, Late, Loader, Replay
from tutelage.data.mix import Mix
from tutelage.data.samples import Composed, Dense, Held, Joined, Samples, stratified, without

#: Seed of a validation split the source does not make: apart from any run's.
SPLIT_SEED = 11
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
        held_out: the validation samples are a share of the training samples of the source.
    """

    train: Loader
    validation: Loader
    test: Loader | None = None
    held_out: bool = False

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names by class index."""
        return self.train.class_names

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def sample(self, size: int = 2) -> Batch:
        """Return a small batch for a dry run: the first training samples as they are seen in evaluation.

        Samples that are cut out of large images are seen as in training: whole images would be far larger.
        """
        samples = self.train.samples.keep(self._first(size))
        if getattr(samples, "cropped", False):
            return next(Loader(samples, size, train=True, drop_last=False).epoch())
        views = self.train.views
        return next(Loader(samples, size, train=False, transform=self.validation.transform, views=views).epoch())

    def _first(self, size: int) -> Tensor:
        """Return the ids of the first samples; where unreadable ones are skipped, of those that can be read."""
        samples = self.train.samples
        if self.train.on_error == "raise" or isinstance(samples, Held):
            return torch.arange(min(size, len(samples)))
        found: list[int] = []
        for index in range(len(samples)):
            try:
                samples.read(index)
            except UNREADABLE:
                continue
            found.append(index)
            if len(found) == size:
                break
        return torch.tensor(found, dtype=torch.long)

    def model_facts(self) -> dict[str, Any]:
        """Return what a model must know of the data, as keywords of `tutelage.models.load.load`."""
        samples = self.train.samples
        if isinstance(samples, (Composed, Dense)):
            return samples.model_facts()
        _, channels, height, width = self.sample().inputs.shape
        return {
            "num_classes": self.num_classes,
            "in_channels": channels,
            "image_size": (height, width),
            "class_names": self.class_names,
        }

    def task_facts(self) -> dict[str, Any]:
        """Return what a task must know of the data, as keywords of its constructor."""
        samples = self.train.samples
        more = samples.model_facts().get("geometry", {}) if isinstance(samples, Dense) else {}
        return {"num_classes": self.num_classes, "class_names": self.class_names, **more}

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
            mixes=tuple(word for word in ("mixup", "cutmix") if getattr(self.train.mixing, word, 0)),
        )


@final
@dataclass(frozen=True)
class Spec:
    """The words of a recipe's `data` section.

    Args:
        source: `digits`, a folder, `folder:PATH`, `cifar10:PATH`, `cifar100:PATH`, `idx:PATH`,
            `torchvision:NAME` or `torchvision:NAME:PATH`, or `hf:PATH_OR_NAME`; text: `stdlib-text`, `text:PATH`
            (a file, or a folder of .txt files), or `hf:PATH_OR_NAME` with the section `text`.
        labels: so many training images (or this share of them) stay labelled; None keeps all labels.
        label_seed: chooses which; apart from the run's seed.
        unlabelled: a folder of further images without labels.
        validation_share: held out for validation where the source has no split for it.
        batch_size: samples a step, over all ranks.
        labelled_per_batch: see `Loader`.
        workers: reading processes.
        augment: see `tutelage.data.augment.build`.
        augment_late: `epochs` and `augment`: what is done to training images in the last so many epochs instead.
        views: further augmentations of the same images, by the name of the view.
        image_size: pixels of a square, or (height, width), to which images are brought.
        mixup: alpha of the Beta distribution, 0 for none.
        cutmix: the same.
        repeats: views of a sample in one epoch.
        on_error: `raise` or `skip`, for files that cannot be read.
        channels: of images read from files: 3 or 1.
        allow_duplicates: accept training files among those a score is taken on.
        download: let `torchvision:` and `hf:` fetch what is not there.
        image_column: of an `hf:` set.
        label_column: of an `hf:` set.
        text: how text becomes samples, see `tutelage.data.text.Options`.
        detection: how images with boxes are read, see `tutelage.data.detection.Options`.
        segmentation: how images with class maps are read, see `tutelage.data.segmentation.Options`.
        pose: how images with keypoints are read, see `tutelage.data.pose.Options`.
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
    augment_late: Mapping[str, Any] | None = None
    views: Mapping[str, Any] = field(default_factory=dict)
    image_size: int | tuple[int, int] | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    repeats: int = 1
    on_error: Literal["raise", "skip"] = "raise"
    channels: Literal[1, 3] = 3
    allow_duplicates: bool = False
    download: bool = False
    image_column: str | None = None
    label_column: str | None = None
    text: Mapping[str, Any] | None = None
    detection: Mapping[str, Any] | None = None
    segmentation: Mapping[str, Any] | None = None
    pose: Mapping[str, Any] | None = None

    @classmethod
    def parse(cls, given: "Mapping[str, Any] | str") -> "Spec":
        """Read a mapping, or a source alone.

        Raises:
            UserError: on an unknown word, or without `source`.
        """
        if isinstance(given, str):
            return cls(given)
        check_words(given, [part.name for part in fields(cls)], "data")
        if not given.get("source"):
            raise UserError(f"data.source is missing: {', '.join(SOURCES)}, or a folder")
        return cls(**given)


def _digits(place: str, spec: Spec) -> Sets:
    from tutelage.data.digits import digits

    train, validation = digits()
    return {"train": train, "validation": validation}


def _folder(place: str, spec: Spec) -> Sets:
    from tutelage.data.folder import folder

    found = folder(
        place,
        validation_share=spec.validation_share,
        channels=spec.channels,
        allow_duplicates=spec.allow_duplicates,
    )
    return dict(found)


def _cifar10(place: str, spec: Spec) -> Sets:
    from tutelage.data.cifar import cifar

    train, test = cifar(place, "cifar10")
    return {"train": train, "validation": test}


def _cifar100(place: str, spec: Spec) -> Sets:
    from tutelage.data.cifar import cifar

    train, test = cifar(place, "cifar100")
    return {"train": train, "validation": test}


def _idx(place: str, spec: Spec) -> Sets:
    from tutelage.data.idx import idx

    train, test = idx(place)
    return {"train": train, "validation": test}


def _torchvision(place: str, spec: Spec) -> Sets:
    from tutelage.data.torchvision import torchvision

    name, _, root = place.partition(":")
    return dict(torchvision(name, root or "data", download=spec.download))


def _hub(place: str, spec: Spec) -> Sets:
    if spec.text is not None:
        return _texts("hf", place, spec)
    from tutelage.data.hub import hub

    return dict(hub(place, image=spec.image_column, label=spec.label_column, download=spec.download))


def _texts(kind: str, place: str, spec: Spec) -> Sets:
    from tutelage.data.text import Options, texts

    for word in OF_IMAGES:
        if getattr(spec, word):
            raise UserError(f"data.{word} is for images with classes, and {spec.source} is text; leave it out")
    options = Options.parse(spec.text)
    return dict(texts(kind, place, options, validation_share=spec.validation_share, download=spec.download))


#: Reads a kind of source: what stands after the colon, and the section. Sets without a validation split give
#: their test split as that.
SOURCES: dict[str, Callable[[str, Spec], Sets]] = {
    "digits": _digits,
    "folder": _folder,
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "idx": _idx,
    "torchvision": _torchvision,
    "hf": _hub,
    "text": partial(_texts, "text"),
    "stdlib-text": partial(_texts, "stdlib-text"),
}
#: Kinds that come with the package, or with Python: nothing stands after them.
EMBEDDED = ("digits", "stdlib-text")
#: Words of the section that are about images and classes.
OF_IMAGES = (
    *("labels", "unlabelled", "labelled_per_batch", "augment", "augment_late", "views", "image_size"),
    *("mixup", "cutmix", "image_column", "label_column"),
)
#: Words of the section that are about one class an image.
OF_CLASSES = ("unlabelled", "views", "mixup", "cutmix")


def load(
    spec: Mapping[str, Any] | str,
    *,
    task: str = "classification",
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    sets: Sets | None = None,
    replay: Replay | None = None,
) -> Splits:
    """Return the loaders of a recipe's `data` section.

    Args:
        spec: the section, or its `source` alone.
        task: what the samples are for; a dense one reads them in a file of its own name.
        seed: of order and augmentation.
        rank: of this process.
        world_size: number of processes.
        sets: in the place of the source.
        replay: the views that training sees, where answers to them are stored.

    Raises:
        UserError: naming the word of the section, or the file, that is wrong.

    Example:
        >>> data = load({"source": "digits", "labels": 50}, seed=0)
        >>> int((data.train.samples.targets >= 0).sum()), data.num_classes
        (50, 10)
    """
    section = Spec.parse(spec)
    if sets is None and task in DENSE:
        sets = _dense(task, section)
    sets, apart = _with_validation(sets, section) if sets is not None else _read(section)
    for samples in sets.values():
        _require_classes(samples)
    train = _fewer_labels(sets["train"], section)
    if section.unlabelled is not None:
        train = _with_unlabelled(train, section)
    dense = task in DENSE  # such samples change themselves: their geometry goes with the image
    plain = None if dense else augment.build(section.augment, train=False, size=section.image_size)
    alike: dict[str, Any] = {"seed": seed, "workers": section.workers, "on_error": section.on_error}
    held_out = {  # read whole by every rank: a score needs all answers
        name: Loader(
            sets[name],
            section.batch_size,
            train=False,
            transform=plain,
            batches=_scored_together(sets[name], section),
            **alike,
        )
        for name in ("validation", "test")
        if name in sets
    }
    views = {
        name: augment.build(steps, train=True, size=section.image_size) or augment.Pipeline(())
        for name, steps in section.views.items()
    }
    loader = Loader(
        train,
        section.batch_size,
        train=True,
        transform=None if dense else augment.build(section.augment, train=True, size=section.image_size),
        views=views,
        labelled_per_batch=section.labelled_per_batch,
        repeats=section.repeats,
        mixing=_mixing(section, len(train.class_names)),
        rank=rank,
        world_size=world_size,
        replay=replay,
        late=_late(section, train),
        **alike,
    )
    return Splits(loader, held_out["validation"], held_out.get("test"), apart)


def _late(spec: Spec, train: Samples) -> Late | None:
    """Return what training sees in its last epochs, if that is something else.

    Raises:
        UserError: if the section lacks a word, has another, or counts no epoch.
    """
    given = spec.augment_late
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise UserError(f"data.augment_late is a section of `epochs` and `augment`, not {given!r}")
    check_words(given, ("epochs", "augment"), "data.augment_late")
    if given.get("augment") is None:
        raise UserError("data.augment_late.augment is missing: what is done in the last epochs, such as none")
    epochs = given.get("epochs")
    if not isinstance(epochs, int) or isinstance(epochs, bool) or epochs < 1:
        raise UserError(f"data.augment_late.epochs counts the last epochs, at least 1, not {epochs!r}")
    try:
        if isinstance(train, Dense):
            return Late(epochs, train.augmented(given["augment"]))
        return Late(epochs, train, augment.build(given["augment"], train=True, size=spec.image_size))
    except UserError as error:
        raise UserError(f"data.augment_late: {str(error).removeprefix('data.')}") from error


def _scored_together(samples: Samples, spec: Spec) -> tuple[Tensor, ...] | None:
    """Return which images are scored at once where padding would hang on its neighbours' sizes: those of one size."""
    together = getattr(samples, "together", None)
    found: tuple[Tensor, ...] | None = together(spec.batch_size) if callable(together) else None
    return found


def _dense(task: str, spec: Spec) -> Sets:
    """Return the sets of a dense task: read by the file of its name.

    Raises:
        UserError: on a kind of source the task does not read, or words that mean nothing there.
    """
    home = import_module(f"tutelage.data.{task}")
    for word in OF_CLASSES:
        if getattr(spec, word):
            raise UserError(f"data.{word} is for images with classes, and the task is {task}; leave it out")
    for word in DENSE:
        if word != task and getattr(spec, word) is not None:
            raise UserError(f"data.{word}: the task is {task}; leave it out")
    kind, _, place = spec.source.partition(":")
    if kind not in home.KINDS:
        known = ", ".join(word if word in home.EMBEDDED else f"{word}:PATH" for word in home.KINDS)
        raise UserError(f"data.source {spec.source!r}: {task} reads {known}{nearest(kind, home.KINDS)}")
    if kind not in home.EMBEDDED and not place:
        raise UserError(f"data.source: write {kind}:PATH")
    found: Sets = home.read(kind, place, spec)
    return found


def _read(spec: Spec) -> tuple[Sets, bool]:
    """Return the sets of a source, and whether its validation samples were held out of the training samples."""
    kind, _, place = spec.source.partition(":")
    if kind not in SOURCES:
        looks_like_path = "/" in spec.source or Path(spec.source).exists() or spec.source.startswith(".")
        if not looks_like_path:
            raise UserError(f"data.source {spec.source!r} is neither a folder nor a known kind{nearest(kind, SOURCES)}")
        kind, place = "folder", spec.source
    elif kind not in EMBEDDED and not place:
        raise UserError(f"data.source: write {kind}:{'NAME' if kind in ('torchvision', 'hf') else 'PATH'}")
    sets = SOURCES[kind](place, spec)
    apart = False
    if kind == "folder":  # which holds its validation images out by itself
        from tutelage.data.folder import own_splits

        apart = not {"validation", "test"} & set(own_splits(place))
    sets, more = _with_validation(sets, spec)
    return sets, apart or more


def _with_validation(sets: Sets, spec: Spec) -> tuple[Sets, bool]:
    """Return sets with a validation split, and whether it was held out of the training samples here."""
    if "validation" in sets:
        return sets, False
    train = sets["train"]
    if not 0 < spec.validation_share < 1:
        raise UserError(
            f"{spec.source} has no validation split: data.validation_share must lie in (0, 1), "
            f"not {spec.validation_share}"
        )
    count = max(round(spec.validation_share * len(train)), _kinds(train))
    held_out = stratified(train.targets, count, SPLIT_SEED)
    left = train.keep(without(len(train), held_out))
    return {**sets, "train": left, "validation": train.keep(held_out)}, True


def _require_classes(samples: Samples) -> None:
    """Refuse a class that no name stands for, naming the first sample.

    Raises:
        UserError: if a target is neither -1 nor a class.
    """
    if isinstance(samples, (Composed, Dense)):
        return
    count = len(samples.class_names)
    wrong = ((samples.targets < -1) | (samples.targets >= count)).nonzero().flatten().tolist()
    if wrong:
        label = int(samples.targets[wrong[0]])
        raise UserError(
            f"{samples.name(wrong[0])}: class {label} is out of range: the {count} classes are 0 to {count - 1}, "
            f"and -1 stands for no label{f'; {len(wrong)} samples are wrong' if len(wrong) > 1 else ''}"
        )


def _mixing(spec: Spec, num_classes: int) -> Mix | None:
    wanted = spec.mixup or spec.cutmix
    return Mix(num_classes, mixup=spec.mixup, cutmix=spec.cutmix) if wanted else None


def _kinds(samples: Samples) -> int:
    """Return how many samples must be chosen at least, to have one of every class."""
    return 1 if isinstance(samples, Dense) else len(samples.class_names)


def _with_unlabelled(train: Samples, spec: Spec) -> Samples:
    from tutelage.data.folder import unlabelled

    assert spec.unlabelled is not None
    return Joined.of(train, unlabelled(spec.unlabelled, train.class_names, train.read(0).shape[0]))


def _fewer_labels(train: Samples, spec: Spec) -> Samples:
    if spec.labels is None:
        return train
    known = int((train.targets >= 0).sum())
    wanted = round(spec.labels * known) if isinstance(spec.labels, float) else spec.labels
    least = _kinds(train)
    if not least <= wanted <= known:
        one = "" if isinstance(train, Dense) else " (one a class)"
        raise UserError(f"data.labels must keep between {least}{one} and {known}, not {wanted}")
    kept = stratified(train.targets, wanted, spec.label_seed)
    targets = torch.full_like(train.targets, -1)
    targets[kept] = train.targets[kept]
    return train.relabel(targets)
