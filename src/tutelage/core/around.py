# SPDX-License-Identifier: Apache-2.0
"""A term that changes what another one sees."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from tutelage.core.batch import Batch, Facts
from tutelage.core.card import Card
from tutelage.core.signals import Signals
from tutelage.core.term import Draw, Outcome, Reads, Term


class Around(Term):
    """A term around another, whose labels, means, taps, random numbers, memory and parameters are the inner one's.

    So is what it does about ignored pixels.

    Args:
        inner: the other term; None where the term does without, and says for itself what it reads.
    """

    def __init__(self, inner: Term | None) -> None:
        super().__init__()
        self.inner = inner
        self.knows_ignored = inner is not None and inner.knows_ignored

    @property
    def card(self) -> Card | None:
        """This paper's card, with what the inner term says of labels, means and batches."""
        own, inner = super().card, self.inner.card if self.inner is not None else None
        if own is None or inner is None:
            return own
        return replace(
            own,
            labels=inner.labels,
            averages=inner.averages,
            batch=inner.batch,
            zero_at_teacher=inner.zero_at_teacher,
            adversarial=own.adversarial or inner.adversarial,
        )

    @property
    def reads(self) -> Reads:
        """What the inner term reads."""
        return super().reads if self.inner is None else self.inner.reads

    def build(self, student: Signals, teacher: Signals | None, facts: Facts) -> None:
        """Build the inner term."""
        if self.inner is not None:
            self.inner.build(student, teacher, facts)

    def draw(self, student: Signals, teacher: Signals | None, batch: Batch, draw: Draw) -> Any:
        """Return the inner term's random numbers."""
        return None if self.inner is None else self.inner.draw(student, teacher, batch, draw)

    def forward(
        self, student: Signals, teacher: Signals | None, batch: Batch, *draws: Any
    ) -> Tensor | Mapping[str, Tensor] | Outcome:
        """Return what the inner term says."""
        assert self.inner is not None
        found: Tensor | Mapping[str, Tensor] | Outcome = self.inner(student, teacher, batch, *draws)
        return found

    def caveats(self, facts: Facts) -> tuple[str, ...]:
        """Return those of the inner term."""
        return () if self.inner is None else self.inner.caveats(facts)

    def commit(self, kept: Mapping[str, Tensor]) -> None:
        """Let the inner term remember."""
        if self.inner is not None:
            self.inner.commit(kept)

    def param_groups(self) -> list[dict[str, Any]]:
        """Return the parameters of its own, and the inner term's groups."""
        own = [
            parameter
            for name, parameter in self.named_parameters()
            if parameter.requires_grad and not name.startswith("inner.")
        ]
        inner = self.inner.param_groups() if self.inner is not None else []
        return [{"params": own}, *inner] if own else inner
