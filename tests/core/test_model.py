# SPDX-License-Identifier: Apache-2.0
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from core.networks import Small, Twice, images
from tutelage.core import InputSpec, Model, Tap
from tutelage.core.error import UserError

STAGES = {"stages[0]": Tap("conv"), "stages[1]": Tap("mix", key=0), "stages[1].pre": Tap("bn", side="input")}


def test_a_long_row_of_roles_is_shown_by_its_ends() -> None:
    roles = {f"{kind}[{number}]": Tap("mix") for number in range(12) for kind in ("blocks", "q")}
    given = Model(Small(), roles={**roles, "tokens": Tap("mix")})
    with pytest.raises(UserError) as error:
        given.resolve(Tap("map"))
    assert str(error.value) == (
        "Small has no role 'map'; its roles: blocks[0]...blocks[11], q[0]...q[11], tokens; "
        "where a method takes tokens for a map, name the tap `tokens`"
    )


def model(**words: Any) -> Model:
    return Model(Small().eval(), roles={**STAGES, "map": Tap("mix")}, modules={"classifier": "head"}, **words)


# places


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("stages[0]", Tap("conv")),
        ("stages[-1]", Tap("mix", key=0)),
        ("stages[-2]", Tap("conv")),
        ("stages[-1].pre", Tap("bn", side="input")),
        ("classifier.weight", Tap("head", side="weight")),
        (Tap("stages[1]", key=1, call=2), Tap("mix", key=1, call=2)),
        (Tap("map", part=(0, 2)), Tap("mix", part=(0, 2))),
        (Tap("conv", side="input", layout="nhwc"), Tap("conv", side="input", layout="nhwc")),
        ("", Tap("")),
    ],
    ids=str,
)
def test_a_role_becomes_a_place(asked: Any, found: Tap) -> None:
    assert model().resolve(Tap.parse(asked)) == found


def test_a_module_under_a_second_name_is_found() -> None:
    assert Model(Twice()).resolve(Tap("again", call=0)) == Tap("again", call=0)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("stages[2]", "Small has no role 'stages[2]'; its roles: stages[0], stages[1], stages[1].pre, map"),
        ("stages[-3]", "Small has no role 'stages[-3]'; its roles: stages[0], stages[1], stages[1].pre, map"),
        ("layer4", "no module or role 'layer4' in Small; valid: act, bn, conv, drop, head, map, mix, stages[0], "),
        ("heads", "no module or role 'heads' in Small; did you mean head?"),
        (Tap("map", side="input"), "tap map:input: the role 'map' has its own side and layout; name a module path"),
        (Tap("map", layout="nhwc"), "tap map(nhwc): the role 'map' has its own side and layout"),
        (Tap("map", layout="tokens", prefix=1), "tap map(tokens1): the role 'map' has its own side and layout"),
    ],
    ids=str,
)
def test_a_place_that_is_not_there_is_named(asked: Any, said: str) -> None:
    with pytest.raises(UserError) as error:
        model().resolve(Tap.parse(asked))
    assert str(error.value).startswith(said)


def test_a_model_lends_by_role_or_path() -> None:
    given = model()
    assert given.lend("classifier") is given.lend("head") is given.module.head
    with pytest.raises(UserError) as error:
        given.lend("neck")
    assert str(error.value) == "Small lends no 'neck'; it lends: classifier"


# input


def test_a_bare_module_takes_inputs_as_they_are() -> None:
    network = Small().eval()
    assert Model.of(network).module is network
    given = Model(network)
    assert Model.of(given) is given
    torch.testing.assert_close(given(images()), network(images()))


def test_pixels_are_normalised_as_the_model_wants_them() -> None:
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    given = Model(nn.Identity(), input=InputSpec(mean=mean, std=std, bgr=True))
    pixels = images()
    expected = (pixels.flip(1) - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(given(pixels), expected)
    assert given(pixels.double()).dtype == torch.float64
    assert given(pixels.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(pixels, images())


def test_pixels_are_resized_and_grey_ones_repeated() -> None:
    spec = InputSpec(size=(4, 8))
    grey = images()[:, :1]
    assert torch.equal(spec.prepare(grey, {}), spec.prepare(grey.expand(-1, 3, -1, -1), {}))
    small = spec.prepare(images(), {})
    assert small.shape == (4, 3, 4, 8)
    torch.testing.assert_close(small, F.interpolate(images(), (4, 8), mode="bilinear", antialias=True))
    assert spec.prepare(small, {}) is small
    with pytest.raises(UserError, match="images have 2 channels, the model takes 3"):
        spec.prepare(images()[:, :2], {})


def test_other_inputs_are_left_alone() -> None:
    given = Model(nn.Identity(), input=InputSpec(mean=(0.5,), std=(0.5,)))
    tokens = torch.ones(2, 7)
    assert given(tokens) is tokens
    words = {"ids": tokens}
    assert given(words) is words


def test_a_model_says_how_it_is_called() -> None:
    given = Model(nn.Linear(2, 2), call=lambda module, inputs: module(inputs["x"]) * 0 + 1)
    assert torch.equal(given({"x": torch.zeros(1, 2)}), torch.ones(1, 2))
