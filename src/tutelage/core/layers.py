# SPDX-License-Identifier: Apache-2.0
"""Several layers of two models, compared pair by pair."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tutelage.core.error import UserError
from tutelage.core.signals import Signals
from tutelage.core.tap import Tap, expand

Places = Sequence[str | Mapping[str, Any] | Tap]


@dataclass(frozen=True)
class Layers:
    """Taps of both models, from shallow to deep.

    A pattern such as `stages[*]` stands for as many layers as the model has: the two models may then differ
    in their number, and the deepest are compared with the deepest. Taps that are written out are compared in
    their order.

    Args:
        student: of the student.
        teacher: of the teacher.
    """

    student: tuple[Tap, ...]
    teacher: tuple[Tap, ...]

    @classmethod
    def parse(cls, student_taps: Places, teacher_taps: Places) -> "Layers":
        """Read the options of a term.

        Raises:
            UserError: if one is empty or a single word, or if both are written out and differ in number.
        """
        sides = []
        for option, taps in (("student_taps", student_taps), ("teacher_taps", teacher_taps)):
            if isinstance(taps, (str, Mapping, Tap)) or not taps:
                raise UserError(f"{option}: expected a list of roles or module paths, not {taps!r}")
            sides.append(tuple(Tap.parse(tap) for tap in taps))
        layers = cls(*sides)
        if not layers.open and len(layers.student) != len(layers.teacher):
            raise UserError(
                f"student_taps names {len(layers.student)} layers and teacher_taps {len(layers.teacher)}; "
                "they are compared pair by pair"
            )
        return layers

    @property
    def open(self) -> bool:
        """Whether the number of layers of a side depends on the model."""
        return any("[*]" in tap.where for tap in (*self.student, *self.teacher))

    def pairs(self, student: Signals, teacher: Signals) -> tuple[tuple[str, str], ...]:
        """Return the names of the signals to compare, from shallow to deep."""
        return tuple(zip(*self.aligned(student, teacher), strict=True))

    def aligned(self, student: Signals, teacher: Signals) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the names of each side's signals, equally many, from shallow to deep."""
        one, other = (
            tuple(name for tap in taps for name in expand(tap.name, signals.taps))
            for taps, signals in ((self.student, student), (self.teacher, teacher))
        )
        depth = min(len(one), len(other))
        return one[len(one) - depth :], other[len(other) - depth :]
