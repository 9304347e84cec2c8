# SPDX-License-Identifier: Apache-2.0
"""From a recipe to the objects of a run: data, task, models, Distiller, loop."""

import inspect
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tutelage.core import Batch, Distiller, Live, Model, Rebuild, Task, Teacher, ranks
from tutelage.core.error import UserError, nearest
from tutelage.core.schedule import Span
from tutelage.core.task import DENSE
from tutelage.data.load import Splits
from tutelage.data.load import load as load_data
from tutelage.functional.noise import mix
from tutelage.models.inherit import freeze, inherit
from tutelage.models.known import UNCOUNTED, trained_classes, untrained
from tutelage.models.load import load as load_model
from tutelage.models.weights import OtherClassesError
from tutelage.run.given import NOTHING, Given, model_of
from tutelage.run.objective import build as build_objective
from tutelage.run.objective import checked, feeders_of, peers_of, rebuilds_of
from tutelage.run.recipe import Recipe, TaskSection
from tutelage.run.stored import replay_of, stored_teacher
from tutelage.train.average import Average
from tutelage.train.log import Log
from tutelage.train.loop import Loop
from tutelage.train.optimizer import build as build_optimizer
from tutelage.train.rate import Rate
from tutelage.train.runtime import Runtime

LINES = 20  # of the log, for a run too short for two
INIT, TERMS = 1, 2  # salts of the seeds of the student's and the terms' initial weights


@dataclass
class Assembled:
    """Everything of one run but its folder.

    Args:
        recipe: what was asked.
        runtime: device and precision.
        data: loaders.
        task: the problem.
        student: what learns, rebuilt if a method asks for it.
        rebuilds: the changes made to it, in order.
        distiller: built, after its dry run.
        sample: the batch of the dry run.
        total_steps: optimizer steps.
        steps_per_epoch: optimizer steps.
        inherited: what the student took over from other models, a line a part.
        frozen: parameters of the student that the recipe does not let train.
    """

    recipe: Recipe
    runtime: Runtime
    data: Splits
    task: Task
    student: Model
    rebuilds: list[Rebuild]
    distiller: Distiller
    sample: Batch
    total_steps: int
    steps_per_epoch: int
    inherited: Sequence[str] = ()
    frozen: Sequence[nn.Parameter] = ()

    def loop(self, log: Log, **more: Any) -> Loop:
        """Return the loop that trains it; `more` are places of records and evaluation."""
        settings, section = self.recipe.train, self.recipe.optimizer
        groups = self.distiller.param_groups(None if section.decay_norms else section.weight_decay)
        own = {"weight_decay": section.weight_decay} if section.decay_norms else {}
        return Loop(
            distiller=self.distiller,
            optimizer=build_optimizer(section.name, groups, lr=section.lr, **own, **section.options),
            rate=Rate(
                settings.decay,
                steps_per_epoch=self.steps_per_epoch,
                total_steps=self.total_steps,
                warmup=Rate.warm(settings.warmup, self.steps_per_epoch),
                end=settings.end,
                milestones=settings.milestones,
                gamma=settings.gamma,
                power=settings.power,
            ),
            total_steps=self.total_steps,
            seed=settings.seed,
            runtime=self.runtime,
            accumulate=settings.accumulate,
            clip=settings.clip,
            average=self._average(),
            log=log,
            log_every=self._log_every(settings.log_every),
            **{"batches": self.data.train, **more},
        )

    def _average(self) -> Average | None:
        ema = self.recipe.train.ema
        if ema is None:
            return None
        ramp = Span.parse(ema.ramp).steps(self.steps_per_epoch) if ema.ramp else 0.0
        return Average(self.distiller.student, ema.decay, ramp or None)

    def _log_every(self, asked: int) -> int:
        """Return the steps between log lines: a run that would have one alone has more."""
        return asked if self.total_steps >= 2 * asked else max(self.total_steps // LINES, 1)

    def settled(self) -> Model:
        """Return the student after training: hooks gone, what a method built settled."""
        self.distiller.close()
        for parameter in self.frozen:
            parameter.requires_grad_(True)
        for rebuild in reversed(self.rebuilds):
            self.student = rebuild.end(self.student)
        return self.student


def task_class(name: str) -> Any:
    """Return the class of a task: that of the file of its name.

    Raises:
        UserError: if there is none.
    """
    home = Path(__file__).parent.parent / "tasks"
    stems = [path.stem for path in home.glob("*.py") if path.stem != "__init__"]
    if name not in stems:
        raise UserError(f"task: unknown task {name!r}{nearest(name, stems)}")
    module = import_module(f"tutelage.tasks.{name}")
    return next(v for v in vars(module).values() if getattr(v, "name", None) == name)


def task_of(section: TaskSection, **known: Any) -> Task:
    """Return the task of a recipe; `known` are facts of the data its constructor may want.

    Raises:
        UserError: on an unknown task or option.
    """
    kind = task_class(section.name)
    accepted = inspect.signature(kind).parameters
    task: Task = checked(kind, {**{k: v for k, v in known.items() if k in accepted}, **section.options}, "task")
    return task


def _model(section: Mapping[str, Any], data: Splits) -> Model:
    return load_model(section, **data.model_facts())


def _peers(recipe: Recipe, data: Splits) -> dict[str, Model]:
    """Return the further students; each one's first weights are a function of the seed and of its name.

    Raises:
        UserError: on a peer that no term reads.
    """
    named, peers = peers_of(recipe.objective), {}
    for name, section in recipe.peers.items():
        if name not in named:
            raise UserError(f"peers.{name}: no term of the objective reads it; name it as a term's student or teacher")
        torch.manual_seed(mix(recipe.train.seed, INIT, zlib.crc32(name.encode())))
        peers[name] = _model({"model": section.model, "weights": section.weights, **section.options}, data)
    return peers


def teacher_of(recipe: Recipe, data: Splits, weights: Path | None, given: Given) -> Teacher | None:
    """Return the teacher of a recipe.

    Args:
        recipe: with or without one.
        data: whose classes it must know.
        weights: of a teacher that was fitted to the data first.
        given: may hold it.

    Raises:
        UserError: if its classes are not the data's.
    """
    section = recipe.teacher
    if section is None or isinstance(given.teacher, Teacher):
        return given.teacher if isinstance(given.teacher, Teacher) else None
    if section.stored is not None:
        return stored_teacher(section.stored, recipe, data)
    if given.teacher is not None:
        return Live(model_of(given.teacher, data.sample().inputs, ()), section.mode)
    facts = data.model_facts()
    chosen = str(weights) if weights else section.weights
    spec = {"model": section.model, "weights": chosen, **section.options}
    if weights is None:
        _require_classes(recipe, spec, data)
        if "class_names" in facts and recipe.task.name not in DENSE:
            facts["class_names"] = ()  # its own names, if it has any, are held against the data's
    try:
        model = load_model(spec, **facts)
    except OtherClassesError as error:
        said = str(error).partition(";")[0]
        raise UserError(f"teacher: {said}: teacher.fit: auto fits it to the data first") from error
    if model.class_names and data.class_names and tuple(model.class_names) != tuple(data.class_names):
        raise UserError(
            f"the teacher's classes ({_few(model.class_names)}) are not the data's "
            f"({_few(data.class_names)}), or lie in another order"
        )
    return Live(model, section.mode)


def _taken_over(
    recipe: Recipe, student: Model, teacher: Teacher | None, given: Given
) -> tuple[list[str], list[nn.Parameter]]:
    """Copy what the student inherits and freeze what is not to be trained; return the report and the frozen.

    Raises:
        UserError: if a source or module does not exist.
    """
    sources = {"teacher": teacher.model.module} if teacher and teacher.model else {}
    if given.previous is not None:
        sources["previous"] = given.previous.module
    return inherit(student.module, recipe.inherit, sources), freeze(student.module, recipe.freeze)


def _require_classes(recipe: Recipe, spec: Mapping[str, Any], data: Splits) -> None:
    """Refuse a teacher whose own weights answer for other classes, where its answers are read.

    Raises:
        UserError: naming both numbers.
    """
    assert recipe.teacher is not None
    of_library = spec["weights"] == "pretrained" or (spec["weights"] is None and spec["model"].startswith("hf:"))
    if not of_library or recipe.teacher.fit is not None or not data.num_classes or recipe.task.name in UNCOUNTED:
        return
    wanted = int(spec.get("num_classes", data.num_classes)) if "outputs" in spec else data.num_classes
    entries = build_objective(recipe.objective).entries.values()
    read = {tap.where for entry in entries for tap in entry.term.reads.teacher}
    read |= {role for entry in entries for role in (*entry.term.reads.borrows, *entry.term.reads.calls)}
    known = None if untrained(spec) else trained_classes(spec, wanted)
    if read & {"logits", "classifier", "classifier.weight"} and known not in (None, wanted):
        raise UserError(
            f"teacher: {spec['model']} tells {known} classes apart, the data has {wanted}: "
            "teacher.fit: auto fits it to the data first"
        )


def _require_pixels(sample: Batch, *models: Model) -> None:
    """Refuse images that are normalised already for a model that normalises for itself.

    Raises:
        UserError: saying what to leave out.
    """
    pixels = sample.inputs
    outside = isinstance(pixels, torch.Tensor) and bool(((pixels < 0) | (pixels > 1)).any())
    if outside and any(model.input is not None and model.input.mean for model in models):
        raise UserError(
            f"data: pixels lie between {pixels.min():.2f} and {pixels.max():.2f}, and models that are named want "
            "them in [0, 1] and normalise for themselves: leave the normalisation out of the data set"
        )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _read(distiller: Distiller) -> bool:
    """Whether some term reads a teacher."""
    entries = distiller.objective.entries.values()
    taught = [entry.term.reads for entry in entries if entry.teacher.partition("@")[0] in distiller.teachers]
    return any(reads.taught for reads in taught)


def assemble(
    recipe: Recipe,
    *,
    teacher_weights: Path | None = None,
    runtime: Runtime | None = None,
    given: Given = NOTHING,
) -> Assembled:
    """Return the objects of a run; the student's first weights are a function of the seed alone.

    Args:
        recipe: validated.
        teacher_weights: of a teacher that was fitted to the data first.
        runtime: device and precision; the recipe's by default.
        given: objects in the place of what the recipe names.

    Raises:
        UserError: for whatever is wrong with the recipe, the data or the models.
    """
    settings = recipe.train
    runtime = runtime or Runtime(settings.device, settings.precision)
    world: dict[str, Any] = {"rank": ranks.rank(), "world_size": ranks.world_size()}
    reading: dict[str, Any] = {"task": recipe.task.name, "seed": settings.seed, "replay": replay_of(recipe)}
    data = given.splits or load_data(recipe.data.model_dump(), sets=given.sets, **reading, **world)
    task = task_of(recipe.task, **data.task_facts())
    sample = data.sample(max(1, min(2, recipe.data.batch_size // ranks.world_size())))
    per_epoch = math.ceil(data.train.steps_per_epoch / settings.accumulate)
    total = settings.steps or max(1, round((settings.epochs or 0) * per_epoch))
    data.train.epochs = math.ceil(total / per_epoch)
    facts = data.facts(total, settings.seed, settings.accumulate)

    torch.manual_seed(mix(settings.seed, INIT))
    if given.student is not None:
        student = model_of(given.student, sample.inputs, data.class_names)
    else:
        section = recipe.student
        student = _model({"model": section.model, "weights": section.weights, **section.options}, data)
    teacher = teacher_of(recipe, data, teacher_weights, given)
    inherited, frozen = _taken_over(recipe, student, teacher, given)
    if given.data is not None:
        _require_pixels(sample, student, *([teacher.model] if teacher and teacher.model else []))
    peers = _peers(recipe, data)
    torch.manual_seed(mix(settings.seed, TERMS))
    rebuilds: list[Rebuild] = []
    lender = teacher.model if teacher is not None else None
    for rebuild in rebuilds_of(recipe.objective):
        student = rebuild.begin(student, lender, task, facts, sample)
        rebuilds.append(rebuild)
    for learner in (student, *peers.values()):
        learner.module.to(runtime.device)
    for network in teacher.networks() if teacher else ():
        network.to(runtime.device)
    distiller = Distiller(
        {"student": student, **peers},
        build_objective(recipe.objective),
        task=task,
        teacher=teacher,
        sample=sample,
        facts=facts,
        feeders=feeders_of(recipe.objective),
    )
    if teacher is not None and not rebuilds and not recipe.inherit and not _read(distiller):
        distiller.close()
        raise UserError("teacher: no term of the objective reads it; leave it out, or add a term that does, such as kd")
    if settings.compile:
        distiller.compile()
    return Assembled(
        recipe, runtime, data, task, student, rebuilds, distiller, sample, total, per_epoch, inherited, frozen
    )
