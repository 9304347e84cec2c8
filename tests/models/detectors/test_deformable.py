# SPDX-License-Identifier: Apache-2.0
import re

import pytest
import torch
from torch import nn

from tutelage.core.error import UserError
from tutelage.models.detectors.deformable import Deformed, deform
from tutelage.models.detectors.pyramid import Pyramid


@pytest.mark.parametrize(("stride", "groups", "bias"), [(1, 1, True), (2, 4, False)])
def test_it_begins_as_the_plain_convolution_and_keeps_the_names_of_its_weights(
    stride: int, groups: int, bias: bool
) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(8, 8, 3, stride, 1, groups=groups, bias=bias)
    deformed, one = Deformed(plain), torch.randn(2, 8, 7, 9)
    torch.testing.assert_close(deformed(one), plain(one))
    assert set(plain.state_dict()) <= set(deformed.state_dict())


def test_its_places_are_learned() -> None:
    torch.manual_seed(0)
    deformed, one = Deformed(nn.Conv2d(4, 4, 3, padding=1)), torch.randn(1, 4, 8, 8)
    deformed(one).square().sum().backward()
    grad = deformed.offset.weight.grad
    assert grad is not None
    assert grad.any()


def test_half_precision_is_computed_in_full() -> None:
    deformed = Deformed(nn.Conv2d(4, 4, 3, padding=1))
    with torch.autocast("cpu", torch.bfloat16):
        assert deformed(torch.randn(1, 4, 8, 8)).dtype == torch.float32


def test_the_stages_of_a_backbone_and_no_other() -> None:
    plain, pyramid = (
        Pyramid("timm:resnext50_32x4d", width=8, deformable=strides).eval() for strides in ((), (8, 16, 32))
    )
    pyramid.load_state_dict(plain.state_dict(), strict=False)
    places = {name.split(".")[1] for name, part in pyramid.body.named_modules() if isinstance(part, Deformed)}
    assert places == {"layer2", "layer3", "layer4"}
    assert sum(isinstance(part, Deformed) for part in pyramid.body.modules()) == 4 + 6 + 3
    pixels = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for one, other in zip(plain(pixels), pyramid(pixels), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_1x1_convolutions_stay() -> None:
    assert deform(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Sequential(nn.Conv2d(4, 4, 3)))) == 1


def test_a_stage_without_such_convolutions() -> None:
    said = "deformable: backbone 'tiny8' has no 3x3 convolutions that end at stride 64"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        Pyramid("tiny8", deformable=(64,))
