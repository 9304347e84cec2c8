# SPDX-License-Identifier: Apache-2.0
"""One differentiable comparison of student and teacher, with its life cycle."""

import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tutelage.core.batch import Batch, Facts
from tutelage.core.card import Card
from tutelage.core.signals import Signals
from tutelage.core.tap import Tap
from tutelage.functional.noise import mix, uniform

if TYPE_CHECKING:
    from tutelage.core.objective import Entry

NONE: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Reads:
    """What a term reads: taps of the student, taps of the teacher, and modules the teacher lends.

    Args:
        student: of the student.
        teacher: of the teacher.
        borrows: modules of a teacher that stands still.
        calls: modules that are only called: a student in the teacher's place lends them too, as they stand.
    """

    student: tuple[Tap, ...] = ()
    teacher: tuple[Tap, ...] = ()
    borrows: tuple[str, ...] = ()
    calls: tuple[str, ...] = ()

    @property
    def taught(self) -> bool:
        """Whether anything comes from who stands in the teacher's place."""
        return bool(self.teacher or self.borrows or self.calls)


@dataclass(frozen=True)
class Outcome:
    """What a term returns when it has more to say than one number.

    Args:
        parts: named 0-d tensors; their sum is the term.
        kept: detached tensors to remember after the optimizer step, each with a leading sample dimension:
            the same names at every forward (ranks gather them together), without rows if there is nothing.
    """

    parts: Mapping[str, Tensor]
    kept: Mapping[str, Tensor] = field(default_factory=lambda: NONE)


@dataclass(frozen=True)
class Draw:
    """The source of a term's random numbers: a function of seed, step and the term's label."""

    seed: int
    step: int
    label: str

    def uniform(self, index: Tensor, shape: Sequence[int], salt: int = 0) -> Tensor:
        """Return `[B, *shape]` uniform numbers in [0, 1), each row a function of its sample id."""
        return uniform(mix(self.seed, self.step, zlib.crc32(self.label.encode()), salt), index, shape)


class Term(nn.Module):
    """A comparison. A method's file holds one final subclass; its constructor is its only configuration.

    The life of a term: constructed from hyper-parameters; built once, from the signals of a dry run, when it
    creates all its layers and buffers; called at every step; told to `commit` after the optimizer's.
    """

    #: Whether the term itself leaves out, or learns from, places of ignored pixels. Any other is given zeros there.
    knows_ignored = False

    @property
    def card(self) -> Card | None:
        """The card of the file the class stands in; a term of one's own may do without."""
        return getattr(sys.modules[type(self).__module__], "CARD", None)

    @property
    def reads(self) -> Reads:
        """What the term reads; the card's roles unless a subclass has options for its taps."""
        roles = self.card.reads if self.card else NONE
        student, teacher = (tuple(Tap.parse(role) for role in roles.get(side, ())) for side in ("student", "teacher"))
        return Reads(student, teacher, tuple(roles.get("borrows", ())))

    def build(self, student: Signals, teacher: Signals | None, facts: Facts) -> None:
        """Create all layers and buffers, from the shapes of one dry run."""

    def draw(self, student: Signals, teacher: Signals | None, batch: Batch, draw: Draw) -> Any:
        """Return the random numbers of one forward, or None if the term uses none.

        What is returned is passed to `forward` as `draws`: tests and compiled frames give it themselves.
        """
        return None

    def forward(
        self, student: Signals, teacher: Signals | None, batch: Batch, *draws: Any
    ) -> Tensor | Mapping[str, Tensor] | Outcome:
        """Return the comparison: a 0-d tensor, named parts that sum to it, or an `Outcome`.

        It changes nothing but the batch-norm statistics of the term's own layers.
        """
        raise NotImplementedError

    def caveats(self, facts: Facts) -> tuple[str, ...]:
        """Return where the method loses its meaning under these facts, a sentence each; for `check`."""
        return ()

    def commit(self, kept: Mapping[str, Tensor]) -> None:
        """Remember what `forward` kept, joined over micro-batches and gathered over ranks."""

    def param_groups(self) -> list[dict[str, Any]]:
        """Return the term's trainable parameters with any settings of their own (`lr`, `maximize`, ...)."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        return [{"params": parameters}] if parameters else []

    def __rmul__(self, weight: float) -> "Entry":
        """Return the term with a weight: `0.9 * KD()`."""
        from tutelage.core.objective import Entry

        return Entry(self, weight)

    __mul__ = __rmul__
