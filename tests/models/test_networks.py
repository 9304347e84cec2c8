# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable

import pytest
import torch
from torch import nn

from tutelage.core.error import UserError
from tutelage.models.networks import mobilenet, shufflenet, small_stem, vgg, wide_resnet

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    **wide_resnet.ARCHITECTURES,
    **vgg.ARCHITECTURES,
    **mobilenet.ARCHITECTURES,
    **shufflenet.ARCHITECTURES,
    **small_stem.ARCHITECTURES,
}

LARGE = {"wrn_28_10", "resnet34_cifar", "resnet50_cifar", "resnet101_cifar", "resnet152_cifar"}

# counted with 100 classes in the codes behind the CIFAR-100 tables
PARAMETERS = {
    "wrn_16_2": 703_284,
    "wrn_40_2": 2_255_156,
    "wrn_40_1": 569_780,
    "vgg8": 3_965_028,
    "vgg13": 9_462_180,
    "mobilenetv2_half": 812_836,
    "shufflenetv1": 949_258,
    "shufflenetv2": 1_355_528,
    "resnet50_cifar": 23_705_252,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_networks_of_the_tables_have_their_parameters(name: str) -> None:
    network = NETWORKS[name](num_classes=100)
    assert sum(p.numel() for p in network.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", sorted(NETWORKS.keys() - LARGE))
def test_every_network_takes_small_images_and_learns(name: str) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name](num_classes=7, in_channels=1)
    logits = network(torch.rand(2, 1, 32, 32))
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in network.parameters())


SHAPES = {
    "wrn_40_2": ("layer1", (32, 32, 32), "layer3", (128, 8, 8)),
    "vgg13": ("group0", (64, 32, 32), "group4", (512, 4, 4)),
    "mobilenetv2_half": ("row1", (12, 16, 16), "row5", (80, 2, 2)),
    "shufflenetv1": ("layer1", (240, 16, 16), "layer3", (960, 4, 4)),
    "shufflenetv2": ("layer1", (116, 16, 16), "layer3", (464, 4, 4)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_maps_have_the_shapes_of_the_tables(name: str) -> None:
    network = NETWORKS[name](num_classes=100)
    seen: dict[str, tuple[int, ...]] = {}
    early, small, late, large = SHAPES[name]
    for path in (early, late):

        def note(module: nn.Module, inputs: object, output: torch.Tensor, path: str = path) -> None:
            seen[path] = tuple(output.shape[1:])

        network.get_submodule(path).register_forward_hook(note)
    network(torch.rand(2, 3, 32, 32))
    assert seen == {early: small, late: large}


def test_shuffling_deals_the_channels_of_groups_in_turn() -> None:
    x = torch.arange(6.0).view(1, 6, 1, 1)
    assert shufflenet.Shuffle(2)(x).flatten().tolist() == [0, 3, 1, 4, 2, 5]


def test_a_depth_that_makes_no_wide_resnet_is_refused() -> None:
    with pytest.raises(UserError, match=r"^a wide ResNet has 6n \+ 4 layers \(10, 16, 22, 28, 40\), not 18$"):
        wide_resnet.WideResNet(18, 2)
