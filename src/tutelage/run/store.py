# SPDX-License-Identifier: Apache-2.0
"""Ask a teacher once, and write down what it said: of every sample, in as many views as a training shall see."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tutelage import __version__
from tutelage.core import Live
from tutelage.core.error import UserError
from tutelage.core.storage import write_whole
from tutelage.core.stored import LOGITS, pack
from tutelage.data.answers import (
    MANIFEST,
    WORDS,
    Answers,
    digest,
    file_name,
    fingerprint,
    manifest,
    plain,
    write_manifest,
)
from tutelage.data.loader import Loader, Replay
from tutelage.data.samples import Dense
from tutelage.run.assemble import Assembled, assemble
from tutelage.run.distill import distill, teacher_recipe
from tutelage.run.recipe import Recipe
from tutelage.run.resolve import resolve
from tutelage.run.stored import LENT
from tutelage.train.log import Log
from tutelage.train.runtime import Runtime

FILE_BYTES = 2**28  # of one file of answers, or of one batch if that is more


@dataclass(frozen=True)
class Kept:
    """What a store holds.

    Args:
        folder: where.
        signals: shape and kind of one row, by name.
        samples: number of samples.
        views: of each.
        bytes: of all files of answers.
    """

    folder: Path
    signals: Mapping[str, str]
    samples: int
    views: int
    bytes: int

    def plain(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {**vars(self), "folder": str(self.folder), "signals": dict(self.signals)}


def store(
    recipe: Recipe,
    folder: Path,
    *,
    views: int | None = None,
    top: int | None = None,
    quiet: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Kept:
    """Write down the answers that a recipe's terms read of its teacher; goes on where it stopped.

    Args:
        recipe: its teacher is asked about its training data.
        folder: of the store. A finished one is held against its hashes.
        views: of each sample, seen with the recipe's augmentation; by default as many as the recipe has epochs, or one
            without augmentation.
        top: keep so many of the largest class probabilities in the place of the logits.
        quiet: show no progress.
        say: told what was chosen.

    Raises:
        UserError: for whatever is wrong with the recipe, the data or the models; if the folder holds other answers.
    """
    for word, count in (("--views", views), ("--top", top)):
        if count is not None and count < 1:
            raise UserError(f"{word} must be at least 1, not {count}")
    recipe = resolve(recipe, say)
    if recipe.teacher is None or recipe.teacher.stored is not None:
        raise UserError("the recipe has no teacher to ask: its answers are to be stored")
    if recipe.teacher.mode != "eval":
        raise UserError(f"a teacher in mode {recipe.teacher.mode} answers by the batch; in mode eval it can be stored")
    runtime, fitted = Runtime(recipe.train.device, recipe.train.precision), None
    if recipe.teacher.fit is not None:
        fitted = distill(teacher_recipe(recipe), folder / "teacher", title="teacher", quiet=quiet).folder.weights
    made = assemble(recipe, teacher_weights=fitted, runtime=runtime)
    try:
        return _written(made, folder, views, top, quiet, say)
    finally:
        made.distiller.close()


def _written(
    made: Assembled, folder: Path, views: int | None, top: int | None, quiet: bool, say: Callable[[str], None]
) -> Kept:
    teacher = made.distiller.teachers["teacher"]
    assert isinstance(teacher, Live)
    loader = _ordered(made, views)
    asked, row_bytes = _asked(made, teacher, loader, top)
    files = math.ceil(asked["views"] * asked["data"]["samples"] / asked["rows"])
    if (folder / MANIFEST).exists():
        known = manifest(folder)
        other = [word for word, value in asked.items() if plain(value) != known.get(word)]
        if other:
            raise UserError(f"{folder} holds other answers ({', '.join(other)} differ); choose another --out")
        if "files" in known and all((folder / name).exists() for name in known["files"]):
            Answers.open(folder).verify()
            say(f"{folder} holds these answers already; every file is what it was")
            return _kept(folder, known)
    else:
        write_manifest(folder, asked)
    say(f"{files} files of {asked['rows'] * row_bytes / 2**20:.3g} MiB")
    _lend(teacher, folder)
    with Log(None, total=asked["views"] * asked["data"]["samples"], title="store", quiet=quiet) as log:
        for number in range(files):
            path = folder / file_name(number)
            if not path.exists():
                rows = _answers(made, teacher, loader, number, asked["rows"], top, log.show)
                write_whole(path, lambda partial, rows=rows: save_file(rows, partial))  # type: ignore[misc]
    paths = [folder / file_name(number) for number in range(files)]
    listed = {path.name: {"bytes": path.stat().st_size, "sha256": digest(path)} for path in paths}
    write_manifest(folder, {**asked, "files": listed})
    return _kept(folder, {**asked, "files": listed})


def _ordered(made: Assembled, views: int | None) -> Loader:
    """Return what reads every sample in its order, in one view after the other."""
    train = made.data.train
    if isinstance(train.samples, Dense):
        raise UserError(f"answers about whole samples are stored; those of {made.task.name} are not yet")
    if train.mixing is not None or train.views:
        raise UserError("data: mixed images and further views of a batch cannot be stored; leave them out")
    if train.late is not None:
        raise UserError("data.augment_late: views that come again every epoch have no last epochs; leave it out")
    if views is None:
        epochs = math.ceil(made.total_steps / made.steps_per_epoch)
        views = epochs if train.transform is not None else 1
    return Loader(
        train.samples,
        train.batch_size,
        train=True,
        transform=train.transform,
        workers=train.workers,
        drop_last=False,
        replay=Replay(made.recipe.train.seed, views, ordered=True),
    )


def _asked(made: Assembled, teacher: Live, loader: Loader, top: int | None) -> tuple[dict[str, Any], int]:
    """Return what the manifest says before anything is stored, and the bytes of a row."""
    batch = made.sample.to(made.runtime.device)
    with made.runtime.autocast():
        taps = teacher.observe(batch).taps
    found = pack(taps, top)
    row_bytes = sum(math.prod(tensor.shape[1:]) * tensor.element_size() for tensor in found.values())
    batches = max(1, FILE_BYTES // max(1, row_bytes * loader.batch_size))
    replay = loader.replay
    assert replay is not None
    words = made.recipe.data.model_dump(mode="json")
    asked = {
        "format": 1,
        "version": __version__,
        "task": made.task.name,
        "teacher": teacher.model.source,
        "precision": made.runtime.precision,
        "class_names": list(made.data.class_names),
        "num_classes": taps[LOGITS].shape[-1] if LOGITS in taps else 0,
        "signals": {name: _word(tensor) for name, tensor in found.items()},
        "lent": sorted(teacher.borrowed),
        "data": {**fingerprint(loader.samples), "words": {word: plain(words.get(word)) for word in WORDS}},
        "seed": replay.seed,
        "views": replay.views,
        # of a file: whole batches of one view, so that one file can be made anew
        "rows": min(batches * loader.batch_size, len(loader.samples)),
    }
    return asked, row_bytes


def _answers(
    made: Assembled,
    teacher: Live,
    loader: Loader,
    number: int,
    rows: int,
    top: int | None,
    show: Callable[[int], None],
) -> dict[str, Tensor]:
    """Return the rows of one file."""
    samples, parts = len(loader.samples), list[Mapping[str, Tensor]]()
    place = number * rows
    while place < min((number + 1) * rows, samples * (loader.replay.views if loader.replay else 1)):
        turn, first = divmod(place, samples)
        wanted = min((number + 1) * rows - place, samples - first)
        position, skipped = divmod(first, loader.batch_size)
        for batch in loader.epoch(turn, start=position):
            with made.runtime.autocast():
                signals = teacher.observe(batch.to(made.runtime.device))
            found = {name: tensor[skipped : skipped + wanted].cpu() for name, tensor in pack(signals.taps, top).items()}
            parts.append(found)
            count = len(next(iter(found.values())))
            wanted, skipped, place = wanted - count, 0, place + count
            show(place)
            if not wanted:
                break
    shapes = {name: {part[name].shape[1:] for part in parts} for name in parts[0]}
    for name, several in shapes.items():
        if len(several) > 1:
            raise UserError(f"the teacher's {name} changes its shape from batch to batch: it cannot be stored")
    return {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}


def _lend(teacher: Live, folder: Path) -> None:
    """Write the weights of the modules that the teacher lends."""
    held = {
        f"{role}/{name}": tensor.detach().cpu().contiguous().clone()
        for role, module in teacher.borrowed.items()
        for name, tensor in module.state_dict().items()
    }
    if held:
        write_whole(folder / LENT, lambda partial: save_file(held, partial))


def _kept(folder: Path, asked: Mapping[str, Any]) -> Kept:
    total = sum(entry["bytes"] for entry in asked["files"].values())
    return Kept(folder, asked["signals"], asked["data"]["samples"], asked["views"], total)


def _word(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape[1:])}"
