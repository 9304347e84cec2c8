# SPDX-License-Identifier: Apache-2.0
"""The last look at a trained student: beside its teacher, and class by class."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tutelage.core import Batch, Model
from tutelage.core.task import answer as answered
from tutelage.report.measure import evaluating
from tutelage.run.assemble import Assembled
from tutelage.tasks.classification import Classification, agreement, by_class


@dataclass(frozen=True)
class Closing:
    """What the scores of the student alone do not show.

    Args:
        teacher: its scores on the same split, or None without a teacher that answers live.
        agreement: share of the split for which student and teacher name the same class, or None.
        classes: number of samples named rightly and number of samples, by class; empty where the task has none.
        peers: scores on the same split of every other student, by name.
    """

    teacher: Mapping[str, float] | None = None
    agreement: float | None = None
    classes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    peers: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@torch.no_grad()
def closing(made: Assembled) -> Closing:
    """Return the last look at the student of a run, on its validation split."""
    task, distiller = made.task, made.distiller
    named: dict[str, list[Tensor]] = {"student": [], "teacher": []}
    targets: list[Tensor] = []

    def answers(source: str, answer: Callable[[Batch], Any]) -> Iterator[tuple[Any, Batch]]:
        for batch in made.data.validation.epoch(0):
            moved = batch.to(made.runtime.device)
            output = answer(moved)
            if isinstance(task, Classification) and source in named:
                named[source].append(task.logits(output).argmax(dim=1))
                targets.append(moved.target)
            yield output, moved

    def scored(source: str, model: Model) -> Mapping[str, float]:
        with evaluating(model.module):
            return task.score(answers(source, lambda batch: answered(task, model, batch)))

    peers = {name: scored(name, model) for name, model in distiller.models.items() if name != "student"}
    scores = None
    teacher = distiller.teachers.get("teacher")
    if teacher is not None and teacher.model is not None:
        scores = scored("teacher", teacher.model)
    if not isinstance(task, Classification):
        return Closing(scores, peers=peers)
    targets.clear()
    with evaluating(distiller.student):
        for _ in answers("student", distiller.answer):
            pass
    student = torch.cat(named["student"])
    right, there = (part.tolist() for part in by_class(student, torch.cat(targets), task.num_classes))
    return Closing(
        scores,
        agreement(student, torch.cat(named["teacher"])) if named["teacher"] else None,
        dict(zip(made.data.class_names, zip(right, there, strict=True), strict=True)),
        peers,
    )
