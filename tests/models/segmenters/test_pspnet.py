# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn

from tutelage.core.error import UserError
from tutelage.models.segmenters.body import Body
from tutelage.models.segmenters.deeplabv3 import DeepLabV3
from tutelage.models.segmenters.pspnet import PSPNet, PyramidPooling
from tutelage.models.segmenters.scores import Scores


def test_scales_lie_beside_the_map() -> None:
    pooling = PyramidPooling(4, 4, (1, 6)).eval()
    for scale in pooling.scales:
        assert isinstance(scale, nn.Sequential)
        scale[0].weight.data = torch.eye(4)[..., None, None]
    x = torch.rand(2, 4, 6, 6)
    found = pooling(x) * torch.tensor([1.0] * 4 + [(1 + 1e-5) ** 0.5] * 8).view(1, -1, 1, 1)
    torch.testing.assert_close(found[:, :4], x)
    torch.testing.assert_close(found[:, 4:8], x.mean((2, 3), keepdim=True).expand_as(x))
    torch.testing.assert_close(found[:, 8:], x)


@pytest.mark.parametrize("stride", [8, 16, 32])
@pytest.mark.parametrize("name", ["tiny8", "resnet10t", "timm:mobilenetv3_small_050"])
def test_the_last_map_has_the_stride_that_is_asked_for(name: str, stride: int) -> None:
    body = Body(name, stride, 3, False).eval()
    maps = body(torch.zeros(1, 3, 64, 96))
    assert maps[-1].shape[2:] == (64 // stride, 96 // stride)
    assert [one.shape[1] for one in maps] == body.widths
    assert len(maps) <= 4


def test_dilation_adds_no_weights() -> None:
    counts = {sum(p.numel() for p in PSPNet(5, backbone="resnet10t", output_stride=s).parameters()) for s in (8, 32)}
    assert len(counts) == 1


@pytest.mark.parametrize("make", [PSPNet, DeepLabV3])
def test_the_second_head_speaks_in_training_alone(make: type[PSPNet] | type[DeepLabV3]) -> None:
    model, images = make(5, backbone="tiny8", width=16), torch.rand(2, 3, 64, 64)
    assert isinstance(model(images), Scores)
    assert isinstance(model.eval()(images), torch.Tensor)
    assert isinstance(make(5, backbone="tiny8", width=16, auxiliary=False)(images), torch.Tensor)


@pytest.mark.parametrize(
    ("name", "stride", "message"),
    [
        ("tiny8", 4, "output_stride is 8, 16 or 32, not 4"),
        ("resnet18x", 8, "unknown backbone 'timm:resnet18x'; did you mean resnet18"),
        ("vit_tiny_patch16_224", 8, "backbone timm:vit_tiny_patch16_224 gives no maps of stride 8"),
    ],
)
def test_backbones_that_do_not_do(name: str, stride: int, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        Body(name, stride, 3, False)


def test_bins_and_width_must_make_sense() -> None:
    with pytest.raises(UserError, match="bins are cells a side"):
        PSPNet(5, backbone="tiny8", bins=(0, 1))
    with pytest.raises(UserError, match="bins are cells a side"):
        PSPNet(5, backbone="tiny8", width=2)
