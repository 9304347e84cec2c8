# SPDX-License-Identifier: Apache-2.0
import copy
import gc
import pickle
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.networks import CLASSES, Checkpointed, Small, Twice, images, small_batch
from tutelage.core import Live, Model, Tap
from tutelage.core.error import UserError
from tutelage.core.reader import Reader
from tutelage.core.tap import ROLES, Recorder, is_role
from tutelage.tasks.classification import Classification

TASK = Classification(CLASSES)


def recorded(network: nn.Module, tap: Tap, inputs: Any = None) -> Tensor:
    recorder = Recorder(network, {"x": tap})
    with recorder:
        network(images() if inputs is None else inputs)
    return recorder.release()["x"]


def reader(network: nn.Module, **places: str | Tap) -> Reader:
    roles = {role: Tap.parse(place) for role, place in places.items()}
    return Reader(Model(network, roles=roles), [Tap(role) for role in roles], TASK)


# a tap's words


def test_a_tap_is_read_from_a_path_a_mapping_or_a_tap() -> None:
    tap = Tap("layer4.1", side="input", key=0, call=1)
    assert Tap.parse("layer4.1") == Tap("layer4.1")
    assert Tap.parse({"where": "layer4.1", "side": "input", "key": 0, "call": 1}) == tap
    assert Tap.parse(tap) is tap


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"where": "conv", "sid": "input"}, "unknown word 'sid' in a tap; did you mean side?"),
        ({"side": "input"}, "a tap needs `where`: a role or a module path"),
        (
            {"where": "conv", "side": "outputs"},
            "tap 'conv': side 'outputs' is not known; did you mean output?",
        ),
        ({"where": "conv", "layout": "ncwh"}, "tap 'conv': layout 'ncwh' is not known; did you mean nchw?"),
        ({"where": "conv", "layout": "grid"}, "tap 'conv': the layout `grid` goes with `grid: [height, width]`"),
        ({"where": "conv", "grid": [2, 3]}, "tap 'conv': the layout `grid` goes with `grid: [height, width]`"),
    ],
)
def test_a_wrong_word_in_a_tap_is_named(words: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        Tap.parse(words)
    assert str(error.value) == said


def test_taps_that_differ_have_names_that_differ() -> None:
    taps = [
        *(Tap("a"), Tap("b"), Tap("a", side="input"), Tap("a", key=0), Tap("a", key="0"), Tap("a", call=0)),
        *(Tap("a", layout="nhwc"), Tap("a", layout="cls"), Tap("a", layout="tokens")),
        *(Tap("a", layout="tokens", prefix=1), Tap("a", layout="tokens", prefix=2)),
    ]
    assert len({tap.name for tap in taps}) == len(taps)
    assert str(Tap("stages[-1]")) == "stages[-1]"


def test_roles_are_a_fixed_vocabulary() -> None:
    assert all(is_role(role) for role in ROLES)
    assert all(is_role(role) for role in ("stages[0]", "stages[-1].pre", "head.cls[2]", "q[11]"))
    assert not any(is_role(word) for word in ("stage", "stages[]", "stages[a]", "map.0", "layer4", "logits.post", ""))


# what is recorded


@pytest.mark.parametrize(
    ("tap", "expected"),
    [
        (Tap("conv"), lambda n, x: n.conv(x)),
        (Tap("conv", side="input"), lambda n, x: x),
        (Tap("head", side="input"), lambda n, x: n.body(x).mean((2, 3))),
        (Tap(""), lambda n, x: n(x)),
    ],
    ids=["output", "input", "input of the head", "the whole model"],
)
def test_a_tap_holds_what_the_module_takes_or_gives(tap: Tap, expected: Any) -> None:
    network, pixels = Small().eval(), images()
    torch.testing.assert_close(recorded(network, tap, pixels), expected(network, pixels))


class Several(nn.Module):
    """A part that gives several things, called with a keyword."""

    class Part(nn.Module):
        def forward(self, first: Any, *, second: Tensor) -> Any:
            return {"word": "none", "one": first, "pair": (None, second)}

    class Pair(nn.Module):
        def forward(self, first: Any, second: Any = None) -> Any:
            return (None, first + 1, first + 2)

    def __init__(self) -> None:
        super().__init__()
        self.part, self.pair = self.Part(), self.Pair()

    def forward(self, given: Tensor) -> Any:
        found = self.part(given, second=given * 2)
        self.pair(given, second=given * 3)
        self.pair(second=None, first=given)
        return found["one"]


@pytest.mark.parametrize(
    ("tap", "expected"),
    [
        (Tap("part"), 1.0),
        (Tap("part", key="one"), 1.0),
        (Tap("part", side="input"), 1.0),
        (Tap("part", side="input", key="second"), 2.0),
        (Tap("pair", call=0), 2.0),
        (Tap("pair", key=2, call=0), 3.0),
        (Tap("pair", key=-1, call=0), 3.0),
        (Tap("pair", side="input", key="second", call=0), None),
    ],
    ids=str,
)
def test_an_element_is_chosen_by_key(tap: Tap, expected: float | None) -> None:
    if expected is None:  # the second call passes none
        with pytest.raises(UserError, match="met no tensor at key 'second' at the input of 'pair'"):
            recorded(Several(), tap, torch.ones(2, 3))
        return
    assert recorded(Several(), tap, torch.ones(2, 3)).unique().item() == expected


@pytest.mark.parametrize(
    ("tap", "said"),
    [
        (Tap("part", key="pair"), "tap 'x' met tuple, not a tensor, at key 'pair' at the output of 'part'"),
        (Tap("part", key="two"), "tap 'x' met no tensor at key 'two' at the output of 'part'"),
        (Tap("pair", key=7), "tap 'x' met no tensor at key 7 at the output of 'pair'"),
        (Tap("pair", key="one"), "tap 'x' met no tensor at key 'one' at the output of 'pair'"),
        (Tap("part", side="input", key="first"), "met no tensor at key 'first' at the input of 'part'"),
        (Tap("", key=0), "tap 'x' met no tensor at key 0 at the output of ''"),
    ],
    ids=str,
)
def test_an_element_that_is_not_there_is_an_error(tap: Tap, said: str) -> None:
    with pytest.raises(UserError) as error:
        recorded(Several(), tap, torch.ones(2, 3))
    assert said in str(error.value)
    assert str(error.value).endswith(": say which with `key`")


@pytest.mark.parametrize(
    ("tap", "shape", "expected"),
    [
        (Tap("0", layout="nhwc"), (2, 5, 6, 3), (2, 3, 5, 6)),
        (Tap("0", layout="nhwc"), (2, 5, 3), (2, 5, 3)),
        (Tap("0", layout="tokens", prefix=2), (2, 7, 3), (2, 5, 3)),
        (Tap("0", layout="tokens"), (2, 7, 3), (2, 7, 3)),
        (Tap("0", layout="cls"), (2, 7, 3), (2, 3)),
        (Tap("0", layout="grid", prefix=1, grid=(2, 3)), (2, 7, 3), (2, 3, 2, 3)),
        (Tap("0", layout="grid", grid=(2, 3)), (2, 24, 5), (2, 5, 4, 6)),
    ],
)
def test_layouts_are_recorded_as_one(tap: Tap, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert recorded(nn.Sequential(nn.Identity()), tap, torch.zeros(shape)).shape == expected


def test_the_first_tensor_of_nested_lists_is_meant() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Identity()

        def forward(self, given: Tensor) -> Any:
            return self.part([None, [given, given + 1]])

    for side in ("input", "output"):
        assert torch.equal(recorded(Nested(), Tap("part", side), torch.ones(2)), torch.ones(2))


def test_tokens_fill_their_grid_row_by_row() -> None:
    tokens = torch.arange(7.0).view(1, 7, 1)
    found = recorded(nn.Sequential(nn.Identity()), Tap("0", layout="grid", prefix=1, grid=(2, 3)), tokens)
    assert found[0, 0].tolist() == [[1, 2, 3], [4, 5, 6]]


def test_tokens_that_fill_no_grid_are_named() -> None:
    with pytest.raises(UserError, match=r"^tap 0\(grid\): 7 tokens fill no grid of the proportions 2x3$"):
        recorded(nn.Sequential(nn.Identity()), Tap("0", layout="grid", grid=(2, 3)), torch.zeros(1, 7, 1))


def test_a_wrong_path_names_the_nearest_and_leaves_no_hook() -> None:
    network = Small()
    with pytest.raises(UserError) as error:
        Recorder(network, {"a": Tap("conv"), "b": Tap("hed")})
    assert str(error.value) == "no module 'hed' in Small; did you mean head?"
    assert not hooks(network)


def hooks(network: nn.Module) -> list[Any]:
    return [hook for part in network.modules() for hook in (*part._forward_hooks, *part._forward_pre_hooks)]


def test_a_module_that_runs_twice_needs_a_call() -> None:
    network = Twice()
    with pytest.raises(UserError, match=r"tap 'x' \(layer\) ran 2 times in a forward: say which with `call`"):
        recorded(network, Tap("layer"))
    first, second = recorded(network, Tap("layer", call=0)), recorded(network, Tap("again", call=1))
    torch.testing.assert_close(second, network.layer(first))
    with pytest.raises(UserError, match="tap 'x' ran 2 times, there is no call 2"):
        recorded(network, Tap("layer", call=2))


def test_a_module_that_does_not_run_is_an_error() -> None:
    network = Small()
    network.spare = nn.Identity()
    with pytest.raises(UserError, match=r"tap 'x' \(spare\) recorded nothing: the module did not run, or"):
        recorded(network, Tap("spare"))


def test_hooks_record_only_while_armed_and_keep_nothing() -> None:
    network = Small()
    recorder = Recorder(network, {"x": Tap("conv")})
    network(images())
    assert recorder.taken == {}
    with recorder:
        network(images())
    found = weakref.ref(recorder.release()["x"])
    gc.collect()
    assert found() is None
    network(images())
    assert recorder.taken == {}


def test_closing_removes_every_hook() -> None:
    network = Small()
    recorder = Recorder(network, {"x": Tap("conv"), "y": Tap("bn", side="input")})
    assert len(hooks(network)) == 2
    recorder.close()
    assert hooks(network) == []


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_copy_records_for_itself(copied: Any) -> None:
    first = reader(Small().eval(), stem="conv")
    second: Reader = copied(first)
    with torch.no_grad():
        second.model.module.conv.weight.add_(1)  # type: ignore[operator, union-attr]
    before, after = (one(small_batch())["stem"] for one in (first, second))
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, second.model.module.conv(images()))  # type: ignore[operator]
    second.close()
    assert hooks(second.model.module) == []
    assert len(hooks(first.model.module)) == 1


# what later operations do to a recorded tensor


def test_an_overwritten_tap_keeps_its_values_and_is_reported() -> None:
    network = Small().eval()
    tapped = reader(network, stem="conv", **{"stages[0].pre": "bn", "map": "mix"})
    signals = tapped.rehearse(small_batch())
    assert tapped.overwritten == ("stages[0].pre",)
    true = network.bn(network.conv(images()))
    assert (true < 0).any()
    torch.testing.assert_close(signals["stages[0].pre"], true)
    torch.testing.assert_close(tapped(small_batch())["stages[0].pre"], true)
    assert tapped.recorder.cloned == {"stages[0].pre"}


def test_the_input_of_an_in_place_operation_keeps_its_values() -> None:
    network = Small().eval()
    tapped = reader(network, map=Tap("act", side="input"))
    found = tapped.rehearse(small_batch())["map"]
    torch.testing.assert_close(found, network.bn(network.conv(images())))
    assert tapped.overwritten == ("map",)


def test_an_overwritten_tap_is_found_without_gradients_too() -> None:
    live = Live(Model(Small(), roles={"map": Tap("bn")}))
    signals = live.plan([Tap("map")], [], TASK, small_batch())
    assert live.reader is not None
    assert live.reader.overwritten == ("map",)
    assert (signals["map"] < 0).any()


def test_checkpointing_does_not_replace_what_was_recorded() -> None:
    plain, saving = Small(), Checkpointed()
    saving.load_state_dict(plain.state_dict())
    found = []
    for network in (plain, saving):
        tapped = reader(network.eval(), **{"stages[0].pre": "bn", "map": "mix"})
        tapped.rehearse(small_batch())
        signals = tapped(small_batch())
        (signals["map"].square().mean() + signals["stages[0].pre"].mean() + signals.logits.mean()).backward()
        assert tapped.recorder.taken == {}
        found.append((signals, {name: p.grad for name, p in network.named_parameters()}))
    (one, expected), (two, given) = found
    for role in one.taps:
        torch.testing.assert_close(two[role], one[role])
    torch.testing.assert_close(given, expected)


# compiled


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_hooks_set_before_compiling_fire() -> None:
    tapped = reader(Small().eval(), map="mix", stem="conv")
    expected = tapped.rehearse(small_batch())
    tapped.compile(fullgraph=True, backend="eager")
    for role, value in tapped(small_batch()).taps.items():
        torch.testing.assert_close(value, expected[role])


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_hooks_on_a_compiled_model_fire_or_are_missed_aloud(used: bool, in_place: bool) -> None:
    network = Small().eval()
    if in_place:
        network.compile(backend="eager")
    compiled: Any = network if in_place else torch.compile(network, backend="eager")
    if used:
        compiled(images())
    tapped = reader(compiled, map="mix" if in_place else "_orig_mod.mix")
    if used:
        with pytest.raises(UserError, match=r"tap 'map' \(.*mix\) recorded nothing: .* was compiled before"):
            tapped.rehearse(small_batch())
    else:
        torch.testing.assert_close(tapped.rehearse(small_batch())["map"], network.body(images()))


SIBLINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no hook": ({}, {"map": "mix"}),
    "fewer hooks": ({"stem": "conv"}, {"stem": "conv", "map": "mix"}),
    "more hooks": ({"stem": "conv", "map": "mix"}, {"stem": "conv"}),
    "another place": ({"map": "conv"}, {"map": "mix"}),
    "places exchanged": ({"map": "conv", "stem": "mix"}, {"map": "mix", "stem": "conv"}),
    "another side": ({"map": "mix"}, {"map": Tap("mix", side="input")}),
    "another layout": ({"map": "mix"}, {"map": Tap("mix", layout="nhwc")}),
    "no clone": ({"map": "conv"}, {"map": "bn"}),
}


@pytest.mark.parametrize(("first", "second"), SIBLINGS.values(), ids=list(SIBLINGS))
def test_a_compiled_sibling_does_not_silence_the_hooks(first: dict[str, Any], second: dict[str, Any]) -> None:
    for places in (first, second):
        tapped = reader(Small().eval(), **places)
        expected = tapped.rehearse(small_batch())
        tapped.compile(fullgraph=True, backend="eager")
        given = tapped(small_batch())
        assert set(given.taps) == {*places, "logits"}
        for role, value in given.taps.items():
            torch.testing.assert_close(value, expected[role])


@pytest.mark.slow  # under torch 2.15 it has run for minutes after other compiled tests of one process
def test_as_many_models_as_one_likes_are_compiled() -> None:
    for depth in range(1, 1 + torch._dynamo.config.recompile_limit + 1):
        tapped = reader(nn.Sequential(nn.Flatten(), *(nn.Linear(108, 108) for _ in range(depth))), map="1")
        expected = tapped.rehearse(small_batch())["map"]
        tapped.compile(fullgraph=True, backend="eager")
        torch.testing.assert_close(tapped(small_batch())["map"], expected)


def test_a_sibling_compiled_by_the_user_is_missed_aloud() -> None:
    """The user compiles models himself: the hooks of the second are lost, and that is an error."""
    torch.compile(Small().eval(), backend="eager")(images())
    network = Small().eval()
    tapped = reader(network, map="mix")
    network.compile(backend="eager")
    with pytest.raises(UserError, match=r"compile with distiller\.compile\(\)"):
        tapped.rehearse(small_batch())
