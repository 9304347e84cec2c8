# SPDX-License-Identifier: Apache-2.0
"""Objects in the place of what a recipe names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tutelage.core import Model, Teacher
from tutelage.data.load import Splits
from tutelage.data.samples import Samples
from tutelage.models.adapt import adapt
from tutelage.train.lockstep import Batches


@dataclass(frozen=True)
class Given:
    """What the caller of a run holds in hand; None leaves it to the recipe.

    Args:
        student: a module or `Model`; trained in place.
        teacher: a module, `Model` or `Teacher`, trained already.
        data: sets by split.
        previous: the student of the stage before.
        splits: the recipe's data, loaded once for several runs.
        batches: what is trained on, of that data: read once for several runs.
    """

    student: nn.Module | Model | None = None
    teacher: nn.Module | Model | Teacher | None = None
    data: Mapping[str, Samples] | None = None
    previous: Model | None = None
    splits: Splits | None = None
    batches: Batches | None = None

    @property
    def sets(self) -> dict[str, Samples] | None:
        """The sets, as `tutelage.data.load.load` takes them."""
        return None if self.data is None else dict(self.data)


NOTHING = Given()


def model_of(given: nn.Module | Model, pixels: Tensor, class_names: Sequence[str]) -> Model:
    """Return a module with its roles, looked for in one forward; a `Model` as it is.

    Args:
        given: the object.
        pixels: images of the data.
        class_names: of the data.
    """
    if isinstance(given, Model):
        return given
    parameter = next(given.parameters(), pixels)
    model = adapt(given, pixels.to(parameter.device), class_names=class_names)
    model.source = {"model": word(given), "class_names": list(class_names), "image_size": list(pixels.shape[-2:])}
    return model


def word(given: Any) -> str:
    """Return what a recipe calls an object: nothing can be loaded by it."""
    inner = given.module if isinstance(given, Model) else given
    return f"object:{type(inner).__name__}"
