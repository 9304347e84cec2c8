# SPDX-License-Identifier: Apache-2.0
import re
from typing import Any

import pytest
import torch

from models.readings import noise, readings, stages
from tutelage.core.error import UserError
from tutelage.models import roles
from tutelage.models.load import load

#: Kinds of networks, as small as their options allow, and the images they are read on.
MAPS: dict[str, tuple[dict[str, Any], int]] = {
    "resnet18": ({}, 64),
    "mobilenetv3_small_050": ({}, 64),
    "efficientnet_b0": ({}, 64),
    "convnext_atto": ({}, 64),
    "regnety_002": ({}, 64),
    "densenet121": ({"block_config": (2, 2, 2, 2)}, 64),
    "vgg11_bn": ({"mlp_ratio": 0.02}, 64),
    "swin_tiny_patch4_window7_224": (
        {"img_size": 64, "window_size": 4, "embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)},
        64,
    ),
    "repvgg_a0": ({}, 64),
    "edgenext_xx_small": ({}, 64),
}
TOKENS: dict[str, tuple[dict[str, Any], int]] = {
    "vit_tiny_patch16_224": ({"img_size": 64, "depth": 3}, 64),
    "deit_tiny_distilled_patch16_224": ({"img_size": 64, "depth": 3}, 64),
    "mixer_s32_224": ({"img_size": 64}, 64),
    "vit_base_patch16_gap_224": ({"img_size": 64, "depth": 3, "embed_dim": 48, "num_heads": 3}, 64),
    "eva02_tiny_patch14_224": ({"img_size": 56, "depth": 3}, 56),
}


def made(name: str, options: dict[str, Any]) -> Any:
    return load({"model": f"timm:{name}", **options}, num_classes=7, seed=0)


@pytest.mark.parametrize("name", MAPS)
def test_stages_and_map_are_what_timm_itself_gives(name: str) -> None:
    options, size = MAPS[name]
    model = made(name, options)
    taps, output = readings(model, noise(size))
    images = model.input.prepare(noise(size), {})
    with torch.no_grad():
        own = model.module.forward_intermediates(images, intermediates_only=True, output_fmt="NCHW")
        features = model.module.forward_features(images)
        pooled = model.module.forward_head(features, pre_logits=True)
        logits = model.module(images)
    assert len(stages(model)) == len(own)
    for role, expected in zip(stages(model), own, strict=True):
        assert torch.equal(taps[role], expected), role
    channels_last = getattr(model.module, "output_fmt", "NCHW") == "NHWC"
    expected_map = features.permute(0, 3, 1, 2) if channels_last else features
    assert torch.equal(taps["map"], expected_map)
    assert torch.equal(taps["pooled"], pooled)
    assert torch.equal(output, logits)
    assert torch.equal(model.lend("classifier")(taps["pooled"]), logits)


@pytest.mark.parametrize("name", sorted(set(MAPS) - {"efficientnet_b0"}))
def test_the_trace_alone_finds_the_stages_timm_names(name: str) -> None:
    """But for efficientnet's last one, where timm leaves the head's convolution out."""
    options, size = MAPS[name]
    model = made(name, options)
    found = roles.find(model.module, noise(size), channels_last=name.startswith("swin")).taps
    known, _ = readings(model, noise(size))
    model.roles = {role: tap for role, tap in found.items() if role.startswith("stages")}
    traced, _ = readings(model, noise(size))
    assert stages(model) == [role for role in known if role.startswith("stages[") and role.endswith("]")]
    same = [torch.equal(traced[role], known[role]) for role in stages(model)]
    assert all(same[:-1])
    assert same[-1] or name == "swin_tiny_patch4_window7_224"  # whose last norm the trace counts in


@pytest.mark.parametrize("name", TOKENS)
def test_blocks_and_tokens_are_what_timm_itself_gives(name: str) -> None:
    options, size = TOKENS[name]
    model = made(name, options)
    taps, output = readings(model, noise(size))
    images = model.input.prepare(noise(size), {})
    prefix = getattr(model.module, "num_prefix_tokens", 0)
    with torch.no_grad():
        features = model.module.forward_features(images)
        own = model.module.forward_intermediates(images, intermediates_only=True, output_fmt="NLC")
        logits = model.module(images)
    assert len(own) == len([role for role in taps if role.startswith("blocks[")]) >= 3
    for number, expected in enumerate(own):
        assert torch.equal(taps[f"blocks[{number}]"], expected)
    assert torch.equal(taps["tokens"], features[:, prefix:])
    assert ("cls[0]" in taps) == (prefix > 0)
    if name == "vit_tiny_patch16_224":
        attention: Any = model.module.get_submodule("blocks.1.attn")
        fused = attention.qkv(model.module.get_submodule("blocks.1.norm1")(whole_block(model, images)))
        assert torch.allclose(torch.cat([taps["q[1]"], taps["k[1]"], taps["v[1]"]], dim=2), fused, atol=1e-5)
    assert ("q[0]" in taps) == name.startswith(("vit", "deit"))  # eva02 multiplies by the weights of its layer
    if prefix:
        last = model.module.norm(taps["cls[2]"]) if not isinstance(model.module.norm, torch.nn.Identity) else None
        assert last is None or torch.allclose(last, features[:, 0], atol=1e-5)
    assert torch.equal(output, logits)
    assert taps["patch_embed[0]"].shape == taps["blocks[0]"].shape
    assert "map" not in taps


def test_an_attention_pooling_gives_its_first_place() -> None:
    model = made("resnet50_clip", {})
    taps, output = readings(model, noise(64))
    assert taps["pooled"].shape == (2, 2048)
    assert torch.allclose(model.lend("classifier")(taps["pooled"]), output, atol=1e-5)


PYRAMIDS: dict[str, tuple[dict[str, Any], int]] = {
    "levit_128s": ({}, 224),
    "efficientformer_l1": ({}, 64),
    "mvitv2_tiny": ({"img_size": 64}, 64),
    "twins_svt_small": ({"depths": (2, 1, 1, 1)}, 224),
    "coat_lite_tiny": ({}, 224),
    "hiera_tiny_224": ({"img_size": (64, 64)}, 64),
}


@pytest.mark.parametrize("name", PYRAMIDS)
def test_tokens_of_a_pyramid_are_the_maps_that_timm_itself_gives(name: str) -> None:
    options, size = PYRAMIDS[name]
    model = made(name, options)
    taps, _ = readings(model, noise(size))
    images = model.input.prepare(noise(size), {})
    with torch.no_grad():
        own = model.module.forward_intermediates(images, intermediates_only=True, output_fmt="NCHW")
        features = model.module.forward_features(images)
    assert torch.equal(taps["tokens"], features[:, model.roles["tokens"].prefix :])
    assert torch.equal(taps["map"].flatten(2).transpose(1, 2), taps["tokens"])
    if name.startswith("hiera"):  # its tokens lie in another order until the last stage
        assert torch.equal(taps["map"], own[-1])
        assert stages(model) == []
        return
    assert len(own) == len(stages(model)) >= 3
    for role, expected in zip(stages(model)[:-1], own[:-1], strict=True):
        assert torch.equal(taps[role], expected), role
    assert taps[stages(model)[-1]].shape == own[-1].shape  # before or after the last norm


def whole_block(model: Any, images: torch.Tensor) -> torch.Tensor:
    """Return what the first block gives, prefix tokens and all."""
    kept: list[torch.Tensor] = []
    handle = model.module.blocks[0].register_forward_hook(lambda module, args, output: kept.append(output))
    with torch.no_grad():
        model.module(images)
    handle.remove()
    return kept[0]


def test_a_distilled_transformer_gives_the_mean_of_its_heads() -> None:
    options, size = TOKENS["deit_tiny_distilled_patch16_224"]
    model = made("deit_tiny_distilled_patch16_224", options)
    assert model.modules["classifier"] == "head"
    taps, output = readings(model, noise(size))
    module: Any = model.module
    with torch.no_grad():
        features = module.forward_features(model.input.prepare(noise(size), {}))
        expected = (module.head(features[:, 0]) + module.head_dist(features[:, 1])) / 2
    assert torch.allclose(output, expected, atol=1e-6)
    assert torch.equal(taps["pooled"], features[:, 0])
    module.train()
    assert model(noise(size)).shape == (2, 7)


def test_pixels_are_those_of_timms_configuration() -> None:
    model = load("timm:vit_tiny_patch16_224", num_classes=3)
    assert model.input is not None
    assert (model.input.size, model.input.mean, model.input.std) == ((224, 224), (0.5,) * 3, (0.5,) * 3)
    model = load("timm:resnet18", num_classes=3, in_channels=1)
    assert model.input is not None
    assert model.input.size is None
    assert model.input.mean == pytest.approx(((0.485 + 0.456 + 0.406) / 3,))
    assert model.input.channels == 1
    assert model(noise(32, channels=1)).shape == (2, 3)


def test_its_own_size_tells_stages_apart_that_small_images_do_not() -> None:
    model = load("timm:resnet18", num_classes=3, image_size=(8, 8), in_channels=1)
    assert len(stages(model)) == 5
    taps, _ = readings(model, noise(8, channels=1))
    assert taps["map"].shape == (2, 512, 1, 1)


def test_a_smaller_image_size_of_a_transformer_is_its_input() -> None:
    model = load({"model": "timm:vit_tiny_patch16_224", "img_size": 32, "depth": 2}, num_classes=3)
    assert model.input is not None
    assert model.input.size == (32, 32)
    assert model(noise(50)).shape == (2, 3)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("timm:resnet81", "unknown model 'timm:resnet81'; did you mean resnet"),
        ("timm:resnet18.nothing", "timm:resnet18.nothing: Invalid pretrained tag (nothing) for resnet18."),
        (
            {"model": "timm:resnet18", "wdith": 2},
            "timm:resnet18: ResNet.__init__() got an unexpected keyword argument 'wdith'",
        ),
    ],
)
def test_what_is_wrong_is_said(spec: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        load(spec)
