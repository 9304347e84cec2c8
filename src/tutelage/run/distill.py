# SPDX-License-Identifier: Apache-2.0
"""One run: from a recipe to a trained student in a folder."""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from tutelage.core import Batch, Distiller, Live, Model, Task, Teacher, ranks
from tutelage.core.error import UserError, nearest
from tutelage.core.schedule import Span
from tutelage.data.load import Splits
from tutelage.data.load import load as load_data
from tutelage.data.loader import Loader
from tutelage.functional.noise import mix
from tutelage.models.load import load as load_model
from tutelage.report.dry_run import DryRun
from tutelage.report.measure import Measures, measure
from tutelage.report.metric import Metric
from tutelage.run.folder import RunFolder
from tutelage.run.objective import build as build_objective
from tutelage.run.page import run_page
from tutelage.run.recipe import Recipe, TaskSection, parse
from tutelage.train.average import Average
from tutelage.train.checkpoint import Shelf
from tutelage.train.log import Log
from tutelage.train.loop import Loop
from tutelage.train.optimizer import build as build_optimizer
from tutelage.train.rate import Rate
from tutelage.train.runtime import Runtime

INIT, TERMS = 1, 2  # salts of the seeds of the student's and the terms' initial weights


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


def build_task(section: TaskSection, **known: Any) -> Task:
    """Return the task of a recipe; `known` are facts of the data its constructor may want.

    Raises:
        UserError: on an unknown task or option.
    """
    home = Path(__file__).parent.parent / "tasks"
    stems = [path.stem for path in home.glob("*.py") if path.stem != "__init__"]
    if section.name not in stems:
        raise UserError(f"task: unknown task {section.name!r}{nearest(section.name, stems)}")
    module = import_module(f"tutelage.tasks.{section.name}")
    kind = next(v for v in vars(module).values() if getattr(v, "name", None) == section.name)
    accepted = inspect.signature(kind).parameters
    for option in section.options:
        if option not in accepted:
            raise UserError(f"task.{option}: unknown option of {section.name}{nearest(option, accepted)}")
    task: Task = kind(**{k: v for k, v in known.items() if k in accepted}, **section.options)
    return task


def score(
    distiller_or_model: Distiller | Model, task: Task, loader: Loader, device: torch.device
) -> dict[str, float]:
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


def make_student(recipe: Recipe, data: Splits) -> Model:
    """Return the freshly initialised student of a recipe: a function of its seed alone."""
    torch.manual_seed(mix(recipe.train.seed, INIT))
    return load_model(
        {"model": recipe.student.model, "weights": recipe.student.weights, **recipe.student.options},
        num_classes=data.num_classes,
        in_channels=data.sample().inputs.shape[1],
        class_names=data.class_names,
    )


def make_teacher(recipe: Recipe, data: Splits, folder: Path, quiet: bool) -> Teacher | None:
    """Return the teacher of a recipe, fitted to the data first if the recipe says so."""
    section = recipe.teacher
    if section is None:
        return None
    spec: dict[str, Any] = {"model": section.model, "weights": section.weights, **section.options}
    if section.fit is not None:
        fitted = distill(teacher_recipe(recipe), folder, title="teacher", quiet=quiet)
        spec["weights"] = str(fitted.folder.weights)
    model = load_model(
        spec,
        num_classes=data.num_classes,
        in_channels=data.sample().inputs.shape[1],
        class_names=data.class_names,
    )
    if model.class_names and data.class_names and tuple(model.class_names) != tuple(data.class_names):
        raise UserError(
            "the teacher's classes are not the data's, or lie in another order; see `tutelage check`"
        )
    return Live(model, section.mode)


def teacher_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe by which a recipe's teacher is fitted: the task alone, with the changes of `fit`."""
    section = recipe.teacher
    assert section is not None
    assert section.fit is not None
    plain = recipe.model_dump(mode="json")
    changes = section.fit.model_dump()
    merged = {key: {**plain[key], **changes[key]} for key in ("data", "optimizer", "train")}
    merged["train"]["seed"] = changes["train"].get("seed", 0)  # one teacher for all seeds of the student
    if "steps" in changes["train"]:
        merged["train"]["epochs"] = None
    student = {"model": section.model, "weights": section.weights, **section.options}
    return parse(
        {"task": plain["task"], "student": student, "objective": {"task": 1.0}, **merged}, where="teacher.fit"
    )


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
        home.claim(recipe)
        data = load_data(
            recipe.data.model_dump(), seed=settings.seed, rank=ranks.rank(), world_size=ranks.world_size()
        )
        task = build_task(recipe.task, num_classes=data.num_classes, class_names=data.class_names)
        sample = data.sample()
        student = make_student(recipe, data)
        student.module.to(runtime.device)
        done = home.result()
        if done is not None:
            return Result(done["scores"], Measures(**done["measures"]), home)
        teacher = make_teacher(recipe, data, teacher_folder or folder / "teacher", quiet)
        if isinstance(teacher, Live):
            teacher.model.module.to(runtime.device)
        objective = build_objective(recipe.objective)
        batches = data.train
        per_epoch = math.ceil(batches.steps_per_epoch / settings.accumulate)
        total = settings.steps or max(1, round((settings.epochs or 0) * per_epoch))
        facts = data.facts(total, settings.seed, settings.accumulate)
        torch.manual_seed(mix(settings.seed, TERMS))
        distiller = Distiller(student, objective, task=task, teacher=teacher, sample=sample, facts=facts)
        say_found(distiller, say)
        if settings.compile:
            distiller.compile()
        optimizer_section = recipe.optimizer
        decay = optimizer_section.weight_decay
        groups = distiller.param_groups(None if optimizer_section.decay_norms else decay)
        own = {"weight_decay": decay} if optimizer_section.decay_norms else {}
        with Log(home.metrics, total=total, title=title, quiet=quiet) as log:
            loop = Loop(
                distiller=distiller,
                batches=batches,
                optimizer=build_optimizer(
                    optimizer_section.name,
                    groups,
                    lr=optimizer_section.lr,
                    **own,
                    **optimizer_section.options,
                ),
                rate=Rate(
                    settings.decay,
                    steps_per_epoch=per_epoch,
                    total_steps=total,
                    warmup=Rate.warm(settings.warmup, per_epoch),
                    end=settings.end,
                    milestones=settings.milestones,
                    gamma=settings.gamma,
                ),
                total_steps=total,
                seed=settings.seed,
                runtime=runtime,
                accumulate=settings.accumulate,
                clip=settings.clip,
                average=Average(distiller.student, settings.ema) if settings.ema is not None else None,
                log=log,
                shelf=Shelf(home.checkpoints) if settings.save_every else None,
                save_every=_every(settings.save_every, per_epoch),
                log_every=settings.log_every,
                evaluate=lambda: score(distiller, task, data.validation, runtime.device),
                evaluate_every=_every(settings.evaluate_every, per_epoch),
            )
            scores = loop.run()
        distiller.close()
        if loop.average is not None:
            distiller.student.load_state_dict(loop.average.weights)
        return finish(home, recipe, student, task, sample, scores, DryRun.of(distiller))


def say_found(distiller: Distiller, say: Callable[[str], None]) -> None:
    """Tell what the dry run found."""
    for source, shapes in distiller.report.shapes.items():
        say(f"{source} reads {', '.join(f'{name} {list(shape)}' for name, shape in shapes.items())}")
    if distiller.report.overwritten:
        say(f"cloned, since a later operation writes into them: {', '.join(distiller.report.overwritten)}")
    if distiller.report.frozen:
        names = distiller.report.frozen
        say(f"frozen, since no loss reaches them: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}")


def finish(
    home: RunFolder,
    recipe: Recipe,
    student: Model,
    task: Task,
    sample: Batch,
    scores: Mapping[str, float],
    dry_run: DryRun,
) -> Result:
    """Write the student, its scores and the page of the run."""
    student.module.eval().to("cpu")
    measures = measure(student, sample.inputs[:1].cpu())
    if ranks.rank() == 0:
        home.save_student(student.module, {**student.source, "task": task.name})
        found = {"scores": dict(scores), "measures": measures.plain(), "dry_run": asdict(dry_run)}
        run_page(home, recipe, Metric.of(task.headline), scores, measures, dry_run)
        home.save_result(found)  # last: the sign of a finished run
    return Result(scores, measures, home)
