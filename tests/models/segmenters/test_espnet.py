# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tutelage.models.segmenters.espnet import Encoder, ESPNet, Spatial


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_as_many_weights_as_the_paper_counts() -> None:
    # table 1: 349 thousand for the encoder alone, 364 thousand with the decoder, for 20 classes
    assert round(count(Encoder(20, 2, 8)) / 1000) == 349
    assert abs(count(ESPNet(20, p=2, q=8)) / 1000 - 364) < 1.5


def test_names_are_those_of_the_published_weights() -> None:
    keys = set(ESPNet(12).state_dict())
    for key in (
        "encoder.level1.act.weight",
        "encoder.level2_0.d16.conv.weight",
        "encoder.level2_0.act.weight",
        "encoder.level3.7.bn.bn.running_var",
        "encoder.b3.bn.weight",
        "level3_C.conv.weight",
        "br.weight",
        "conv.bn.bias",
        "up_l3.0.weight",
        "combine_l2_l3.0.act.weight",
        "combine_l2_l3.1.bn.act.weight",
        "up_l2.1.bn.weight",
        "classifier.weight",
    ):
        assert key in keys


def test_branches_are_added_up_from_narrow_to_wide() -> None:
    torch.manual_seed(0)
    block = Spatial(6, 10, shortcut=False).eval()
    x = torch.randn(2, 6, 9, 9)
    narrow = F.conv2d(x, block.c1.conv.weight)  # type: ignore[union-attr, arg-type]
    parts = []
    for dilation in (1, 2, 4, 8, 16):
        weight = block.get_submodule(f"d{dilation}.conv").weight
        parts.append(F.conv2d(narrow, weight, padding=dilation, dilation=dilation))  # type: ignore[arg-type]
    sums = [parts[0], parts[1], sum(parts[1:3]), sum(parts[1:4]), sum(parts[1:5])]
    torch.testing.assert_close(block(x), block.bn(torch.cat(sums, dim=1)))  # type: ignore[arg-type]


def test_it_takes_colour_images() -> None:
    with pytest.raises(TypeError, match="images have 3 channels here"):
        ESPNet(5, in_channels=1)
