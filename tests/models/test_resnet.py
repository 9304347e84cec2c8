# SPDX-License-Identifier: Apache-2.0
import re

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tutelage.core.error import UserError
from tutelage.models.networks.resnet import ARCHITECTURES, Pad, ResNet


def count(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


# counts that the authors of the shared weights and of CRD state for CIFAR-10 and CIFAR-100
@pytest.mark.parametrize(
    ("name", "num_classes", "parameters"),
    [
        ("resnet20", 10, 269_722),
        ("resnet32", 10, 464_154),
        ("resnet44", 10, 658_586),
        ("resnet56", 10, 853_018),
        ("resnet110", 10, 1_727_962),
        ("resnet8x4", 100, 1_233_540),
        ("resnet32x4", 100, 7_433_860),
    ],
)
def test_parameters_are_as_published(name: str, num_classes: int, parameters: int) -> None:
    with torch.device("meta"):
        assert count(ARCHITECTURES[name](num_classes=num_classes)) == parameters


def test_depth_counts_weighted_layers() -> None:
    for name, make in ARCHITECTURES.items():
        with torch.device("meta"):
            network = make(shortcut="A")
        layers = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
        three = [m for m in layers if not (isinstance(m, torch.nn.Conv2d) and m.kernel_size == (1, 1))]
        assert len(three) == int(name.removeprefix("resnet").removesuffix("x4"))


def test_keys_are_those_of_the_shared_weights() -> None:
    keys = set(ResNet(20).state_dict())
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {"conv1.weight", "linear.weight", "linear.bias", *(f"bn1.{part}" for part in norm)}
    for stage in (1, 2, 3):
        for block in range(3):
            for half in (1, 2):
                place = f"layer{stage}.{block}"
                expected |= {f"{place}.conv{half}.weight", *(f"{place}.bn{half}.{part}" for part in norm)}
    assert keys == expected


def plain_forward(state: dict[str, Tensor], x: Tensor, blocks: int) -> Tensor:
    """The paper's network from its weights alone, option A, batch norm in evaluation."""

    def norm(name: str, x: Tensor) -> Tensor:
        mean, variance = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        scale = state[f"{name}.weight"] / (variance + 1e-5).sqrt()
        return (x - mean[:, None, None]) * scale[:, None, None] + state[f"{name}.bias"][:, None, None]

    x = norm("bn1", F.conv2d(x, state["conv1.weight"], padding=1)).clamp(min=0)
    for stage in (1, 2, 3):
        for block in range(blocks):
            place, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = F.conv2d(x, state[f"{place}.conv1.weight"], padding=1, stride=stride)
            y = F.conv2d(norm(f"{place}.bn1", y).clamp(min=0), state[f"{place}.conv2.weight"], padding=1)
            if stride == 2:
                around = torch.zeros(len(x), x.shape[1] // 2, *y.shape[2:], dtype=x.dtype)
                x = torch.cat([around, x[:, :, ::2, ::2], around], dim=1)
            x = (norm(f"{place}.bn2", y) + x).clamp(min=0)
    return x.mean((2, 3)) @ state["linear.weight"].T + state["linear.bias"]


@pytest.mark.parametrize(("depth", "blocks"), [(8, 1), (20, 3)])
@pytest.mark.parametrize("size", [8, 9, 32])
def test_the_forward_is_the_papers(depth: int, blocks: int, size: int) -> None:
    torch.manual_seed(0)
    network = ResNet(depth).double().eval()
    for name, buffer in network.named_buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5) if "var" in name else buffer.normal_()
    images = torch.rand(2, 3, size, size, dtype=torch.float64)
    assert torch.allclose(network(images), plain_forward(network.state_dict(), images, blocks), atol=1e-10)


def test_option_b_projects_where_shapes_change() -> None:
    network = ResNet(14, shortcut="B")
    projected = {key.split(".shortcut")[0] for key in network.state_dict() if "shortcut" in key}
    assert projected == {"layer2.0", "layer3.0"}
    # the stem of the wide ones is narrower than their first stage
    wide = ARCHITECTURES["resnet8x4"]()
    assert {key.split(".shortcut")[0] for key in wide.state_dict() if "shortcut" in key} == {
        "layer1.0",
        "layer2.0",
        "layer3.0",
    }


@pytest.mark.parametrize("width", [0.25, 0.3, 2.0])
def test_width_scales_every_stage(width: float) -> None:
    network = ResNet(8, width=width, in_channels=1, num_classes=7)
    widths = [network.conv1.out_channels, *(network.get_submodule(f"layer{n}.0.conv2").out_channels for n in (1, 2, 3))]
    assert widths == [max(1, round(c * width)) for c in (16, 16, 32, 64)]
    assert network(torch.rand(2, 1, 8, 8)).shape == (2, 7)


def test_pad_keeps_channels_in_the_middle() -> None:
    x = torch.rand(1, 3, 5, 4)
    y = Pad(8, 2)(x)
    assert y.shape == (1, 8, 3, 2)
    assert torch.equal(y[:, 2:5], x[:, :, ::2, ::2])
    assert (y[:, [0, 1, 5, 6, 7]] == 0).all()


@pytest.mark.parametrize("depth", [7, 18, 2, 0])
def test_other_depths_are_refused(depth: int) -> None:
    expected = f"a CIFAR ResNet has 6n + 2 layers (8, 14, 20, 26, 32, ...), not {depth}"
    with pytest.raises(UserError, match=f"^{re.escape(expected)}$"):
        ResNet(depth)


def test_other_shortcuts_are_refused() -> None:
    with pytest.raises(UserError, match=r"^shortcut 'C' is not known; valid: A, B$"):
        ResNet(8, shortcut="C")  # type: ignore[arg-type]
