# SPDX-License-Identifier: Apache-2.0
import torch
from torch import Tensor, nn

from tutelage.core import Batch, Objective, Signals, Term
from tutelage.core.ignored import blanked, known

TARGET = torch.tensor([[[0, -1], [2, 1]], [[-1, -1], [-1, -1]]])


def batch() -> Batch:
    return Batch.of(torch.zeros(2, 3, 2, 2), TARGET)


class Sum(Term):
    def forward(self, student: Signals, teacher: Signals | None, batch: Batch) -> Tensor:
        return student["map"].sum()


class OfAll(Sum):
    knows_ignored = True


def test_maps_and_tokens_share_their_places() -> None:
    places = known(batch(), torch.zeros(2, 5, 4, 4))
    assert places is not None
    assert places[0].tolist() == [[True, True, False, False]] * 2 + [[True] * 4] * 2
    assert places[1].all()
    tokens = known(batch(), torch.zeros(2, 16, 5))
    assert tokens is not None
    assert torch.equal(tokens, places.flatten(1))
    wide = known(batch(), torch.zeros(2, 8, 5), (2, 4))
    assert wide is not None
    assert wide[0].tolist() == [True, True, False, False] + [True] * 4
    assert known(batch(), torch.zeros(2, 7, 5)) is None  # fills no grid
    assert known(Batch.of(torch.zeros(2, 3), torch.tensor([0, 1])), torch.zeros(2, 5, 4, 4)) is None


def test_what_is_no_map_stays_as_it_is() -> None:
    taps = {
        "map": torch.ones(2, 1, 2, 2),
        "tokens": torch.ones(2, 4, 3),
        "pooled": torch.ones(2, 3),
        "classifier.weight": nn.Parameter(torch.ones(2, 1, 1, 1)),
        "other": torch.ones(3, 1, 2, 2),
    }
    seen = blanked(Signals(None, taps), batch())
    assert seen["map"][0, 0].tolist() == [[1, 0], [1, 1]]
    assert seen["map"][1].all()
    assert seen["tokens"][0].tolist() == [[1] * 3, [0] * 3, [1] * 3, [1] * 3]
    assert all(seen[name] is taps[name] for name in ("pooled", "classifier.weight", "other"))


def test_a_term_is_given_zeros_unless_it_knows_what_is_ignored() -> None:
    objective = Objective({"blank": Sum(), "whole": OfAll()})
    signals = Signals(None, {"map": torch.ones(2, 1, 2, 2)})
    found = [objective.compare(label, signals, None, batch(), 0)[0][label] for label in ("blank", "whole")]
    assert [value.item() for value in found] == [7, 8]
