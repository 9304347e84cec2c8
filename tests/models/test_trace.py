# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import Tensor, nn

from tutelage.models.trace import tensor_in, trace


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": self.act(self.body(self.act(x)))}


def test_calls_nest_and_count() -> None:
    network = Shared()
    root, output = trace(network, lambda: network(torch.ones(1, 2)))
    assert [call.path for call in root.inner] == ["act", "body", "act"]
    assert [call.number for call in root.inner] == [0, 0, 1]
    assert [call.path for call in root.inner[1].inner] == ["body.0", "body.1"]
    assert [call.path for call in root.walk()] == ["act", "body.0", "body.1", "body", "act", ""]
    assert root.given is output["y"] is root.inner[2].given
    assert root.inner[1].taken is root.inner[0].given


def test_nothing_of_the_module_or_the_generator_moves() -> None:
    network = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5))
    network[1].eval()
    before, state = torch.get_rng_state(), {key: t.clone() for key, t in network.state_dict().items()}
    trace(network, lambda: (torch.rand(1), network(torch.rand(4, 2))))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(state[key], tensor) for key, tensor in network.state_dict().items())
    assert [part.training for part in network.modules()] == [True, True, False]
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in network.modules())


def test_hooks_are_gone_after_an_error() -> None:
    network = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        trace(network, lambda: network(torch.zeros(1, 3)))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in network.modules())


def test_keyword_inputs_and_nested_outputs() -> None:
    x = torch.zeros(1)
    assert tensor_in({"a": None, "b": (3, [x])}) is x
    assert tensor_in(("a", 1)) is None

    class Keyword(nn.Module):
        def forward(self, *, pixels: Tensor) -> tuple[None, Tensor]:
            return None, pixels + 1

    network = Keyword()
    root, _ = trace(network, lambda: network(pixels=x))
    assert root.taken is x
    assert root.given is not None


def test_a_forward_that_does_not_call_the_module() -> None:
    with pytest.raises(RuntimeError, match="the module's forward was not called"):
        trace(nn.Identity(), lambda: None)
