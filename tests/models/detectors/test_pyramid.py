# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn
from torchvision.models.detection import retinanet_resnet50_fpn

from tutelage.core import Tap
from tutelage.core.error import UserError
from tutelage.core.tap import Recorder
from tutelage.models.detectors.pyramid import Pyramid, blacked
from tutelage.models.detectors.towers import Norm

BACKBONES = ("tiny4", "tiny4x2", "torchvision:resnet18", "torchvision:mobilenet_v3_small", "timm:resnet10t")


@pytest.mark.parametrize("backbone", BACKBONES)
def test_maps_have_the_strides_the_pyramid_says(backbone: str) -> None:
    pyramid = Pyramid(backbone, width=8, levels=(4, 8, 16), extra="p6p7").eval()
    maps = pyramid(torch.zeros(1, 3, 64, 128))
    assert [tuple(one.shape[1:]) for one in maps] == [(8, 64 // s, 128 // s) for s in pyramid.strides]


@pytest.mark.parametrize(("extra", "count"), [("p6p7", 2), ("p6p7_backbone", 2), ("pool", 1), ("none", 0)])
def test_further_levels(extra: str, count: int) -> None:
    pyramid = Pyramid("tiny4", width=8, levels=(8, 16), extra=extra)  # type: ignore[arg-type]
    assert len(pyramid(torch.zeros(1, 3, 64, 64))) == 2 + count == len(pyramid.strides)


def test_taps_are_what_is_returned() -> None:
    pyramid = nn.Sequential()
    pyramid.backbone = Pyramid("tiny4", width=8, extra="pool")
    roles = pyramid.backbone.roles()
    recorder = Recorder(pyramid, roles)
    with recorder:
        maps = pyramid.backbone(torch.rand(2, 3, 64, 64))
    taken = recorder.release()
    assert all(torch.equal(taken[f"fpn[{level}]"], one) for level, one in enumerate(maps))
    assert [taken[f"stages[{i}]"].shape[1] for i in range(4)] == [4, 8, 16, 32]
    assert isinstance(roles["fpn[0]"], Tap)


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_levels_are_tapped_before_their_norm(norm: Norm) -> None:
    pyramid = Pyramid("tiny4", width=8, extra="p6p7", norm=norm)
    recorder = Recorder(nn.ModuleDict({"backbone": pyramid}), pyramid.roles())
    with recorder:
        maps = pyramid(torch.rand(2, 3, 128, 128))
    taken = recorder.release()
    recorder.close()
    for level in range(3):
        assert not torch.allclose(taken[f"fpn[{level}]"], maps[level])
        layer = pyramid.get_submodule(f"fpn.layer_blocks.{level}.1")
        torch.testing.assert_close(layer(taken[f"fpn[{level}]"]), maps[level])
    assert [torch.equal(taken[f"fpn[{level}]"], maps[level]) for level in (3, 4)] == [True, True]


def test_padding_is_black_after_normalisation() -> None:
    pixels, size = torch.rand(2, 3, 64, 64), torch.tensor([[64, 48], [32, 64]])
    other = pixels.clone()
    other[0, :, :, 48:] = 9.0
    other[1, :, 32:] = -9.0
    assert torch.equal(blacked(pixels, size), blacked(other, size))
    pyramid = Pyramid("tiny4", width=8).eval()
    for one, two in zip(pyramid(pixels, size), pyramid(other, size), strict=True):
        assert torch.equal(one, two)


def test_names_are_torchvisions() -> None:
    published = retinanet_resnet50_fpn(weights=None, weights_backbone=None).backbone.state_dict()
    own = Pyramid("torchvision:resnet50", extra="p6p7").state_dict()
    assert {name: one.shape for name, one in own.items()} == {name: one.shape for name, one in published.items()}


def test_frozen_norms_and_stages_do_not_move() -> None:
    pyramid = Pyramid("torchvision:resnet18", width=8, frozen_norm=True, frozen_stages=2)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in pyramid.body.modules())
    frozen = {name for name, p in pyramid.named_parameters() if not p.requires_grad}
    assert {name.split(".")[1] for name in frozen} == {"conv1", "layer1", "layer2"}
    before = {name: one.clone() for name, one in pyramid.body.named_buffers()}
    pyramid.train()(torch.rand(2, 3, 64, 64))
    assert all(torch.equal(one, before[name]) for name, one in pyramid.body.named_buffers())
    free = Pyramid("torchvision:resnet18", width=8).eval()
    pyramid.load_state_dict(free.state_dict())
    pixels = torch.rand(1, 3, 64, 64)
    for one, two in zip(pyramid.eval()(pixels), free(pixels), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"backbone": "resnet50"}, "write timm:NAME"),
        ({"backbone": "timm:resnt18"}, "did you mean"),
        ({"backbone": "torchvision:resnet81"}, "unknown backbone"),
        ({"levels": (2, 4)}, "none of 2"),
        ({"levels": (8, 4)}, "ascending"),
        ({"extra": "p8"}, "extra 'p8'"),
        ({"frozen_stages": 9}, "frozen_stages"),
        ({"pretrained": True}, "without weights"),
        ({"backbone": "timm:vit_tiny_patch16_224", "levels": (8,)}, "none of 8"),
    ],
)
def test_what_cannot_be_is_named(options: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Pyramid(**options)  # type: ignore[arg-type]
