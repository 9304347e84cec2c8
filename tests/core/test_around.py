# SPDX-License-Identifier: Apache-2.0
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from core.networks import small_batch
from tutelage.core import Batch, Card, Draw, Facts, Outcome, Reads, Signals, Tap, Term
from tutelage.core.around import Around

CARD = Card(
    name="Halved",
    title="-",
    authors="-",
    year=2024,
    venue="-",
    paper="-",
    claims="-",
    reads={"student": ("logits",)},
    adversarial=True,
)


class Counted(Term):
    """A term with a parameter, a draw, a caveat and a memory."""

    knows_ignored = True
    remembered: Mapping[str, Tensor] | None = None

    @property
    def card(self) -> Card:
        return Card(
            **{**vars(CARD), "labels": ("hard",), "averages": "labelled", "batch": "coupled", "adversarial": False}
        )

    @property
    def reads(self) -> Reads:
        return Reads((Tap("map"),), (Tap("map"),))

    def build(self, student: Signals, teacher: Signals | None, facts: Facts) -> None:
        self.scale = nn.Parameter(torch.ones(1))

    def draw(self, student: Signals, teacher: Signals | None, batch: Batch, draw: Draw) -> int:
        return draw.step

    def forward(self, student: Signals, teacher: Signals | None, batch: Batch, *draws: Any) -> Outcome:
        return Outcome({"part": self.scale[0] * draws[0]}, {"index": batch.index})

    def caveats(self, facts: Facts) -> tuple[str, ...]:
        return ("odd",)

    def commit(self, kept: Mapping[str, Tensor]) -> None:
        self.remembered = kept


class Plain(Around):
    """A wrapper with a parameter of its own, and one that is frozen."""

    def __init__(self, inner: Term | None) -> None:
        super().__init__(inner)
        self.own, self.frozen = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2), requires_grad=False)


BLANK = Signals(None, {})


def test_what_a_term_around_another_says_is_the_inner_ones() -> None:
    inner = Counted()
    term = Plain(inner)
    term.build(BLANK, None, Facts())
    batch = small_batch()
    drawn = term.draw(BLANK, None, batch, Draw(0, 7, "label"))
    found = term(BLANK, None, batch, drawn)
    assert isinstance(found, Outcome)
    assert found.parts["part"].item() == 7
    term.commit(found.kept)
    assert inner.remembered is found.kept
    assert term.reads == inner.reads
    assert term.caveats(Facts()) == ("odd",)
    assert term.knows_ignored
    assert [group["params"] for group in term.param_groups()] == [[term.own], [inner.scale]]


def test_its_card_is_its_own_but_for_labels_means_and_batches() -> None:
    card = Plain(Counted()).card
    assert card is not None
    assert (card.name, card.labels, card.averages, card.batch) == ("Halved", ("hard",), "labelled", "coupled")
    assert card.adversarial  # its own, though the inner term is not


def test_without_another_it_speaks_for_itself() -> None:
    term = Plain(None)
    assert term.card == CARD
    assert [tap.where for tap in term.reads.student] == ["logits"]
    assert term.draw(BLANK, None, small_batch(), Draw(0, 0, "label")) is None
    assert term.caveats(Facts()) == ()
    assert not term.knows_ignored
    term.commit({})
    assert [group["params"] for group in term.param_groups()] == [[term.own]]
