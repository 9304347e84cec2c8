# SPDX-License-Identifier: Apache-2.0
"""A change of the student's structure: made before training, settled after it, repeated when it is loaded."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any, Self

from tutelage.core.batch import Batch, Facts
from tutelage.core.error import UserError
from tutelage.core.model import Model
from tutelage.core.task import Task


class Rebuild(ABC):
    """Turns the user's model into the one that learns, and that into the one that is exported.

    A method's file holds one beside its term when the paper changes the student: a projector with the
    teacher's classifier, a distillation token, another head. What `end` returns is the student: exported,
    counted, evaluated. The weights of what was built are saved with the student's own; `shape` holds what is
    needed besides to build it again without the teacher.
    """

    @abstractmethod
    def begin(self, student: Model, teacher: Model | None, task: Task, facts: Facts, sample: Batch) -> Model:
        """Return the model that learns. The teacher is there to copy from; nothing of it may be shared."""

    def end(self, model: Model) -> Model:
        """Return the student after training; the model itself unless something is taken off or merged."""
        return model

    @abstractmethod
    def shape(self) -> dict[str, Any]:
        """Return, as plain data, what `restore` needs: sizes and names, no weights."""

    @classmethod
    @abstractmethod
    def restore(cls, student: Model, shape: Mapping[str, Any]) -> Model:
        """Return what `end` returned, from a freshly built student and a shape; weights are loaded later."""

    def report(self) -> str:
        """Return in a line what was changed."""
        return type(self).__name__

    def record(self) -> dict[str, Any]:
        """Return how to repeat the change, as `student.json` holds it."""
        return {"rebuild": f"{type(self).__module__}:{type(self).__name__}", "shape": self.shape()}

    @classmethod
    def named(cls, path: str) -> type[Self]:
        """Return a Rebuild by `package.module:Class`.

        Raises:
            UserError: if the path leads to something else.
        """
        module, _, name = path.partition(":")
        try:
            found = getattr(import_module(module), name, None)
        except ImportError as error:
            raise UserError(f"the student was rebuilt by {path!r}, which cannot be imported ({error})") from error
        if not (isinstance(found, type) and issubclass(found, cls)):
            raise UserError(f"{path!r} does not rebuild students")
        return found


def repeated(student: Model, records: Iterable[Mapping[str, Any]]) -> Model:
    """Return a freshly built student with its recorded changes made again, in order."""
    for record in records:
        student = Rebuild.named(str(record["rebuild"])).restore(student, record["shape"])
    return student
