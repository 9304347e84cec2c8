# SPDX-License-Identifier: Apache-2.0
from typing import Any

import pytest
import torch
from torch import nn

from tutelage.core.error import UserError
from tutelage.train.optimizer import build


def groups() -> list[dict[str, Any]]:
    return [{"params": [nn.Parameter(torch.ones(2, 2))]}, {"params": [nn.Parameter(torch.ones(2))], "lr": 0.5}]


@pytest.mark.parametrize(
    ("name", "kind"), [("sgd", torch.optim.SGD), ("AdamW", torch.optim.AdamW), ("rmsprop", torch.optim.RMSprop)]
)
def test_names_of_torch(name: str, kind: type) -> None:
    assert type(build(name, groups(), lr=0.1)) is kind


def test_names_of_timm_step() -> None:
    made = build("lion", groups(), lr=0.1, weight_decay=0.0)
    for group in made.param_groups:
        group["params"][0].grad = torch.ones_like(group["params"][0])
    made.step()
    assert type(made).__name__ == "Lion"
    assert torch.equal(made.param_groups[0]["params"][0], torch.full((2, 2), 0.9))


def test_options_and_rates_of_groups_reach_the_optimizer() -> None:
    made = build("sgd", groups(), lr=0.1, momentum=0.9)
    assert [group["lr"] for group in made.param_groups] == [0.1, 0.5]
    assert made.param_groups[0]["momentum"] == 0.9


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("sdg", {}, "optimizer.name: unknown optimizer 'sdg'; did you mean sgd?"),
        ("sgd", {"momentun": 0.9}, "optimizer.momentun: unknown option of sgd; did you mean momentum?"),
        ("adamw", {"betas": [0.9]}, "optimizer: adamw refuses these options"),
        ("adamw", {"betas": "high"}, "optimizer: adamw refuses these options"),
        ("sgd", {"nesterov": True}, "Nesterov momentum requires a momentum"),
    ],
)
def test_what_cannot_be_built_is_named(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        build(name, groups(), lr=0.1, **options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
