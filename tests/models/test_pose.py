# SPDX-License-Identifier: Apache-2.0
from pathlib import Path
from typing import Any

import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tutelage.core.error import UserError
from tutelage.functional.simcc import decode, unflip
from tutelage.models.load import load, rebuild
from tutelage.models.poses.published import renamed
from tutelage.models.poses.rtmcc import RTMCC, GatedAttention, ScaleNorm
from tutelage.models.poses.rtmpose import RTMPose
from tutelage.models.source import listed

GOLDEN = ("core/rtmcc_gau", "core/rtmcc_head")
#: Names of the golden cases, and of the published checkpoints.
OWN_NAMES = {"mlp.scale_norm.": "mlp.0.", "mlp.fc.": "mlp.1."}
FACTS: dict[str, Any] = {"task": "pose", "image_size": (64, 64), "in_channels": 3, "geometry": {"num_keypoints": 5}}
TINY = {"model": "tutelage:rtmpose_t", "widen": 0.125}


def own_name(name: str) -> str:
    for given, own in OWN_NAMES.items():
        if name.startswith(given):
            return own + name.removeprefix(given)
    return name


def filled(module: nn.Module, arrays: dict[str, NDArray[Any]]) -> dict[str, Tensor]:
    """Load a case's weights at float64, and return the parameters by the case's names."""
    own = {own_name(name): name for name in arrays}
    module.double()
    state = {key: torch.from_numpy(arrays[own[key]]).double() for key in module.state_dict()}
    module.load_state_dict(state)
    return {own[key]: parameter for key, parameter in module.named_parameters()}


def golden(claim: str, arrays: dict[str, NDArray[Any]], meta: dict[str, Any]) -> dict[str, Any]:
    if claim == "core/rtmcc_gau":
        unit = GatedAttention(
            meta["num_token"],
            meta["in_dims"],
            meta["out_dims"],
            expansion=meta["expansion_factor"],
            s=meta["s"],
            act=meta["act_fn"],
            relative=meta["use_rel_bias"],
        )
        free = filled(unit, arrays)
        free["tokens"] = torch.from_numpy(arrays["tokens"]).double().requires_grad_()
        output = unit(free["tokens"])
        loss = (output * torch.from_numpy(arrays["cotangent"])).sum()
        answer = {"output": output, "loss": loss}
    else:
        (width, height), split = meta["input_size"], meta["simcc_split_ratio"]
        across, down = meta["in_featuremap_size_wh"]
        head = RTMCC(
            meta["in_channels"],
            meta["num_keypoints"],
            (down, across),
            (int(width * split), int(height * split)),
            hidden=meta["hidden_dims"],
            s=meta["s"],
            expansion=meta["expansion_factor"],
            kernel=meta["final_layer_kernel_size"],
        )
        free = filled(head, arrays)
        free["features"] = torch.from_numpy(arrays["features"]).double().requires_grad_()
        x, y = head(free["features"])
        loss = sum((p * torch.from_numpy(arrays[f"cotangent_{axis}"])).sum() for axis, p in (("x", x), ("y", y)))
        points, scores = decode(x, y, split=split)
        mirrored = head(torch.from_numpy(arrays["features_of_flipped_image"]).double())
        back_x, back_y = unflip(mirrored[0], mirrored[1], torch.from_numpy(arrays["flip_indices"]))
        both, both_scores = decode((x + back_x) / 2, (y + back_y) / 2, split=split)
        answer = {
            **{"pred_x": x, "pred_y": y, "loss": loss, "keypoints": points, "scores": scores},
            **{"keypoints_flip_test": both, "scores_flip_test": both_scores},
        }
    grads = torch.autograd.grad(loss, list(free.values()))
    return {**answer, **{f"grad_{name}": grad for name, grad in zip(free, grads, strict=True)}}


def test_relative_bias_is_read_by_distance() -> None:
    unit = GatedAttention(3, 4, 4, s=2, relative=True)
    assert unit.w is not None
    tokens = torch.randn(1, 3, 4)
    with torch.no_grad():
        unit.w.zero_()
        plain = unit(tokens)
        unit.w[2 + 2] = 5.0  # only what token 0 reads of token 2
        moved = unit(tokens)
    assert not torch.equal(moved[0, 0], plain[0, 0])
    assert torch.equal(moved[0, 1:], plain[0, 1:])


def test_a_token_of_zeros_has_no_gradient() -> None:
    token = torch.zeros(1, 1, 4, requires_grad=True)
    ScaleNorm()(token).sum().backward()
    assert token.grad is not None
    assert token.grad.isfinite().all()


@pytest.mark.parametrize(
    ("name", "parameters", "channels", "bins"),
    [("t", 2.3487, 384, 384), ("s", 4.37832, 512, 384), ("m", 12.279432, 768, 384), ("l", 26.138912, 1024, 384)],
)
def test_published_sizes(name: str, parameters: float, channels: int, bins: int) -> None:
    with torch.device("meta"):
        module = listed("poses")[f"rtmpose_{name}"](num_keypoints=133, image_size=(256, 192))
        x, y = module(torch.zeros(1, 3, 256, 192))
    assert isinstance(module, RTMPose)
    count: int = sum(p.numel() for p in module.backbone.parameters())
    assert count / 1e6 == pytest.approx(parameters)
    assert module.backbone.channels == channels
    assert x.shape == (1, 133, bins)
    assert y.shape == (1, 133, 512)
    assert module.head.mlp[1].weight.shape == (256, 8 * 6)


def names_of_a_published_checkpoint(prefix: str = "") -> dict[str, Tensor]:
    """Names and shapes of a CSPNeXt-tiny with 17 keypoints at 64x64, written out from the published layout."""

    def conv(name: str, out: int, into: int, kernel: int) -> dict[str, tuple[int, ...]]:
        norm = {f"{name}.bn.{word}": (out,) for word in ("weight", "bias", "running_mean", "running_var")}
        return {f"{name}.conv.weight": (out, into, kernel, kernel), f"{name}.bn.num_batches_tracked": (), **norm}

    shapes: dict[str, tuple[int, ...]] = {}
    for place, out, into in ((0, 12, 3), (1, 12, 12), (2, 24, 12)):
        shapes |= conv(f"backbone.stem.{place}", out, into, 3)
    width = 24
    for stage, (goal, blocks) in enumerate(((48, 1), (96, 1), (192, 1), (384, 1)), 1):
        home, half, last = f"backbone.stage{stage}", goal // 2, stage == 4
        shapes |= conv(f"{home}.0", goal, width, 3)
        if last:
            shapes |= conv(f"{home}.1.conv1", half, goal, 1) | conv(f"{home}.1.conv2", goal, 4 * half, 1)
        csp = f"{home}.{2 if last else 1}"
        shapes |= conv(f"{csp}.main_conv", half, goal, 1) | conv(f"{csp}.short_conv", half, goal, 1)
        shapes |= conv(f"{csp}.final_conv", goal, goal, 1)
        shapes |= {f"{csp}.attention.fc.weight": (goal, goal, 1, 1), f"{csp}.attention.fc.bias": (goal,)}
        for block in range(blocks):
            shapes |= conv(f"{csp}.blocks.{block}.conv1", half, half, 3)
            shapes |= conv(f"{csp}.blocks.{block}.conv2.depthwise_conv", half, 1, 5)
            shapes |= conv(f"{csp}.blocks.{block}.conv2.pointwise_conv", half, half, 1)
        width = goal
    shapes |= {
        **{"head.final_layer.weight": (17, 384, 7, 7), "head.final_layer.bias": (17,)},
        **{"head.mlp.0.g": (1,), "head.mlp.1.weight": (256, 4)},
        **{"head.gau.gamma": (2, 128), "head.gau.beta": (2, 128), "head.gau.ln.g": (1,)},
        **{"head.gau.uv.weight": (1152, 256), "head.gau.o.weight": (256, 512), "head.gau.res_scale.scale": (256,)},
        **{"head.cls_x.weight": (128, 256), "head.cls_y.weight": (128, 256)},
    }
    return {
        prefix + name: torch.randn(shape) if "num_batches" not in name else torch.tensor(3)
        for name, shape in shapes.items()
    }


COCO: dict[str, Any] = {**FACTS, "geometry": {"num_keypoints": 17}}


def test_a_published_checkpoint_loads(tmp_path: Path) -> None:
    state = names_of_a_published_checkpoint()
    beside = {"data_preprocessor.mean": torch.zeros(3), "data_preprocessor.std": torch.ones(3)}
    torch.save({"meta": {"epoch": 420}, "state_dict": {**state, **beside}}, tmp_path / "rtmpose.pth")
    model = load({"model": "tutelage:rtmpose_t", "weights": str(tmp_path / "rtmpose.pth")}, **COCO)
    own = model.module.state_dict()
    assert set(own) == set(state)
    assert all(torch.equal(own[name], value) for name, value in state.items())


def test_the_second_stage_keeps_the_teachers_backbone() -> None:
    student = names_of_a_published_checkpoint("student.")
    teacher = names_of_a_published_checkpoint("teacher.")
    found = renamed({**student, **teacher})
    assert torch.equal(found["head.cls_x.weight"], student["student.head.cls_x.weight"])
    name = "backbone.stage4.0.conv.weight"
    assert torch.equal(found[name], teacher[f"teacher.{name}"])
    wider = {key: value.repeat(2, *[1] * (value.ndim - 1)) if value.ndim else value for key, value in teacher.items()}
    bridge = {"distill_losses.loss_fea.align.weight": torch.zeros(2, 1, 1, 1)}
    first = renamed({**student, **wider, **bridge})
    assert torch.equal(first[name], student[f"student.{name}"])
    assert not [key for key in first if not key.startswith(("backbone.", "head."))]


def test_a_backbone_alone_is_taken(tmp_path: Path) -> None:
    state = names_of_a_published_checkpoint()
    torch.save({"state_dict": state}, tmp_path / "other.pth")
    model = load({"model": "tutelage:rtmpose_t", "backbone": str(tmp_path / "other.pth")}, **FACTS)
    name = "backbone.stage2.1.main_conv.conv.weight"
    assert torch.equal(model.module.state_dict()[name], state[name])
    with pytest.raises(UserError, match="are for 17 keypoints, and the data has 5; `backbone: FILE`"):
        load({"model": "tutelage:rtmpose_t", "weights": str(tmp_path / "other.pth")}, **FACTS)


def test_roles_are_there_and_a_record_builds_it_again() -> None:
    model = load(TINY, **FACTS, seed=0)
    assert {"stem", "stages[0]", "stages[3]", "map", "logits.x", "logits.y"} <= set(model.roles)
    again = rebuild(model.source, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(model.module.parameters(), again.module.parameters(), strict=True))
    x, y = model(torch.zeros(2, 3, 64, 64))
    assert x.shape == y.shape == (2, 5, 128)


@pytest.mark.parametrize(("name", "stages"), [("resnet18", 5), ("convnext_atto", 4), ("efficientnet_b0", 5)])
def test_a_backbone_of_timm_carries_the_head(name: str, stages: int) -> None:
    model = load(f"timm:{name}", **FACTS, seed=0)
    assert isinstance(model.module, RTMPose)
    assert f"stages[{stages - 1}]" in model.roles
    assert f"stages[{stages}]" not in model.roles
    assert model(torch.zeros(1, 3, 64, 64))[0].shape == (1, 5, 128)


def test_maps_with_channels_last_are_turned() -> None:
    model = load({"model": "timm:swin_tiny_patch4_window7_224", "img_size": [64, 64]}, **FACTS, seed=0)
    assert isinstance(model.module, RTMPose)
    assert model.module.head.final_layer.in_channels == 768


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("tutelage:rtmpose_q", "unknown pose model 'tutelage:rtmpose_q'; did you mean rtmpose_"),
        ("timm:resnet1888", "unknown model 'timm:resnet1888'; did you mean resnet"),
        ({"model": "tutelage:rtmpose_t", "wide": 2}, "tutelage:rtmpose_t: .*wide"),
        ({"model": "tutelage:rtmpose_t", "weights": "pretrained"}, "comes without weights"),
        ({"model": "tutelage:onnx", "file": "nothing.onnx"}, "no file 'nothing.onnx'"),
        ("torchvision:resnet18", "is no pose model"),
    ],
)
def test_what_cannot_be_had_is_named(spec: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load(spec, **FACTS)


def test_three_stages_keep_more_positions_of_small_crops() -> None:
    model = load({**TINY, "stages": 3}, **FACTS, seed=0)
    assert isinstance(model.module, RTMPose)
    assert model.module.head.mlp[1].weight.shape == (256, 4 * 4)
    assert "stages[2]" in model.roles
    assert "stages[3]" not in model.roles
    assert model.outputs.names == ("simcc_x", "simcc_y")
