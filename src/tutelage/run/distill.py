# SPDX-License-Identifier: Apache-2.0
"""One run: from a recipe to a trained student in a folder."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tutelage.core import Batch, Distiller, Model, Task
from tutelage.core.schedule import Span
from tutelage.data.loader import Loader
from tutelage.report.dry_run import DryRun
from tutelage.report.measure import Measures, measure
from tutelage.run.assemble import Assembled, assemble
from tutelage.run.closing import closing
from tutelage.run.folder import RunFolder
from tutelage.run.page import run_page
from tutelage.run.recipe import Recipe, parse
from tutelage.train.checkpoint import Shelf
from tutelage.train.log import Log
from tutelage.train.runtime import Runtime

BLANK = ("tutelage", "timm", "torchvision")  # models that come without weights unless some are asked for


@dataclass(frozen=True)
class Result:
    """What a run ended with.

    Args:
        scores: of the student on the validation split, last step (never the best one).
        measures: its size and speed.
        folder: where everything lies.
    """

    scores: Mapping[str, float]
    measures: Measures
    folder: RunFolder


def score(distiller_or_model: Distiller | Model, task: Task, loader: Loader, device: torch.device) -> dict[str, float]:
    """Return the task's scores of a student over a loader, in eval mode."""
    if isinstance(distiller_or_model, Distiller):
        module, answer = distiller_or_model.student, distiller_or_model.answer
    else:
        module = distiller_or_model.module

        def answer(batch: Batch) -> Any:
            with torch.no_grad():
                return task.call(distiller_or_model, batch)

    module.eval()

    def answers() -> Iterator[tuple[Any, Batch]]:
        for batch in loader.epoch(0):
            moved = batch.to(device)
            yield answer(moved), moved

    return task.score(answers())


def teacher_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe by which a recipe's teacher is fitted: the task alone, with the changes of `fit`."""
    section = recipe.teacher
    assert section is not None
    assert section.fit is not None
    plain = recipe.model_dump(mode="json")
    changes = section.fit.model_dump()
    if changes["optimizer"].get("name", recipe.optimizer.name) != recipe.optimizer.name:
        plain["optimizer"] = {}  # options of one optimizer are not those of another
    merged = {key: {**plain[key], **changes[key]} for key in ("data", "optimizer", "train")}
    merged["train"]["seed"] = changes["train"].get("seed", 0)  # one teacher for all seeds of the student
    for given, other in (("steps", "epochs"), ("epochs", "steps")):
        if given in changes["train"]:
            merged["train"][other] = changes["train"].get(other)
    student = {"model": section.model, "weights": section.weights, **section.options}
    return parse({"task": plain["task"], "student": student, "objective": {"task": 1.0}, **merged}, where="teacher.fit")


def _every(text: str | None, steps_per_epoch: int) -> int:
    return max(1, round(Span.parse(text).steps(steps_per_epoch))) if text else 0


def distill(
    recipe: Recipe,
    folder: Path,
    *,
    title: str = "student",
    quiet: bool = False,
    teacher_folder: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Result:
    """Run a recipe in a folder, from where it stopped if it was there before.

    Args:
        recipe: validated.
        folder: of the run.
        title: of the progress bar.
        quiet: show no progress bar.
        teacher_folder: where the fitted teacher lies or goes; inside the folder by default.
        say: told what was chosen, line by line.

    Raises:
        UserError: for whatever is wrong with the recipe, the data or the models.
    """
    home = RunFolder(folder)
    settings = recipe.train
    runtime = Runtime(settings.device, settings.precision)
    with runtime.joined():
        done = home.result() if home.holds(recipe) else None
        if done is not None:
            say(f"{folder} holds this run, finished; remove the folder to run it again")
            return Result(done["scores"], Measures(**done["measures"]), home)
        fitted = None
        if recipe.teacher is not None and recipe.teacher.fit is not None:
            place = teacher_folder or folder / "teacher"
            if RunFolder(place).result() is None:
                rehearse(recipe, runtime)
            runtime.first(lambda: home.claim(recipe))
            fitted = distill(teacher_recipe(recipe), place, title="teacher", quiet=quiet).folder.weights
        made = assemble(recipe, teacher_weights=fitted, runtime=runtime)
        with Log(home.metrics, total=made.total_steps, title=title, quiet=quiet) as log:
            loop = made.loop(
                log,
                shelf=Shelf(home.checkpoints) if settings.save_every else None,
                save_every=_every(settings.save_every, made.steps_per_epoch),
                evaluate=lambda: score(made.distiller, made.task, made.data.validation, runtime.device),
                evaluate_every=_every(settings.evaluate_every, made.steps_per_epoch),
            )
            runtime.first(lambda: home.claim(recipe))  # the first thing written: all of the run was built
            say_found(made, say)
            if loop.shelf and loop.shelf.newest:
                say(f"goes on from {loop.shelf.newest}")
            scores = loop.run()
        if loop.average is not None:
            made.distiller.student.load_state_dict(loop.average.weights)
        return finish(home, made, scores)


def rehearse(recipe: Recipe, runtime: Runtime) -> None:
    """Build everything of a run once: whatever is wrong shows before anything is trained or written.

    Raises:
        UserError: for whatever is wrong with the recipe, the data or the models.
    """
    if recipe.teacher is not None and recipe.teacher.fit is not None:
        rehearse(teacher_recipe(recipe), runtime)
    made = assemble(recipe, runtime=runtime)
    made.loop(Log(None, quiet=True))
    made.distiller.close()


def say_found(made: Assembled, say: Callable[[str], None]) -> None:
    """Tell what was rebuilt and what the dry run found."""
    for rebuild in made.rebuilds:
        say(rebuild.report())
    found, teacher = made.distiller.report, made.recipe.teacher
    if teacher and not (teacher.weights or teacher.fit) and teacher.model.partition(":")[0] in BLANK:
        say(f"the teacher {teacher.model} is untrained: give teacher.weights, or teacher.fit to train it first")
    for source in sorted(found.shapes, key=lambda name: name.partition("@")[0] not in made.distiller.models):
        shapes = found.shapes[source]
        say(f"{source} reads {', '.join(f'{name} {list(shape)}' for name, shape in shapes.items())}")
    if found.overwritten:
        say(f"cloned, since a later operation writes into them: {', '.join(found.overwritten)}")
    if found.frozen:
        more = ", ..." if len(found.frozen) > 4 else ""
        say(f"frozen, since no loss reaches them: {', '.join(found.frozen[:4])}{more}")


def finish(home: RunFolder, made: Assembled, scores: Mapping[str, float]) -> Result:
    """Write the student, its scores and the page of the run."""
    dry_run, look = DryRun.of(made.distiller), closing(made)
    scores = {**scores, **({} if look.agreement is None else {"agreement": look.agreement})}
    student = made.settled()
    student.module.eval().to("cpu")
    measures = measure(student, made.sample.to("cpu").inputs)

    def write() -> None:
        rebuilds = [rebuild.record() for rebuild in made.rebuilds]
        card = {**student.source, "task": made.task.name, **({"rebuilds": rebuilds} if rebuilds else {})}
        home.save_student(student.module, card)
        found = {
            "metric": made.task.headline,
            "scores": scores,
            "teacher": look.teacher,
            "classes": look.classes,
            "measures": measures.plain(),
            "dry_run": asdict(dry_run),
        }
        run_page(home, made.recipe, found)
        home.save_result(found)  # last: the sign of a finished run

    made.runtime.first(write)
    return Result(scores, measures, home)
