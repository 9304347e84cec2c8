# SPDX-License-Identifier: Apache-2.0
"""Answers that can be looked at: what a dense model draws on images, in a run and for whoever asks."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from shutil import copyfile
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from tutelage.core import Batch
from tutelage.core.error import UserError
from tutelage.core.picture import Depicting, Picture
from tutelage.core.storage import write_text, write_whole
from tutelage.core.task import DENSE, answer
from tutelage.data.load import Spec
from tutelage.data.loader import Loader
from tutelage.data.samples import Dense
from tutelage.models.known import untrained
from tutelage.models.load import load
from tutelage.report.gallery import Gallery
from tutelage.report.measure import evaluating
from tutelage.run.assemble import Assembled, task_class, task_of
from tutelage.run.folder import RunFolder
from tutelage.run.inspect import spec
from tutelage.run.recipe import TaskSection
from tutelage.train.runtime import Runtime

SHOWN = 6  # validation images in a run's pictures
PICTURES = "pictures"
#: What stands above the pictures of a run, in the order of showing.
COLUMNS = {"truth": "truth", "teacher": "teacher", "before": "student before", "after": "student after"}


@torch.no_grad()
def depict(made: Assembled, home: Path, when: str) -> None:
    """Draw what a run's student says of the first validation images; before training, also truth and teacher.

    Args:
        made: of a task whose answers can be looked at; of others nothing is drawn.
        home: the run's folder; pictures go to `pictures/NUMBER-WHAT.png`.
        when: `before` or `after`.
    """
    task, samples = made.task, made.data.validation.samples
    if not (isinstance(task, Depicting) and isinstance(samples, Dense)):
        return
    shown = samples.keep(torch.arange(min(SHOWN, len(samples))))
    sources: dict[str, Callable[[Batch], Sequence[Picture]]] = {}
    if when == "before":
        sources["truth"] = task.truths
        teacher = made.distiller.teachers.get("teacher")
        if teacher is not None and teacher.model is not None:
            model = teacher.model
            sources["teacher"] = lambda batch: task.pictures(answer(task, model, batch), batch)
    sources[when] = lambda batch: task.pictures(made.distiller.answer(batch), batch)
    networks = [made.distiller.student, *(n for one in made.distiller.teachers.values() for n in one.networks())]
    with evaluating(nn.ModuleList(networks)):
        for batch in Loader(shown, 2, train=False, on_error="skip").epoch(0):
            moved = batch.to(made.runtime.device)
            for what, drawn in sources.items():
                for index, picture in zip(batch.index.tolist(), drawn(moved), strict=True):
                    image = shown.read(index).image
                    save(picture.draw(three(image)), home / PICTURES / f"{index}-{what}.png")


def gallery(home: Path) -> Gallery:
    """Return the pictures of a run."""
    return Gallery.of(home / PICTURES, COLUMNS)


def take_over(home: Path, first: Path, last: Path) -> None:
    """Make of the pictures of the first and of the last stage those of the whole run."""
    for folder, whats in ((first, ("truth", "teacher", "before")), (last, ("after",))):
        for what in whats:
            for file in (folder / PICTURES).glob(f"*-{what}.png"):
                write_whole(home / PICTURES / file.name, partial(copyfile, file))


def three(image: Tensor) -> Tensor:
    """Return an image of one or three channels `[C, H, W]` as three, uint8."""
    whole = image if image.dtype == torch.uint8 else (image * 255).round().to(torch.uint8)
    return whole.expand(3, -1, -1) if len(whole) == 1 else whole


def save(image: Tensor, path: Path) -> None:
    """Write `[3, H, W]` uint8 as PNG, whole or not at all."""
    drawn = Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda partial: drawn.save(partial, "PNG"))


# --- for whoever asks --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Depicted:
    """What a dense model sees in image files.

    Args:
        answers: plain data by path.
        drawings: files of the drawings by path; empty if none were asked for.
        unreadable: what is wrong with a file, by its path.
    """

    answers: Mapping[str, Mapping[str, Any]]
    drawings: Mapping[str, str] = field(default_factory=dict)
    unreadable: Mapping[str, str] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of images that were read."""
        return len(self.answers)

    def plain(self) -> dict[str, Any]:
        """Return the answers as plain data."""
        rows = [{"image": path, **answer} for path, answer in self.answers.items()]
        return {"images": rows, "drawings": dict(self.drawings), "unreadable": dict(self.unreadable)}


def task_named(name: str, task: str | None) -> TaskSection | None:
    """Return the dense task of a model, or None if it is for another.

    Args:
        name: of the model, or the folder of a run, which knows its task.
        task: as the user says it.

    Raises:
        UserError: if the user says another than the run, or one that does not exist.
    """
    folder = RunFolder(Path(name.removeprefix("run:")))
    if folder.recipe_path.is_file():
        known = folder.recipe().task
        if task not in (None, known.name):
            raise UserError(f"{name} was trained for {known.name}, not {task}")
        return known if known.name in DENSE else None
    if task is not None:
        task_class(task)  # refuses what is none
    return TaskSection(name=task) if task in DENSE else None


@torch.no_grad()
def draw(
    name: str,
    paths: Sequence[Path],
    *,
    task: TaskSection,
    out: Path | None = None,
    weights: str | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
    device: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Depicted:
    """Return what a dense model sees in images, and draw it.

    Args:
        name: `kind:name`, or the folder of a run.
        paths: image files.
        task: the model's.
        out: folder for the drawings, for `answers.json`, and for `coco.json` where the task has COCO's form for them.
        weights: `pretrained` or a file.
        num_classes: of its outputs; its own default where None.
        image_size: to which images are brought; the run's by default.
        device: such as `cpu`; a GPU if there is one by default.
        options: of the task's data section, in the place of the run's.

    Raises:
        UserError: if the model is untrained, or its answers cannot be drawn.
    """
    if untrained(spec(name, weights)):
        raise UserError(f"{name} has random weights and would only guess: give --weights pretrained, or a file")
    folder = RunFolder(Path(name.removeprefix("run:")))
    given: dict[str, Any] = folder.recipe().data.model_dump() if folder.recipe_path.is_file() else {"source": "images"}
    if options:
        given[task.name] = {**(given.get(task.name) or {}), **options}
    if image_size:
        given["image_size"] = image_size
    section = Spec.parse({**given, "on_error": "skip"})
    model = load(spec(name, weights), task=task.name, num_classes=num_classes)
    samples: Dense = import_module(f"tutelage.data.{task.name}").images(paths, section, tuple(model.class_names))
    names = tuple(model.class_names)
    problem = task_of(task, num_classes=len(names), class_names=names, **model.source.get("geometry", {}))
    if not isinstance(problem, Depicting):
        raise UserError(f"answers of {task.name} cannot be drawn")
    runtime = Runtime(device)
    model.module.eval().to(runtime.device)
    loader = Loader(samples, 1, train=False, on_error="skip")
    answers: dict[str, Any] = {}
    drawings: dict[str, str] = {}
    for index, picture in _answers(problem, model, loader, runtime.device):
        path = samples.name(index)
        answers[path] = picture.plain()
        if out is not None:
            file = out / f"{Path(path).stem}.png"
            while str(file) in drawings.values():
                file = file.with_stem(f"{file.stem}-{index}")
            save(picture.draw(three(samples.read(index).image)), file)
            drawings[path] = str(file)
    found = Depicted(answers, drawings, dict(loader.skipped))
    if out is not None:
        write_text(out / "answers.json", json.dumps(found.plain()["images"], indent=2) + "\n")
        as_coco = getattr(problem, "coco", None)
        if callable(as_coco):
            write_text(out / "coco.json", json.dumps(as_coco(answers)) + "\n")
    return found


def _answers(task: Depicting, model: Any, loader: Loader, device: torch.device) -> Iterator[tuple[int, Picture]]:
    for position in range(loader.steps_per_epoch):
        try:
            batch = next(loader.epoch(0, position), None)
        except UserError:
            continue  # the one file of this batch cannot be read, which the loader remembers
        if batch is not None:
            moved = batch.to(device)
            yield from zip(batch.index.tolist(), task.pictures(answer(task, model, moved), moved), strict=True)
