# SPDX-License-Identifier: Apache-2.0
"""A training in several stages: each one a run of its own, in a folder of its own."""

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from shutil import copyfile
from typing import Any

from tutelage.core import Model
from tutelage.core.error import UserError
from tutelage.core.storage import write_text, write_whole
from tutelage.report.records import read_metrics
from tutelage.run.assemble import Assembled, assemble
from tutelage.run.folder import RunFolder
from tutelage.run.given import NOTHING, Given
from tutelage.run.page import run_page
from tutelage.run.pictures import take_over
from tutelage.run.recipe import Recipe, laid_over, parse
from tutelage.train.runtime import Runtime

#: The student of the stage before, as a teacher and as a source of `inherit`.
PREVIOUS = "previous"
LENGTHS = {"epochs": "steps", "steps": "epochs"}


def recipes_of(recipe: Recipe) -> dict[str, Recipe]:
    """Return the recipe of each stage by its name; of a training in one, the recipe itself.

    Raises:
        UserError: naming the stage, and what is wrong in it.
    """
    if not recipe.stages:
        return {"": recipe}
    plain = recipe.model_dump(mode="json", exclude={"stages", "compare", "inherit", "freeze"})
    found: dict[str, Recipe] = {}
    for number, stage in enumerate(recipe.stages):
        where = f"stages[{number}]"
        name = stage.name or f"stage{number + 1}"
        if not name.replace("-", "").replace("_", "").isalnum() or name in found:
            raise UserError(f"{where}.name: {name!r} is no name of its own of letters and digits, as folders have")
        changes = {key: value for key, value in stage.model_dump(mode="json", exclude={"name"}).items() if value}
        for given, other in LENGTHS.items():
            if given in stage.train:
                changes["train"].setdefault(other, None)
        first = {"inherit": recipe.inherit, "freeze": recipe.freeze} if not number else {}
        one = parse({**laid_over(plain, {**first, **changes})}, where=where)
        _check(one, where, first=not number)
        found[name] = one
    return found


def _check(one: Recipe, where: str, *, first: bool) -> None:
    sources = {place.partition(".")[0] for place in one.inherit.values()}
    taught = one.teacher is not None and one.teacher.model == PREVIOUS
    if first and (taught or PREVIOUS in sources):
        raise UserError(f"{where}: there is no stage before the first: name a model instead of {PREVIOUS!r}")


def goes_on(one: Recipe) -> bool:
    """Whether a stage trains the student of the stage before, and no new one."""
    return not one.inherit


def after(one: Recipe, student: Callable[[], Model], given: Given) -> Given:
    """Return what a stage holds in hand after another.

    Args:
        one: the stage.
        student: makes the student of the stage before, as often as it is asked.
        given: what the whole training holds.
    """
    taught = one.teacher is not None and one.teacher.model == PREVIOUS
    return Given(
        student=student() if goes_on(one) else None,
        teacher=student() if taught else given.teacher,
        data=given.data,
        previous=student(),
    )


def assembled(
    recipe: Recipe, runtime: Runtime | None = None, given: Given = NOTHING
) -> Iterator[tuple[str, Assembled]]:
    """Yield the name and the objects of each stage of an untrained run, one after the other.

    A later stage is given the student of the one before untrained, which has the same shapes.
    """
    held = given
    stages = recipes_of(recipe)
    for number, (name, one) in enumerate(stages.items()):
        made = assemble(one, runtime=runtime, given=held)
        yield name, made
        student = made.settled()
        if number + 1 < len(stages):
            held = after([*stages.values()][number + 1], partial(copy.deepcopy, student), given)


def gather(home: RunFolder, recipe: Recipe, stages: Mapping[str, RunFolder]) -> None:
    """Make of the finished stages one finished run: the last student, and the records of all.

    Args:
        home: the folder of the whole.
        recipe: with its stages.
        stages: their folders by name, in order. The result is the last one's, with the scores of each.
    """
    lines: list[str] = []
    step, epoch = 0, 0.0
    results: dict[str, dict[str, Any]] = {}
    for name, folder in stages.items():
        records = read_metrics(folder.metrics) if folder.metrics.exists() else []
        for record in records:
            moved = {"step": record["step"] + step, "epoch": record.get("epoch", 0.0) + epoch}
            lines.append(json.dumps({**record, **moved, "stage": name}) + "\n")
        step += max((int(record["step"]) for record in records), default=0)
        epoch += max((float(record.get("epoch", 0.0)) for record in records), default=0.0)
        results[name] = folder.result() or {}
    write_text(home.metrics, "".join(lines))
    first, last = next(iter(stages.values())), [*stages.values()][-1]
    write_whole(home.weights, partial(copyfile, last.weights))
    write_text(home.card, last.card.read_text(encoding="utf-8"))
    found = {**[*results.values()][-1], "stages": {name: result["scores"] for name, result in results.items()}}
    take_over(home.path, first.path, last.path)
    run_page(home, recipe, found)
    home.save_result(found)
