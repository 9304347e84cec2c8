# SPDX-License-Identifier: Apache-2.0
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

from models.readings import noise, readings, stages
from tutelage.core import Model
from tutelage.models.networks.resnet import ResNet
from tutelage.models.roles import Roles, find, logits_of


@pytest.fixture(autouse=True)
def same_weights() -> None:
    torch.manual_seed(0)


def places(found: Roles) -> dict[str, str]:
    return {role: tap.name for role, tap in found.taps.items()}


class Block(nn.Module):
    """A residual block that uses one activation twice."""

    def __init__(self, inputs: int, outputs: int, stride: int, inplace: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 1)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride, 1)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.skip = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
        self.act = nn.ReLU(inplace)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        return self.act(y + self.skip(x))  # type: ignore[no-any-return]


def residual(inplace: bool = False) -> nn.Sequential:
    parts: dict[str, nn.Module] = {
        "conv": nn.Conv2d(3, 4, 3, 2, 1),
        "relu": nn.ReLU(inplace),
        "one": nn.Sequential(Block(4, 4, 1, inplace), Block(4, 4, 1, inplace)),
        "two": nn.Sequential(Block(4, 6, 2, inplace), Block(6, 6, 1, inplace)),
        "pool": nn.AdaptiveAvgPool2d(1),
        "flat": nn.Flatten(),
        "drop": nn.Dropout(0.5),
        "head": nn.Linear(6, 5),
    }
    return nn.Sequential(OrderedDict(parts))


@pytest.mark.parametrize("inplace", [False, True])
def test_roles_of_a_residual_network(inplace: bool) -> None:
    found = find(residual(inplace), noise(32))
    assert places(found) == {
        "pooled": "head:input",
        "map": "two",
        "stages[0]": "one",
        "stages[0].pre": "one.1.act:input#1",
        "stages[1]": "two",
        "stages[1].pre": "two.1.act:input#1",
        "stem": "one:input",
    }
    assert found.modules == {"classifier": "head", "stages[0].norm": "one.1.bn2", "stages[1].norm": "two.1.bn2"}


@pytest.mark.parametrize("inplace", [False, True])
def test_readings_agree_with_each_other(inplace: bool) -> None:
    network = residual(inplace)
    found = find(network, noise(32))
    taps, output = readings(Model(network, found.taps, found.modules), noise(32))
    assert torch.equal(taps["map"], taps["stages[1]"])
    for number in (0, 1):
        assert torch.equal(taps[f"stages[{number}].pre"].relu(), taps[f"stages[{number}]"])
        assert (taps[f"stages[{number}].pre"] < 0).any()
    assert torch.allclose(taps["map"].mean((2, 3)), taps["pooled"], atol=1e-6)
    assert torch.equal(network.get_submodule("head")(taps["pooled"]), output)


def test_a_block_that_changes_the_resolution_belongs_to_the_new_one() -> None:
    """Its first convolution still works at the old resolution, and is the last to do so."""
    found = find(residual(), noise(32))
    assert found.taps["stages[0]"].where == "one"


def test_wrappers_are_looked_into() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            body = residual()
            self.backbone = nn.Sequential(nn.Sequential(*list(body)[:4]))
            self.rest = nn.Sequential(*list(body)[4:])

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"aux": x, "logits": self.rest(self.backbone(x))}

    found = find(Wrapped(), noise(32))
    assert places(found)["stages[0]"] == "backbone.0.2"
    assert places(found)["map"] == "backbone.0.3"
    assert found.modules["classifier"] == "rest.3"


def test_a_plain_network_with_functions_between_its_layers() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
            self.pool = nn.MaxPool2d(2)
            self.head = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.pool(self.one(x).relu())
            return self.head(self.pool(self.two(x).relu()).mean((2, 3)))  # type: ignore[no-any-return]

    network = Plain()
    found = find(network, noise(16))
    assert places(found) == {
        "pooled": "head:input",
        "map": "pool#1",
        "stages[0]": "one",
        "stages[1]": "two",
        "stages[2]": "pool#1",
    }
    taps, _ = readings(Model(network, found.taps), noise(16))
    assert [taps[f"stages[{n}]"].shape[1:] for n in range(3)] == [(4, 16, 16), (6, 8, 8), (6, 4, 4)]


def test_a_network_that_ends_in_one_pixel() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 5))
    assert places(find(network, noise(4)))["map"] == "1"


def test_a_convolution_may_classify() -> None:
    body = (nn.Conv2d(3, 4, 3), nn.ReLU())
    late = nn.Sequential(*body, nn.Conv2d(4, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    found = find(late, noise(8))
    assert found.modules["classifier"] == "2"
    assert places(found)["map"] == "1"
    assert "pooled" not in found.taps


def test_a_convolution_may_classify_a_pooled_map() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 5, 1), nn.Flatten())
    found = find(network, noise(8))
    taps, output = readings(Model(network, found.taps), noise(8))
    assert taps["pooled"].shape == (2, 4)
    assert torch.equal(network[3](taps["pooled"][:, :, None, None]).flatten(1), output)
    assert places(found)["map"] == "1"


def test_the_last_layer_of_that_many_outputs_classifies() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 5))
    found = find(network, noise(2))
    assert found.modules == {"classifier": "3"}
    assert places(found) == {"pooled": "3:input"}


def test_a_known_classifier_is_taken() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.other = nn.Linear(3, 5), nn.Linear(3, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = x.mean((2, 3))
            return (self.head(x) + self.other(x)) / 2  # type: ignore[no-any-return]

    assert find(Two(), noise(4)).modules["classifier"] == "other"
    assert find(Two(), noise(4), classifier="head").modules["classifier"] == "head"
    assert find(Two(), noise(4), classifier="no").modules["classifier"] == "other"


class Last(nn.Module):
    """Maps whose channels are the last dimension, halved once."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, 2, 2)
        self.one = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
        self.down = nn.Linear(4 * width, width)
        self.two = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(self.embed(x).permute(0, 2, 3, 1))
        x = torch.cat([x[:, ::2, ::2], x[:, 1::2, ::2], x[:, ::2, 1::2], x[:, 1::2, 1::2]], dim=3)
        return self.head(self.two(self.down(x)).mean((1, 2)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("width", [6, 8, 16])  # 16: a cube, where shapes say nothing
def test_maps_with_channels_last_are_turned(width: int) -> None:
    network = Last(width)
    found = find(network, noise(32))
    assert places(found)["stages[0]"] == "one(nhwc)"
    assert places(found)["map"] == "two(nhwc)"
    taps, _ = readings(Model(network, found.taps), noise(32))
    assert taps["stages[0]"].shape == (2, width, 16, 16)
    assert taps["map"].shape == (2, width, 8, 8)


@pytest.mark.parametrize("channels", [8, 16, 32])
def test_a_cube_of_convolutions_has_its_channels_first(channels: int) -> None:
    network = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert find(network, noise(channels)).taps["map"].layout == "nchw"


def test_images_need_not_be_square() -> None:
    network = Last(6)
    taps = find(network, torch.rand(1, 3, 32, 48)).taps
    assert taps["map"].layout == "nhwc"
    square = find(residual(), torch.rand(1, 3, 32, 48)).taps
    assert square["map"].layout == "nchw"
    assert square["stages[0]"].where == "one"


class Tokens(nn.Module):
    """A transformer of patches, with a count of prefix tokens."""

    def __init__(self, prefix: int, *, norm: bool = True, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, 4, 4)
        self.flat = nn.Flatten(2)
        self.prefix = nn.Parameter(torch.randn(1, prefix, width))
        layers = [nn.TransformerEncoderLayer(width, 2, 16, batch_first=True, norm_first=True) for _ in range(3)]
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.flat(self.embed(x)).transpose(1, 2)
        x = torch.cat([self.prefix.expand(len(x), -1, -1), x], dim=1)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_roles_of_a_transformer(prefix: int) -> None:
    network = Tokens(prefix)
    found = find(network, noise(16))
    names = [f"blocks[{number}]" for number in range(3)] + (["cls[0]", "cls[1]", "cls[2]"] if prefix else [])
    assert set(found.taps) == {"pooled", "tokens", *names}
    taps, _ = readings(Model(network, found.taps), noise(16))
    for role in ("blocks[0]", "blocks[2]", "tokens"):
        assert taps[role].shape == (2, 16, 8)
    assert torch.allclose(network.norm(taps["blocks[2]"]), taps["tokens"], atol=1e-5)
    if prefix:
        assert taps["cls[1]"].shape == (2, 8)


def test_class_attention_may_follow_the_blocks() -> None:
    class Classed(Tokens):
        def __init__(self, following: int) -> None:
            super().__init__(0)
            layers = [nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True) for _ in range(following)]
            self.classed = nn.ModuleList(layers)
            self.token = nn.Parameter(torch.zeros(1, 1, 8))

        def forward(self, x: Tensor) -> Tensor:
            x = self.flat(self.embed(x)).transpose(1, 2)
            for layer in self.layers:
                x = layer(x)
            x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
            for layer in self.classed:
                x = layer(x)
            return self.head(self.norm(x)[:, 0])  # type: ignore[no-any-return]

    found = find(Classed(2), noise(16)).taps
    assert found["blocks[2]"].where == "layers.2"
    assert found["tokens"].prefix == 0
    assert "blocks[3]" not in found
    assert find(Classed(2), noise(16), prefix=1).taps["tokens"].prefix == 0  # its token joins after the blocks
    longer = find(Classed(5), noise(16)).taps  # no row of blocks that the others follow
    assert "blocks[0]" not in longer
    assert (longer["tokens"].where, longer["tokens"].prefix) == ("norm", 1)


def test_prefix_tokens_may_join_on_the_way() -> None:
    class Late(Tokens):
        def forward(self, x: Tensor) -> Tensor:
            x = self.flat(self.embed(x)).transpose(1, 2)
            x = self.layers[1](self.layers[0](x))
            x = self.layers[2](torch.cat([self.prefix.expand(len(x), -1, -1), x], dim=1))
            return self.head(self.norm(x)[:, 0])  # type: ignore[no-any-return]

    network = Late(1)
    found = find(network, noise(16), prefix=1).taps
    assert [found[f"blocks[{number}]"].prefix for number in range(3)] == [0, 0, 1]
    assert [role for role in found if role.startswith("cls")] == ["cls[2]"]
    taps, _ = readings(Model(network, found), noise(16))
    assert {taps[f"blocks[{number}]"].shape for number in range(3)} == {taps["tokens"].shape} == {(2, 16, 8)}


class Pyramid(nn.Module):
    """Tokens on a grid, and on one of half the side."""

    def __init__(self, prefix: int = 0) -> None:
        super().__init__()
        self.embed, self.down = nn.Conv2d(3, 6, 4, 4), nn.Conv2d(6, 8, 2, 2)
        self.one, self.two = (nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width)) for width in (6, 8))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)
        self.prefix = nn.Parameter(torch.randn(1, prefix, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(self.embed(x).flatten(2).transpose(1, 2))
        rows = round((x.shape[1] * 2 / 3) ** 0.5)
        x = self.down(x.transpose(1, 2).unflatten(2, (rows, -1))).flatten(2).transpose(1, 2)
        x = self.norm(self.two(torch.cat([self.prefix.expand(len(x), -1, -1), x], dim=1)))
        return self.head(x.mean(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("prefix", [0, 1])
def test_tokens_on_coarser_grids_are_maps(prefix: int) -> None:
    network = Pyramid(prefix)
    images = torch.rand(2, 3, 32, 48)  # no square
    found = find(network, images)
    assert places(found) == {
        "pooled": "head:input",
        "map": f"norm(grid{prefix or ''})",
        "tokens": f"norm(tokens{prefix or ''})",
        "stages[0]": "one(grid)",
        "stages[1]": f"norm(grid{prefix or ''})",
        "stem": "one:input(grid)",
    }
    model = Model(network, found.taps)
    taps, _ = readings(model, noise(48)[:, :, :32])
    assert taps["stem"].shape == taps["stages[0]"].shape == (2, 6, 8, 12)
    assert taps["map"].shape == (2, 8, 4, 6)
    assert torch.equal(taps["map"].flatten(2).transpose(1, 2), taps["tokens"])
    with torch.no_grad():
        first = network.one[1](network.one[0](network.embed(noise(48)[:, :, :32]).permute(0, 2, 3, 1)))
    assert torch.allclose(taps["stages[0]"], first.permute(0, 3, 1, 2), atol=1e-6)


def test_tokens_in_another_order_than_the_images_are_no_stages() -> None:
    class HieraLike(Pyramid):
        pass

    assert set(find(HieraLike(), torch.rand(1, 3, 32, 48)).taps) == {"pooled", "map", "tokens"}


def test_a_known_prefix_is_taken() -> None:
    assert find(Tokens(9), noise(16)).taps["tokens"].prefix == 0  # 25 tokens look like a square
    assert find(Tokens(9), noise(16), prefix=9).taps["tokens"].prefix == 9


def test_tokens_without_a_norm_are_the_last_blocks() -> None:
    assert find(Tokens(1, norm=False), noise(16)).taps["tokens"].where == "layers.2"


def test_of_a_norm_that_runs_after_every_block_the_last_call_is_the_tokens() -> None:
    class Normed(Tokens):
        def forward(self, x: Tensor) -> Tensor:
            x = self.flat(self.embed(x)).transpose(1, 2)
            kept = [x := layer(x) for layer in self.layers]
            return self.head(sum(self.norm(one).mean(1) for one in kept))  # type: ignore[no-any-return]

    network = Normed(0)
    found = find(network, noise(16)).taps
    assert (found["tokens"].where, found["tokens"].call) == ("norm", 2)
    taps, _ = readings(Model(network, found), noise(16))
    assert torch.allclose(network.norm(taps["blocks[2]"]), taps["tokens"], atol=1e-6)


def test_a_padding_is_no_stage() -> None:
    convolutions = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 5, 3, 2), nn.AdaptiveAvgPool2d(1)
    network = nn.Sequential(convolutions[0], nn.ConstantPad2d(1, 0.0), *convolutions[1:], nn.Flatten(), nn.Linear(5, 5))
    assert [tap.where for role, tap in find(network, noise(16)).taps.items() if role.startswith("stages")] == ["0", "2"]


def test_a_network_of_neither_maps_nor_tokens_has_a_classifier_only() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 5))
    assert places(find(network, noise(4))) == {"pooled": "3:input"}


def test_maps_that_tokens_follow_are_not_what_the_model_ends_in() -> None:
    class Hierarchical(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv2d(3, 8, 4, 4)
            self.one = nn.Sequential(nn.Linear(8, 8))
            self.two = nn.Sequential(nn.Linear(16, 6))
            self.head = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.one(self.embed(x).flatten(2).transpose(1, 2))
            return self.head(self.two(x.reshape(len(x), -1, 16)).mean(1))  # type: ignore[no-any-return]

    assert set(find(Hierarchical(), noise(16)).taps) == {"pooled"}


def test_small_digits_have_three_stages() -> None:
    network = ResNet(8, in_channels=1)
    found = find(network, torch.zeros(1, 1, 8, 8))
    model = Model(network, found.taps)
    assert stages(model) == ["stages[0]", "stages[1]", "stages[2]"]
    taps, _ = readings(model, noise(8, channels=1))
    assert [taps[role].shape[-1] for role in stages(model)] == [8, 4, 2]
    assert taps["stem"].shape == (2, 16, 8, 8)


def test_logits_of_any_output() -> None:
    x, y = torch.zeros(1), torch.ones(1)

    class Record:
        logits = x

    assert logits_of(x) is x
    assert logits_of((x, y)) is x
    assert logits_of({"loss": y, "logits": x}) is x
    assert logits_of(Record()) is x
    assert logits_of({"loss": y}) is None
    assert logits_of(()) is None
