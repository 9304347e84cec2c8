# SPDX-License-Identifier: Apache-2.0
import copy
import re

import pytest
import torch
from torch import nn

from tutelage.core.error import UserError
from tutelage.models.inherit import freeze, inherit


def network(width: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width)), nn.Conv2d(width, 2, 1))


def same(first: nn.Module, second: nn.Module, name: str) -> bool:
    return torch.equal(first.state_dict()[name], second.state_dict()[name])


def test_parts_are_copied_by_name_and_shape_with_their_buffers() -> None:
    student, teacher = network(), network()
    teacher.state_dict()["0.1.running_mean"] += 1
    before = copy.deepcopy(student)
    said = inherit(student, {"0": "teacher.0"}, {"teacher": teacher})
    assert said == ["0: 7 of 7 tensors from teacher.0"]
    assert same(student, teacher, "0.0.weight")
    assert same(student, teacher, "0.1.running_mean")
    assert same(student, before, "1.weight")


def test_what_does_not_fit_stays_and_is_named() -> None:
    student, wide = network(), network(8)
    assert inherit(student, {"": "teacher"}, {"teacher": wide}) == [
        "all: 2 of 9 tensors from teacher; not 0.0.weight, 0.0.bias, 0.1.weight, 4 more"
    ]
    assert same(student, wide, "1.bias")


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ({"0": "teachr.0"}, "inherit.0: no source 'teachr'; did you mean teacher?"),
        ({"9": "teacher.0"}, "inherit.9: Sequential has no module '9'"),
        ({"0": "teacher.0.7"}, "inherit.0: teacher.0.7: Sequential has no module '0.7'"),
        ({"1": "teacher.0.1"}, "inherit.1: nothing of teacher.0.1 fits"),
    ],
)
def test_mistakes_are_named(places: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        inherit(network(), places, {"teacher": network()})


def test_frozen_parts_do_not_train_and_only_they() -> None:
    student = network()
    student.get_parameter("0.0.bias").requires_grad_(False)
    changed = freeze(student, ("0",))
    assert len(changed) == 3
    assert not any(p.requires_grad for p in student[0].parameters())
    assert all(p.requires_grad for p in student[1].parameters())
    with pytest.raises(UserError, match=re.escape("freeze: neck: Sequential has no module 'neck'")):
        freeze(student, ("neck",))
