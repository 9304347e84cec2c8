# SPDX-License-Identifier: Apache-2.0
"""What a task must say: how a model is called, what its own loss is, how it is scored."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from tutelage.core.batch import Batch
from tutelage.core.card import Averages
from tutelage.core.model import Model

#: Tasks on images with geometry; `data` and `models` make what belongs to each in a file of its name.
DENSE = ("detection", "segmentation", "pose")


@runtime_checkable
class Task(Protocol):
    """One kind of problem. Implementations live in `tasks/`."""

    #: stem of the task's file
    name: str
    #: what the task's loss averages over
    averages: Averages
    #: the score that says which of two models is better (higher is better)
    headline: str
    #: the roles a model of this task can offer, without indices
    provides: tuple[str, ...]

    def call(self, model: Model, batch: Batch) -> Any:
        """Return the model's output for a batch."""

    def logits(self, output: Any) -> Tensor | None:
        """Return the raw scores in an output, or None where the task has none."""

    def loss(self, output: Any, batch: Batch) -> Tensor | Mapping[str, Tensor]:
        """Return the task's own loss, a mean over `averages`, or named parts that sum to it."""

    def score(self, answers: Iterable[tuple[Any, Batch]]) -> dict[str, float]:
        """Return scores over a data set, from outputs and batches."""


def answer(task: Task, model: Model, batch: Batch) -> Any:
    """Return a model's output as it is scored and shown: from the task's own `answer`, where it has one.

    Such a task may see an image in windows or several times, which a step of training does not.
    """
    own = getattr(task, "answer", None)
    return own(model, batch) if callable(own) else task.call(model, batch)
