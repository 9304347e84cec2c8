# SPDX-License-Identifier: Apache-2.0
"""The weighted sum of the task's own loss and the terms."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.core.batch import Batch, Facts
from tutelage.core.card import Averages
from tutelage.core.error import UserError
from tutelage.core.ignored import blanked
from tutelage.core.schedule import Schedule
from tutelage.core.signals import Signals
from tutelage.core.tap import Tap, expand
from tutelage.core.task import Task
from tutelage.core.term import Draw, Outcome, Term


@dataclass(frozen=True)
class Entry:
    """One term in an objective.

    Args:
        term: the comparison.
        weight: its coefficient: a number, a `Schedule`, or a mapping as in a recipe.
        student: the source in the student's place: a student, or `name@view`.
        teacher: the source in the teacher's place: a teacher, a student, or `name@view`.
        live: let gradients reach a student that stands in the teacher's place.
    """

    term: Term
    weight: Any = 1.0
    student: str = "student"
    teacher: str = "teacher"
    live: bool = False


@dataclass
class Losses:
    """What one forward of the Distiller gave.

    Args:
        total: 0-d, to call `backward()` on.
        parts: detached value of the task's loss and of each term before its weight, by label.
        kept: what terms want to remember once the optimizer has stepped, by label.
    """

    total: Tensor
    parts: dict[str, Tensor]
    kept: dict[str, Mapping[str, Tensor]] = field(default_factory=dict)


class Objective(nn.Module):
    """Labelled terms with weights.

    Args:
        entries: terms by label: a `Term`, a weighted term `0.9 * KD()`, or an `Entry`.
        task: weight of the task's own loss.
        labelled_entries: the same, as keywords.

    Raises:
        UserError: on a label that cannot be used, something that is no term, or one term under two labels.

    Example:
        >>> from tutelage.methods.logits.kd import KD
        >>> Objective(task=0.1, kd=0.9 * KD(temperature=4.0)).labels
        ('task', 'kd')
    """

    def __init__(
        self,
        entries: Mapping[str, Entry | Term] | None = None,
        *,
        task: Any = 1.0,
        **labelled_entries: Entry | Term,
    ) -> None:
        super().__init__()
        self.task_weight = Schedule.parse(task)
        self.entries: dict[str, Entry] = {}
        self.terms = nn.ModuleDict()
        for label, given in {**(entries or {}), **labelled_entries}.items():
            entry = Entry(given) if isinstance(given, Term) else given
            if not isinstance(entry, Entry):
                raise UserError(f"objective.{label}: expected a term or `weight * term`, not {given!r}")
            if label == "task" or "." in label or hasattr(self.terms, label):
                raise UserError(f"objective.{label}: this label is taken or not a plain word; choose another")
            if any(entry.term is other.term for other in self.entries.values()):
                raise UserError(f"objective.{label}: the same term stands under another label; make a second")
            self.entries[label] = replace(entry, weight=Schedule.parse(entry.weight))
            self.terms[label] = entry.term
        self.facts = Facts()

    @property
    def labels(self) -> tuple[str, ...]:
        """`task` and the labels of the terms."""
        return ("task", *self.entries)

    def averages(self, task: Task) -> tuple[Averages, ...]:
        """Return the denominators the task and the terms use, each once."""
        used = [
            task.averages,
            *(e.term.card.averages if e.term.card else "samples" for e in self.entries.values()),
        ]
        return tuple(dict.fromkeys(used))

    def weight(self, label: str, step: int) -> float:
        """Return a coefficient at an optimizer step."""
        schedule: Schedule = self.task_weight if label == "task" else self.entries[label].weight
        return schedule.at(step, steps_per_epoch=self.facts.steps_per_epoch, total_steps=self.facts.total_steps)

    def final_weight(self, label: str) -> float:
        """Return the coefficient a schedule ends with, or its largest if that is 0."""
        schedule: Schedule = self.task_weight if label == "task" else self.entries[label].weight
        return schedule.end or schedule.start

    def pair(
        self, label: str, sources: Mapping[str, Signals], students: Collection[str]
    ) -> tuple[Signals, Signals | None]:
        """Return what stands in the student's and in the teacher's place of a term.

        A student in the teacher's place is cut from the graph unless the entry is live; a term that reads no
        teacher gets None.
        """
        entry = self.entries[label]
        wanted = entry.term.reads
        student = _with_views(sources, entry.student, wanted.student)
        if not wanted.taught:
            return student, None
        teacher = _with_views(sources, entry.teacher, wanted.teacher)
        learns = entry.teacher.partition("@")[0] in students and not entry.live
        return student, teacher.detach() if learns else teacher

    def compare(
        self, label: str, student: Signals, teacher: Signals | None, batch: Batch, step: int
    ) -> tuple[dict[str, Tensor], Mapping[str, Tensor]]:
        """Return one term's parts, each a mean over its own denominator, and what it keeps."""
        term = self.entries[label].term
        if not term.knows_ignored:
            student, teacher = blanked(student, batch), teacher and blanked(teacher, batch)
        draws = term.draw(student, teacher, batch, Draw(self.facts.seed, step, label))
        given = self.terms[label](student, teacher, batch, *(() if draws is None else (draws,)))
        if isinstance(given, Tensor):
            return {label: given}, {}
        outcome = Outcome(given) if isinstance(given, Mapping) else given
        if not (isinstance(outcome, Outcome) and outcome.parts):
            raise UserError(f"term {label!r} returned {given!r}; a term returns one number, or parts by name")
        return {f"{label}.{part}": value for part, value in outcome.parts.items()}, outcome.kept

    def forward(
        self, sources: Mapping[str, Signals], students: Sequence[str], batch: Batch, task: Task, step: int
    ) -> Losses:
        """Return the weighted sum over all sources.

        Args:
            sources: signals of every student, view and teacher by name.
            students: names of the students that learn the task.
            batch: what they saw.
            task: gives the task's own loss.
            step: 0-based optimizer step.

        Raises:
            UserError: if a term returns something else than a 0-d tensor.
        """
        total: Tensor | None = None
        values: dict[str, Tensor] = {}
        kept: dict[str, Mapping[str, Tensor]] = {}
        pieces: list[tuple[str, Averages, dict[str, Tensor]]] = []
        for name in students:
            label = "task" if len(students) == 1 else f"task.{name}"
            loss = task.loss(sources[name].output, batch)
            named = {label: loss} if isinstance(loss, Tensor) else {f"{label}.{k}": v for k, v in loss.items()}
            pieces.append(("task", task.averages, named))
        for label, entry in self.entries.items():
            parts, memory = self.compare(label, *self.pair(label, sources, students), batch, step)
            card = entry.term.card
            pieces.append((label, card.averages if card else "samples", parts))
            if memory:
                kept[label] = memory
        for label, averages, parts in pieces:
            weight = self._coefficient(label, step, batch, averages, next(iter(parts.values())))
            for name, value in parts.items():
                if value.ndim:
                    raise UserError(f"term {name!r} returned shape {list(value.shape)}; a term returns one number")
                values[name] = value.detach()
                total = weight * value if total is None else total + weight * value
        assert total is not None
        return Losses(total, values, kept)

    def _coefficient(self, label: str, step: int, batch: Batch, averages: Averages, like: Tensor) -> float | Tensor:
        """Weight times local count over the mean count of the step."""
        weight = self.weight(label, step)
        if averages in batch.mean_count:
            scale = batch.count(averages) / batch.mean_count[averages].clamp(min=1e-12)
            return weight * scale.to(like)
        if not (self.task_weight if label == "task" else self.entries[label].weight).constant:
            return torch.full((), weight, device=like.device, dtype=like.dtype)
        return weight


def _with_views(sources: Mapping[str, Signals], source: str, taps: Sequence[Tap]) -> Signals:
    """Return a source's signals together with what a term reads of its other views."""
    base, name = sources[source], source.partition("@")[0]
    others = {
        f"{role}@{tap.view}": seen[role]
        for tap in taps
        if tap.view
        for seen in (sources[f"{name}@{tap.view}"],)
        for role in expand(tap.plain.name, seen.taps)
    }
    return replace(base, taps={**base.taps, **others}) if others else base
