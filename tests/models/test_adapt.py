# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
from torch import Tensor, nn

from models.readings import noise
from tutelage.core import InputSpec, Tap
from tutelage.core.error import UserError
from tutelage.models.adapt import adapt, blank


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))


def test_a_bare_module_gets_roles_and_is_left_as_it_was() -> None:
    module = network()
    before = copy.deepcopy(module.state_dict())
    model = adapt(module, noise(8), class_names=["a", "b"], input=InputSpec(channels=3))
    assert model.module is module
    assert module.training
    assert all(torch.equal(before[key], tensor) for key, tensor in module.state_dict().items())
    assert model.roles["map"].where == "2"
    assert model.class_names == ("a", "b")
    assert model.input == InputSpec(channels=3)


def test_without_images_only_what_is_said_is_known() -> None:
    model = adapt(network(), roles={"map": "2", "pooled": {"where": "4", "side": "input"}, "classifier": Tap("4")})
    assert {role: tap.name for role, tap in model.roles.items()} == {"map": "2", "pooled": "4:input"}
    assert model.modules == {"classifier": "4"}


def test_what_is_said_wins_over_what_is_found() -> None:
    model = adapt(network(), noise(8), roles={"map": "0"})
    assert model.roles["map"].where == "0"
    assert model.roles["pooled"].name == "4:input"


def test_a_model_with_a_call_of_its_own() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()

        def forward(self, *, pixels: Tensor) -> dict[str, Tensor]:
            return {"logits": self.body(pixels)}

    model = adapt(Keyword(), noise(8), call=lambda module, images: module(pixels=images))
    assert model.roles["map"].where == "body.2"
    assert model(noise(8))["logits"].shape == (2, 5)


def test_wrong_words_are_said() -> None:
    with pytest.raises(UserError, match=r"^unknown word 'were' in a tap; did you mean where\?$"):
        adapt(network(), roles={"map": {"were": "2"}})


def test_a_blank_image_lies_where_the_module_does() -> None:
    image = blank(network().double(), InputSpec(channels=2), (5, 6))
    assert image.shape == (1, 2, 5, 6)
    assert image.dtype == torch.float64
    assert blank(nn.Identity(), InputSpec(size=(7, 8)), (5, 6)).shape == (1, 3, 7, 8)
    assert blank(network().to("meta"), InputSpec(), (5, 6)).device.type == "meta"
