# SPDX-License-Identifier: Apache-2.0
"""Two steps of a run before it: what meets what, how strong each loss is, and how long it will take."""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch

from tutelage.core import Batch, Distiller, InputSpec, Task, ranks
from tutelage.core.error import UserError
from tutelage.core.task import answer
from tutelage.report.dry_run import DryRun
from tutelage.report.measure import evaluating
from tutelage.report.number import fixed, percent
from tutelage.report.table import Table
from tutelage.run.assemble import Assembled
from tutelage.run.untouched import untouched
from tutelage.train.log import Log

PROBED = 8  # validation batches on which the teacher is scored


@dataclass(frozen=True)
class Strength:
    """One loss of an objective as it acts on the student.

    Args:
        value: mean over the steps, before its weight.
        gradient: norm of its gradient on the student, mean over the steps, before its weight.
        weight: at the end of its schedule.
        share: of the weighted gradient norms of all losses.
    """

    value: float
    gradient: float
    weight: float
    share: float


@dataclass(frozen=True)
class Check:
    """What was found before training.

    Args:
        dry_run: shapes, layers of the terms, clones and frozen parameters.
        losses: by label.
        teacher: its scores on a few batches, or None without a teacher.
        inputs: the pixels or tokens each model wants, by source.
        remarks: what deserves a look, a sentence each.
        seconds: forecast of the whole training.
        steps: of the training.
        memory: peak bytes on the device, or None where it does not tell.
    """

    dry_run: DryRun
    losses: Mapping[str, Strength]
    teacher: Mapping[str, float] | None
    inputs: Mapping[str, str]
    remarks: tuple[str, ...]
    seconds: float
    steps: int
    memory: int | None

    def table(self) -> Table:
        """Return one row a loss."""
        rows = [
            (label, fixed(s.value), fixed(s.gradient), f"{s.weight:g}", f"{percent(s.share)}")
            for label, s in self.losses.items()
        ]
        columns = ("loss", "value", "gradient norm", "weight", "share (%)")
        note = "Value and gradient on the student before the weight; share of the weighted gradient norms."
        return Table(columns, rows, title="Losses", note=note)

    def plain(self) -> dict[str, Any]:
        """Return the findings as plain data."""
        return asdict(self)

    @property
    def brief(self) -> list[str]:
        """What is said before a training: how the losses share the gradient, what deserves a look, the forecast."""
        strong = {label: one.share for label, one in self.losses.items() if one.weight}
        parts = ", ".join(f"{label} {percent(share, digits=0)} %" for label, share in strong.items())
        said = [f"the student's gradient comes from {parts}"] if len(strong) > 1 else []
        return [*said, *(f"look: {remark}" for remark in self.remarks), self.forecast]

    @property
    def forecast(self) -> str:
        """How long the training will take, in words."""
        memory = f", {self.memory / 2**30:.1f} GiB on the device" if self.memory else ""
        return f"{self.steps} step{'' if self.steps == 1 else 's'}, {duration(self.seconds)}{memory}"


def check(made: Assembled, *, fitted: bool = True) -> Check:
    """Run two training steps and put everything back as it was.

    Args:
        made: assembled, untrained.
        fitted: a teacher that is to be fitted to the data first was.

    Raises:
        UserError: if a loss with a weight gives the student no gradient on both steps, or is not finite.
    """
    distiller, device = made.distiller, made.runtime.device
    found: list[dict[str, tuple[float, float]]] = []
    seconds = 0.0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with untouched(made):
        loop = made.loop(Log(None, quiet=True))
        loop.begin()
        distiller.train()
        for batch in islice(made.data.train.epoch(0), 2):
            fed = next(iter(distiller.feed(batch.to(device))))
            found.append(distiller.measure(fed, distiller.observe(fed)))
            start = time.perf_counter()
            loop.step([batch])
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
        losses = _strengths(distiller, found, device)
        scores = _probe(made)
    models = dict(distiller.models)
    teacher = distiller.teachers.get("teacher")
    if teacher is not None and teacher.model is not None:
        models["teacher"] = teacher.model
    return Check(
        DryRun.of(distiller),
        losses,
        scores,
        {name: str(model.text or pixels(model.input)) for name, model in models.items()},
        remarks(distiller, made.task, scores, fitted=fitted),
        seconds * made.total_steps * loop.accumulate,
        made.total_steps,
        torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    )


def duration(seconds: float) -> str:
    """Return a forecast in words.

    Example:
        >>> duration(12.3), duration(250.0), duration(9000.0)
        ('a few seconds', 'about 4 minutes', 'about 2.5 hours')
    """
    if seconds < 20:
        return "a few seconds"
    if seconds < 5400:
        minutes = max(1, round(seconds / 60))
        return f"about {minutes} minute{'s' if minutes > 1 else ''}"
    return f"about {seconds / 3600:.1f} hours"


def _strengths(
    distiller: Distiller, found: list[dict[str, tuple[float, float]]], device: torch.device
) -> dict[str, Strength]:
    objective = distiller.objective
    weights = {label: objective.final_weight(label) for label in found[0]}
    steps = ranks.mean(torch.tensor([[*one.values()] for one in found], dtype=torch.float64, device=device))
    for step in steps.tolist():  # the first one that is not finite spoils all that come after it
        for label, (value, gradient) in zip(weights, step, strict=True):
            if weights[label] and not (math.isfinite(value) and math.isfinite(gradient)):
                raise UserError(
                    f"objective.{label}: not finite on the first batches (value {value}, gradient {gradient})"
                )
    means = dict(zip(weights, steps.mean(dim=0).tolist(), strict=True))
    for label, (_, gradient) in means.items():
        if weights[label] and gradient == 0 and label != "task":
            raise UserError(
                f"objective.{label}: its gradient on the student is zero on two steps: it teaches nothing; "
                "name other taps, or leave it out"
            )
    total = sum(weights[label] * gradient for label, (_, gradient) in means.items()) or 1.0
    return {
        label: Strength(value, gradient, weights[label], weights[label] * gradient / total)
        for label, (value, gradient) in means.items()
    }


@torch.no_grad()
def _probe(made: Assembled) -> dict[str, float] | None:
    """Return the scores of a live teacher on a few validation batches, in eval mode."""
    teacher = made.distiller.teachers.get("teacher")
    if teacher is None or teacher.model is None:
        return None
    model = teacher.model

    def answers() -> Iterator[tuple[Any, Batch]]:
        for batch in islice(made.data.validation.epoch(0), PROBED):
            moved = batch.to(made.runtime.device)
            yield answer(made.task, model, moved), moved

    with evaluating(model.module):
        return made.task.score(answers())


def pixels(spec: InputSpec | None) -> str:
    """Return in words what pixels a model wants."""
    if spec is None:
        return "as they come"
    size = "any size" if spec.size is None else f"{spec.size[0]} x {spec.size[1]}"
    mean = ", ".join(f"{m:.3g}" for m in spec.mean) or "none"
    std = ", ".join(f"{s:.3g}" for s in spec.std) or "none"
    return f"{size}, {spec.channels} channels{' (BGR)' if spec.bgr else ''}, mean {mean}, std {std}"


def remarks(
    distiller: Distiller, task: Task, teacher: Mapping[str, float] | None, *, fitted: bool = True
) -> tuple[str, ...]:
    """Return what deserves a look before training."""
    said = [
        f"{label}: {caveat}"
        for label, entry in distiller.objective.entries.items()
        for caveat in entry.term.caveats(distiller.facts)
    ]
    classes = distiller.facts.num_classes
    if not fitted:
        said.append("the teacher is fitted to the data before the training: what it says here means nothing yet")
    elif teacher is not None and classes and teacher.get(task.headline, 1.0) < 1.5 / classes:
        score = percent(teacher[task.headline])
        said.append(f"the teacher scores {score} % on a few batches, little more than chance: is it trained?")
    return tuple(said)
