# SPDX-License-Identifier: Apache-2.0
"""One run: from a recipe to a trained student in a folder."""

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tutelage.core import Batch, Distiller, Model, Task
from tutelage.core.error import UserError
from tutelage.core.schedule import Span
from tutelage.core.task import answer as answered
from tutelage.data.load import Splits
from tutelage.data.loader import Loader
from tutelage.models import weights
from tutelage.models.known import untrained
from tutelage.models.load import load as load_model
from tutelage.report.dry_run import DryRun
from tutelage.report.measure import Measures, measure
from tutelage.report.metric import Metric
from tutelage.run.assemble import Assembled, assemble
from tutelage.run.check import check
from tutelage.run.closing import closing
from tutelage.run.folder import RunFolder
from tutelage.run.given import NOTHING, Given
from tutelage.run.page import run_page
from tutelage.run.pictures import depict
from tutelage.run.recipe import Recipe, parse
from tutelage.run.resolve import resolve
from tutelage.run.share import settle_shares
from tutelage.run.stages import after, assembled, gather, recipes_of
from tutelage.train.checkpoint import Shelf
from tutelage.train.lockstep import exhaust
from tutelage.train.log import Log
from tutelage.train.runtime import Runtime


@dataclass(frozen=True)
class Result:
    """What a run ended with.

    Args:
        scores: of the student on the validation split, last step (never the best one).
        measures: its size and speed.
        folder: where everything lies.
        trained: the student, if it is at hand.
    """

    scores: Mapping[str, float]
    measures: Measures
    folder: RunFolder
    trained: Model | None = field(default=None, compare=False, repr=False)

    @property
    def student(self) -> Model:
        """The student, on the CPU in eval mode; `student.module` is the plain `torch.nn.Module`."""
        return self.trained or load_model(f"run:{self.folder.path}")


def score(
    distiller_or_model: Distiller | Model,
    task: Task,
    loader: Loader,
    device: torch.device,
    progress: Callable[[int, str], None] = lambda done, said: None,
) -> dict[str, float]:
    """Return the task's scores of a student over a loader, in eval mode; `progress` is told of every batch."""
    if isinstance(distiller_or_model, Distiller):
        module, answer = distiller_or_model.student, distiller_or_model.answer
    else:
        module = distiller_or_model.module

        def answer(batch: Batch) -> Any:
            with torch.no_grad():
                return answered(task, distiller_or_model, batch)

    module.eval()

    def answers() -> Iterator[tuple[Any, Batch]]:
        for number, batch in enumerate(loader.epoch(0), start=1):
            progress(number, f"scoring {number}/{len(loader)}")
            moved = batch.to(device)
            yield answer(moved), moved
        progress(len(loader), "scoring")  # what follows the last batch may take as long

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
    given: Given = NOTHING,
) -> Result:
    """Run a recipe in a folder, from where it stopped if it was there before.

    Args:
        recipe: validated.
        folder: of the run.
        title: of the progress bar.
        quiet: show no progress bar.
        teacher_folder: where the fitted teacher lies or goes; inside the folder by default.
        say: told what was chosen, line by line.
        given: objects in the place of what the recipe names.

    Raises:
        UserError: for whatever is wrong with the recipe, the data or the models.
    """
    options: dict[str, Any] = {"title": title, "quiet": quiet, "teacher_folder": teacher_folder}
    return exhaust(distilling(recipe, folder, **options, say=say, given=given))


def distilling(
    recipe: Recipe,
    folder: Path,
    *,
    title: str = "student",
    quiet: bool = False,
    teacher_folder: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
    given: Given = NOTHING,
) -> Generator[int, None, Result]:
    """Do what `distill` does, and yield the number of steps done before each further one.

    Raises:
        UserError: for whatever is wrong with the recipe, the data or the models.
    """
    home, asked = RunFolder(folder), recipe
    runtime = Runtime(recipe.train.device, recipe.train.precision)
    with runtime.joined():
        begun = home.holds(asked)
        done = home.result() if begun else None
        if done is not None:
            say(f"{folder} holds this run, finished; remove the folder to run it again")
            return Result(done["scores"], Measures(**done["measures"]), home, _again(home, given))
        recipe = home.recipe() if begun else resolve(asked, say, given)
        settings, fitted = recipe.train, None
        if recipe.teacher is not None and recipe.teacher.fit is not None:
            place = teacher_folder or folder / "teacher"
            fit = teacher_recipe(recipe)
            if RunFolder(place).result() is None:
                rehearse(recipe, runtime, given)
            runtime.first(lambda: home.claim(asked, recipe))
            same = Given(data=given.data)
            found = distill(fit, place, title="teacher", quiet=quiet, say=_as_teacher(say), given=same)
            fitted = found.folder.weights
            say(f"teacher: fitted, {headline(RunFolder(place))}")
        if recipe.stages:
            return (yield from _staged(asked, recipe, home, title, quiet, place if fitted else None, say, given))
        made = assemble(recipe, teacher_weights=fitted, runtime=runtime, given=given)
        shelf = Shelf(home.checkpoints) if settings.save_every else None
        newest = shelf.newest if shelf else None
        if newest is None:
            recipe = settle_shares(made)
        brief = check(made).brief if newest is None else [f"goes on from {newest}"]
        with Log(home.metrics, total=made.total_steps, title=title, quiet=quiet) as log:
            loop = made.loop(
                log,
                shelf=shelf,
                save_every=_every(settings.save_every, made.steps_per_epoch),
                evaluate=lambda: score(
                    made.distiller,
                    made.task,
                    made.data.validation,
                    runtime.device,
                    lambda done, said: log.show(made.distiller.step, said),
                ),
                evaluate_every=_every(settings.evaluate_every, made.steps_per_epoch),
                **({} if given.batches is None else {"batches": given.batches}),
            )
            # the first thing written: all of the run was built
            runtime.first(lambda: home.claim(asked, recipe))
            say_found(made, say)
            for line in brief:
                say(line)
            if newest is None:
                runtime.first(lambda: depict(made, folder, "before"))
            scores = yield from loop.running()
        for line in left_out(made.data):
            say(line)
        if loop.average is not None:
            made.distiller.student.load_state_dict(loop.average.weights)
        return finish(home, made, scores)


def _staged(
    asked: Recipe,
    recipe: Recipe,
    home: RunFolder,
    title: str,
    quiet: bool,
    teacher_folder: Path | None,
    say: Callable[[str], None],
    given: Given,
) -> Generator[int, None, Result]:
    """Run the stages of a recipe one after the other, each in a folder of its own below `stages`."""
    runtime, place = Runtime(recipe.train.device, recipe.train.precision), home.path / "stages"
    if not place.exists():
        rehearse(recipe, runtime, given)
    runtime.first(lambda: home.claim(asked, recipe))
    folders: dict[str, RunFolder] = {}
    for name, one in recipes_of(recipe).items():
        say(f"stage {name}")
        held = given
        if folders:
            before = [*folders.values()][-1].path
            held = after(one, partial(load_model, f"run:{before}"), given)
        found = yield from distilling(
            one,
            place / name,
            title=f"{title}, {name}",
            quiet=quiet,
            teacher_folder=teacher_folder,
            say=say,
            given=held,
        )
        folders[name] = found.folder
    runtime.first(lambda: gather(home, recipe, folders))
    return Result(found.scores, found.measures, home, found.trained)


def _again(home: RunFolder, given: Given) -> Model | None:
    """Return an object that was given as the student, with the weights of its finished run."""
    if given.student is None:
        return None
    model = Model.of(given.student)
    weights.fit(model.module, weights.read(home.weights), home.weights)
    model.module.eval()
    return model


def headline(home: RunFolder) -> str:
    """Return the score of a finished run that says how good it is, in words."""
    result = home.result()
    assert result is not None
    metric = Metric.of(result["metric"])
    return metric.told(result["scores"][metric.key])


def _as_teacher(say: Callable[[str], None]) -> Callable[[str], None]:
    """Return how the fit of a teacher speaks: as its own."""
    return lambda text: say(f"teacher: {text}")


def left_out(data: Splits) -> Iterator[str]:
    """Yield what could not be read and was skipped, a line a split."""
    for split, loader in (("training", data.train), ("validation", data.validation)):
        if loader.skipped:
            name, reason = next(iter(loader.skipped.items()))
            count = len(loader.skipped)
            those = "1 image was" if count == 1 else f"{count} images were"
            yield f"{split}: {those} skipped as unreadable, such as {name} ({reason})"


def rehearse(recipe: Recipe, runtime: Runtime, given: Given = NOTHING) -> None:
    """Build everything of a run once: whatever is wrong shows before anything is trained or written.

    Raises:
        UserError: for whatever is wrong with the recipe, the data or the models.
    """
    if recipe.teacher is not None and recipe.teacher.fit is not None:
        try:
            rehearse(teacher_recipe(recipe), runtime, Given(data=given.data))
        except UserError as error:
            raise UserError(f"teacher.fit: {str(error).removeprefix('teacher.fit: ')}") from error
    for _, made in assembled(recipe, runtime, given):
        made.loop(Log(None, quiet=True))


def say_found(made: Assembled, say: Callable[[str], None]) -> None:
    """Tell what was rebuilt and what the dry run found."""
    for line in made.inherited:
        say(f"inherited: {line}")
    for rebuild in made.rebuilds:
        say(rebuild.report())
    found, teacher = made.distiller.report, made.recipe.teacher
    named = {"model": teacher.model, "weights": teacher.weights} if teacher else {}
    if teacher and not teacher.fit and untrained(named):
        say(f"the teacher {teacher.model} is untrained: give teacher.weights, or teacher.fit to train it first")
    known = made.distiller.models
    sources = sorted(found.shapes, key=lambda name: name.partition("@")[0] not in known)
    for source in sources if made.distiller.objective.entries else ():
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
    made.runtime.first(lambda: depict(made, home.path, "after"))
    scores = {**scores, **({} if look.agreement is None else {"agreement": look.agreement})}
    student = made.settled()
    student.module.eval().to("cpu")
    measures = measure(student, made.sample.to("cpu").inputs)

    def write() -> None:
        rebuilds = [*student.source.get("rebuilds", ()), *(rebuild.record() for rebuild in made.rebuilds)]
        card = {**student.source, "task": made.task.name, **({"rebuilds": rebuilds} if rebuilds else {})}
        home.save_student(student.module, card)
        for name, peer in made.distiller.models.items():
            if name != "student":
                peer.module.eval().to("cpu")
                home.peer(name).save_student(peer.module, {**peer.source, "task": made.task.name})
        found = {
            "metric": made.task.headline,
            "scores": scores,
            "teacher": look.teacher,
            "classes": look.classes,
            "peers": look.peers,
            "measures": measures.plain(),
            "dry_run": asdict(dry_run),
        }
        run_page(home, made.recipe, found)
        home.save_result(found)  # last: the sign of a finished run

    made.runtime.first(write)
    return Result(scores, measures, home, student)
