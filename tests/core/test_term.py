# SPDX-License-Identifier: Apache-2.0
from typing import Any

import pytest
import torch
from torch import nn

from core.networks import Bridged, Distance, small_batch
from tutelage.core import Card, Draw, Facts, Reads, Signals, Tap, Term
from tutelage.core.bridge import bridge, check_grid
from tutelage.core.error import UserError
from tutelage.methods.features.mgd import MGD
from tutelage.methods.logits.kd import CARD, KD


def signals(*shape: int) -> Signals:
    return Signals(None, {"logits": torch.zeros(shape)})


# card and reads


def test_a_term_knows_the_card_of_its_file() -> None:
    assert KD().card is CARD
    assert Distance().card is None


def test_a_term_reads_what_its_card_says_unless_it_has_options() -> None:
    assert KD().reads == Reads((Tap("logits"),), (Tap("logits"),))
    assert MGD(student_tap="layer4", teacher_tap={"where": "neck", "key": 0}).reads == Reads(
        (Tap("layer4"),), (Tap("neck", key=0),)
    )
    assert Term().reads == Reads()


def test_a_term_must_say_what_it_compares() -> None:
    with pytest.raises(NotImplementedError):
        Term()(signals(2, 2), None, small_batch(2))


# parameters


def test_only_trained_parameters_are_handed_out() -> None:
    term = Bridged()
    assert term.param_groups() == []
    term.build(signals(2, 3), signals(2, 5), Facts())
    assert [p.shape for group in term.param_groups() for p in group["params"]] == [(5, 3), (5,)]
    assert isinstance(term.bridge, nn.Linear)
    term.bridge.bias.requires_grad_(False)
    assert [p.shape for group in term.param_groups() for p in group["params"]] == [(5, 3)]


# draws


def test_a_draw_belongs_to_a_sample_not_to_a_batch() -> None:
    draw = Draw(0, 5, "far")
    whole = draw.uniform(torch.arange(6), (2, 3))
    assert whole.shape == (6, 2, 3)
    assert torch.equal(draw.uniform(torch.tensor([4, 1]), (2, 3)), whole[[4, 1]])


@pytest.mark.parametrize("other", [Draw(1, 5, "far"), Draw(0, 6, "far"), Draw(0, 5, "near")])
def test_a_draw_differs_by_seed_step_and_label(other: Draw) -> None:
    index = torch.arange(8)
    assert not torch.equal(Draw(0, 5, "far").uniform(index, ()), other.uniform(index, ()))


def test_a_term_draws_several_things_apart() -> None:
    index, draw = torch.arange(8), Draw(0, 0, "far")
    assert not torch.equal(draw.uniform(index, ()), draw.uniform(index, (), salt=1))
    assert KD().draw(signals(2, 2), signals(2, 2), small_batch(2), draw) is None


# bridges


@pytest.mark.parametrize(
    ("student", "teacher", "kind"),
    [
        ((2, 3, 4, 4), (2, 5, 4, 4), nn.Conv2d),
        ((2, 7, 3), (2, 7, 5), nn.Linear),
        ((2, 3), (2, 5), nn.Linear),
        ((2, 5), (2, 5), nn.Identity),
    ],
)
def test_a_bridge_goes_from_width_to_width(student: Any, teacher: Any, kind: type[nn.Module]) -> None:
    one, other = torch.rand(student), torch.rand(teacher)
    layer = bridge(one, other)
    assert isinstance(layer, kind)
    assert layer(one).shape == other.shape


def test_a_bridge_between_equal_widths_is_made_on_demand() -> None:
    made = bridge(torch.zeros(2, 5), torch.zeros(2, 5), always=True, bias=False)
    assert isinstance(made, nn.Linear)
    assert made.bias is None


def test_a_bridge_needs_tensors_of_one_kind() -> None:
    with pytest.raises(UserError) as error:
        bridge(torch.zeros(2, 3, 4, 4), torch.zeros(2, 7, 5))
    assert str(error.value) == "no bridge from [2, 3, 4, 4] to [2, 7, 5]: name taps of one kind"
    check_grid(torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 4, 4), "mgd")
    with pytest.raises(UserError) as error:
        check_grid(torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 8, 4), "mgd")
    assert str(error.value) == (
        "mgd compares maps of one grid: the student's is (4, 4), the teacher's (8, 4); tap layers of equal stride"
    )


def test_a_card_says_how_it_is_averaged() -> None:
    assert isinstance(KD().card, Card)
    assert KD().card.averages == "samples"  # type: ignore[union-attr]
