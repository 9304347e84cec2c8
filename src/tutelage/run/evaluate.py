# SPDX-License-Identifier: Apache-2.0
"""Scores of a finished run's student."""

from pathlib import Path

from tutelage.core.error import UserError, nearest
from tutelage.data.load import load as load_data
from tutelage.models.load import load as load_model
from tutelage.run.assemble import task_of
from tutelage.run.distill import score
from tutelage.run.folder import RunFolder
from tutelage.train.log import Log
from tutelage.train.runtime import Runtime


def evaluate(run: Path, *, source: str | None = None, split: str = "validation") -> dict[str, float]:
    """Return the scores of a run's student, computed now.

    Args:
        run: folder of the run.
        source: other data than the run's own.
        split: `validation` or `test`.

    Raises:
        UserError: if the folder holds no student, or the data has no such split or other classes.
    """
    recipe = RunFolder.existing(run).recipe()
    learning = {"labels": None, "labelled_per_batch": None, "unlabelled": None}  # no matter for a score
    section = recipe.data.model_copy(update={**learning, **({"source": source} if source else {})})
    data = load_data(section.model_dump(), task=recipe.task.name, seed=recipe.train.seed)
    loaders = {"validation": data.validation, "test": data.test}
    if split not in loaders:
        raise UserError(f"--split {split!r} is not known{nearest(split, loaders)}")
    loader = loaders[split]
    if loader is None:
        raise UserError(f"{section.source} has no {split} split")
    model = load_model(f"run:{run}")
    if model.class_names and data.class_names and tuple(model.class_names) != tuple(data.class_names):
        raise UserError(f"the student's classes are not those of {section.source}, or lie in another order")
    runtime = Runtime(recipe.train.device)
    model.module.to(runtime.device)
    task = task_of(recipe.task, **data.task_facts())
    with Log(None, total=len(loader), title=split) as log:
        return score(model, task, loader, runtime.device, log.show)
