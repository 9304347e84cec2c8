# SPDX-License-Identifier: Apache-2.0
import re
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from models.readings import noise, readings, stages
from tutelage.core.error import UserError
from tutelage.models.load import load
from tutelage.models.torchvision import refit

#: Options that make it small, the images it is read on, and the nodes of its stages.
NETWORKS: dict[str, tuple[dict[str, Any], int, tuple[str, ...]]] = {
    "resnet18": ({}, 64, ("relu", "layer1", "layer2", "layer3", "layer4")),
    "mobilenet_v2": ({}, 64, ("features.1", "features.3", "features.6", "features.13", "features.18")),
    "shufflenet_v2_x0_5": ({}, 64, ("conv1", "maxpool", "stage2", "stage3", "conv5")),
    "squeezenet1_1": ({}, 64, ("features.1", "features.4", "features.7", "features.12")),
    "efficientnet_b0": ({}, 64, ("features.1", "features.2", "features.3", "features.5", "features.8")),
    "densenet121": (
        {},
        64,
        (
            *("features.relu0", "features.denseblock1", "features.denseblock2", "features.denseblock3"),
            "features.norm5",
        ),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_stages_are_the_nodes_of_the_graph(name: str) -> None:
    options, size, nodes = NETWORKS[name]
    model = load({"model": f"torchvision:{name}", **options}, num_classes=7, seed=0)
    taps, output = readings(model, noise(size))
    graph = create_feature_extractor(model.module, list(nodes)).eval()
    with torch.no_grad():
        own = graph(model.input.prepare(noise(size), {}))  # type: ignore[union-attr]
    assert len(stages(model)) == len(nodes)
    for role, node in zip(stages(model), nodes, strict=True):
        assert torch.equal(taps[role], own[node]) or node.endswith(("relu", "norm5", "relu0")), role
    assert torch.equal(taps["map"], taps[stages(model)[-1]])
    if "pooled" in taps:
        assert torch.equal(model.lend("classifier")(taps["pooled"]), output)
    else:
        assert isinstance(model.lend("classifier"), nn.Conv2d)
        assert name == "squeezenet1_1"


def test_roles_of_a_transformer() -> None:
    model = load({"model": "torchvision:vit_b_32", "image_size": 64}, num_classes=7, seed=0)
    assert model.input is not None
    assert model.input.size == (64, 64)
    taps, output = readings(model, noise(50))
    assert taps["tokens"].shape == (2, 4, 768)
    assert taps["cls[11]"].shape == (2, 768)
    module: Any = model.module
    assert torch.allclose(module.encoder.ln(taps["blocks[11]"]), taps["tokens"], atol=1e-5)
    assert torch.allclose(module.heads(taps["pooled"]), output)


def test_roles_of_a_swin() -> None:
    model = load("torchvision:swin_t", num_classes=7, seed=0)
    taps, _ = readings(model, noise(64))
    assert [tuple(taps[role].shape[1:]) for role in stages(model)] == [
        (96, 16, 16),
        (192, 8, 8),
        (384, 4, 4),
        (768, 2, 2),
    ]
    assert torch.allclose(taps["map"].mean((2, 3)), taps["pooled"], atol=1e-5)


def test_pixels_and_options() -> None:
    model = load("torchvision:resnet18", num_classes=7, in_channels=1)
    assert model.input is not None
    assert model.input.mean == (0.485, 0.456, 0.406)
    assert model.input.size is None
    assert model(noise(32, channels=1)).shape == (2, 7)  # grey is repeated to three channels


def test_auxiliary_heads_do_not_mislead() -> None:
    model = load("torchvision:googlenet", num_classes=7, seed=0)
    assert model.modules["classifier"] == "fc"
    assert model.roles["map"].where == "inception5b"


@pytest.mark.parametrize("last", [nn.Linear(4, 10), nn.Conv2d(4, 10, 1, bias=False)])
def test_a_new_last_layer(last: nn.Module) -> None:
    tail = [nn.Flatten(), last] if isinstance(last, nn.Linear) else [last, nn.Flatten()]
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Sequential(*tail))
    refit(network, 10, noise(8))
    assert last in list(network.modules())
    refit(network, 3, noise(8))
    assert network(noise(8)).shape == (2, 3)
    assert last not in list(network.modules())
    kinds = [type(part) for part in network.modules()]
    assert kinds.count(type(last)) == (1 if isinstance(last, nn.Linear) else 2)


@pytest.mark.parametrize(
    ("spec", "channels", "message"),
    [
        ("torchvision:resnet81", 3, "unknown model 'torchvision:resnet81'; did you mean resnet18?"),
        ("torchvision:fcn_resnet50", 3, "unknown model 'torchvision:fcn_resnet50'; did you mean "),
        ("torchvision:resnet18", 4, "torchvision:resnet18 takes 3 channels, the images have 4"),
        (
            {"model": "torchvision:resnet18", "depth": 3},
            3,
            "torchvision:resnet18: ResNet.__init__() got an unexpected keyword argument 'depth'",
        ),
    ],
)
def test_what_is_wrong_is_said(spec: Any, channels: int, message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        load(spec, in_channels=channels)
