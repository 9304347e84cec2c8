# SPDX-License-Identifier: Apache-2.0
"""What a model sees in image files."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tutelage.core import Batch, Model
from tutelage.core.error import UserError
from tutelage.data import augment
from tutelage.data.folder import images_below, read_image
from tutelage.data.samples import to_unit
from tutelage.data.video import frames_of, is_video
from tutelage.models.known import untrained
from tutelage.models.load import load
from tutelage.report.table import Table
from tutelage.run.assemble import task_of
from tutelage.run.folder import RunFolder
from tutelage.run.inspect import shown, spec
from tutelage.run.recipe import TaskSection
from tutelage.train.runtime import Runtime


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one image.

    Args:
        path: of the image.
        classes: names, the likeliest first; numbers where the model has no names.
        probabilities: of these classes.
    """

    path: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


@dataclass(frozen=True)
class Predictions:
    """What a model sees.

    Args:
        images: in the order of the files.
        unreadable: what is wrong with a file, by its path.
    """

    images: tuple[Prediction, ...]
    unreadable: Mapping[str, str] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of images that were read."""
        return len(self.images)

    @property
    def table(self) -> Table:
        """One row an image."""
        count = max((len(one.classes) for one in self.images), default=0)
        rows = [
            (one.path, *(f"{name}  {100 * p:.1f}" for name, p in zip(one.classes, one.probabilities, strict=True)))
            for one in self.images
        ]
        heads = ("likeliest (%)", *(f"{number}." for number in range(2, count + 1)))
        return Table(("image", *heads[:count]), rows)

    def plain(self) -> dict[str, Any]:
        """Return the predictions as plain data."""
        return asdict(self)


def predict(
    name: str,
    places: Sequence[Path],
    *,
    top: int = 3,
    weights: str | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
    device: str | None = None,
    batch_size: int = 32,
) -> Predictions:
    """Return the likeliest classes of images.

    An image is brought to the model as in the evaluation of its run: shorter side resized, middle cut out.

    Args:
        name: `kind:name`, or the folder of a run.
        places: image files, folders of them, videos.
        top: so many classes an image.
        weights: `pretrained` or a file.
        num_classes: of its outputs; its own default where None.
        image_size: pixels of a side; the run's, or the model's own by default.
        device: such as `cpu`; a GPU if there is one by default.
        batch_size: images read at a time.

    Raises:
        UserError: if a place does not exist or holds no image, or the model does not classify images.
    """
    paths = files(places)
    if top < 1:
        raise UserError(f"--top must be at least 1, not {top}")
    if untrained(spec(name, weights)):
        raise UserError(f"{name} has random weights and would only guess: give --weights pretrained, or a file")
    model = load(spec(name, weights), num_classes=num_classes)
    runtime = Runtime(device)
    model.module.eval().to(runtime.device)
    change = _change(model, name, image_size)
    channels = _channels(model)
    found: list[Prediction] = []
    unreadable: dict[str, str] = {}
    for start in range(0, len(paths), batch_size):
        images: dict[Path, Tensor] = {}
        for path in paths[start : start + batch_size]:
            try:
                images[path] = to_unit(change(read_image(path, channels)[None]))
            except OSError as error:
                unreadable[str(path)] = error.strerror or str(error) or type(error).__name__
        if images:
            found += _answers(model, images, top, runtime.device)
    return Predictions(tuple(found), unreadable)


@torch.no_grad()
def _answers(model: Model, images: Mapping[Path, Tensor], top: int, device: torch.device) -> list[Prediction]:
    task = task_of(TaskSection(), num_classes=0)
    output = task.call(model, Batch.of(torch.cat([*images.values()]).to(device)))
    logits = task.logits(output)
    if logits is None or logits.ndim != 2:
        raise UserError(f"{type(model.module).__name__} gives no scores of classes: only classifiers predict so far")
    likely = logits.float().softmax(1).topk(min(top, logits.shape[1]), dim=1)
    names = model.class_names or tuple(map(str, range(logits.shape[1])))
    return [
        Prediction(str(path), tuple(names[number] for number in which), tuple(values))
        for path, which, values in zip(images, likely.indices.tolist(), likely.values.tolist(), strict=True)
    ]


def files(places: Sequence[Path]) -> list[Path]:
    """Return the image files that places stand for, each once; of a video its frames.

    Raises:
        UserError: if a place does not exist or holds no image, or a video cannot be read.
    """
    return list(dict.fromkeys(path for place in places for path in _below(place)))


def _below(place: Path) -> list[Path]:
    """Return the files that a place stands for."""
    if place.is_dir():
        found = images_below(place)
        if not found:
            raise UserError(f"no image below {place}")
        return found
    if not place.exists():
        raise UserError(f"no file or folder {place}")
    return frames_of(place) if is_video(place) else [place]


def _change(model: Model, name: str, image_size: int | None) -> Any:
    """Return what is done to an image before the model gets it, the same as when its run was evaluated."""
    folder = RunFolder(Path(name.removeprefix("run:")))
    steps = folder.recipe().data.augment if folder.recipe_path.is_file() else None
    evaluation = steps if isinstance(steps, Mapping) else None
    made = augment.build(evaluation, train=False, size=image_size or shown(model))
    return lambda images: images if made is None else made(images, torch.zeros(1, dtype=torch.long))


def _channels(model: Model) -> int:
    given = model.source.get("in_channels") or (model.input.channels if model.input else 3)
    if given not in (1, 3):
        raise UserError(f"{type(model.module).__name__} takes {given} channels; image files have 1 or 3")
    return int(given)
