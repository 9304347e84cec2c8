# SPDX-License-Identifier: Apache-2.0
"""What a method makes of a batch before anyone sees it: generation, pseudo-labels, mixing, replay."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

from torch import Tensor

from tutelage.core.batch import Batch
from tutelage.core.model import Model
from tutelage.core.teacher import Teacher
from tutelage.core.term import Draw


class Feeder(ABC):
    """Turns one batch of the data into the batches of optimizer steps.

    A method's file holds one beside its term when the paper trains on what the models make themselves. Random
    choices are drawn from `draw`, a function of seed and step. What it remembers lies in `state`, which the
    checkpoint holds.
    """

    @abstractmethod
    def feed(
        self, batch: Batch, students: Mapping[str, Model], teachers: Mapping[str, Teacher], draw: Draw
    ) -> Iterator[Batch]:
        """Yield one or several batches, without gradient."""

    def state(self) -> dict[str, Tensor]:
        """Return what must be remembered over a resumed run."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take up the state of a checkpoint."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])
