# SPDX-License-Identifier: Apache-2.0
"""Where the tensors that methods speak of lie in a model, read from one traced forward."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor, nn

from tutelage.core.tap import Tap
from tutelage.models.attention import projections
from tutelage.models.trace import Call, trace

PREFIXES = 16  # class and register tokens there may be
#: Networks whose tokens lie in another order than the image's until their last stage.
SHUFFLED = ("Hiera",)
Side = Literal["output", "input"]
ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Hardswish, nn.Hardtanh, nn.Softplus, nn.Tanh, nn.Sigmoid),
)


@dataclass(frozen=True)
class Roles:
    """Places of a model.

    Args:
        taps: tensors by role.
        modules: paths of modules by role.
    """

    taps: Mapping[str, Tap] = field(default_factory=dict)
    modules: Mapping[str, str] = field(default_factory=dict)


def find(
    module: nn.Module,
    images: Tensor,
    *,
    call: Callable[[nn.Module, Any], Any] | None = None,
    prefix: int | None = None,
    classifier: str | None = None,
    stages: Sequence[str] = (),
    channels_last: bool = False,
) -> Roles:
    """Return the roles of an image classifier, from one forward in evaluation mode without gradient.

    - `classifier`: the last linear layer or 1x1 convolution whose outputs are the logits; `pooled`: its input
    - `map`: the last map of more than one pixel; `stages[i]`: the last map at each resolution, where a block
      that changes the resolution belongs to the new one as a whole; `stages[i].pre`: the input of the
      activation that ends stage i, if one does; `stages[i].norm`: the batch norm before it; `stem`: what the
      first block takes. Tokens on ever coarser grids of the image's proportions are maps too
    - `blocks[i]`: tokens after each of a row of modules that keep the shape `[B, L, D]`, prefix tokens left
      out; `tokens`: the same after the norm that follows; `cls[i]`: the first prefix token of each block;
      `q[i]`, `k[i]`, `v[i]`: of all its tokens, heads side by side; `patch_embed[0]`: what the first block's
      tokens are made from

    A role that the model has not, or that the trace does not show beyond doubt, is left out.

    Args:
        module: the model.
        images: `[B, C, H, W]`, large enough that the last map has several pixels.
        call: how the module is called, where `module(images)` is not enough.
        prefix: number of class and register tokens, if known; else the count that makes the rest a square.
        classifier: path of the layer that gives the logits, if known.
        stages: paths of the modules that end a stage, if known.
        channels_last: of maps that are cubes, whose shape does not say.
    """
    root, output = trace(module, lambda: call(module, images) if call else module(images))
    logits = logits_of(output)
    taps: dict[str, Tap] = {}
    modules: dict[str, str] = {}
    known = _called(root, classifier)
    head = _classifier(root, logits) if known is None or isinstance(known.module, nn.Identity) else known
    before = _calls_before(root, head)
    if head is not None:
        modules["classifier"] = head.path
        if head.taken is not None and head.taken.ndim == 2:
            taps["pooled"] = Tap(head.path, "input")
        elif head.taken is not None and head.taken.ndim == 4 and head.taken.shape[2:].numel() == 1:
            taps["pooled"] = Tap(head.path, "input", layout="flat")
        elif head.taken is not None and head.taken.ndim == 3 and _pools_by_attention(module, head):
            taps["pooled"] = Tap(head.path, "input", layout="cls")
    taps |= _tokens(root, images, before, prefix)
    if "tokens" not in taps and images.ndim == 4:
        sight = Sight(images, _channels_last_calls(root, channels_last))
        taps |= _maps(root, sight, before, stages) or _maps(root, replace(sight, grids=True), before, stages)
    return Roles(taps, {**modules, **_norms(root, taps)})


def logits_of(output: Any) -> Tensor | None:
    """Return the scores in an output: a tensor, a field `logits`, or the first of several."""
    if isinstance(output, Tensor):
        return output
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("logits")
    if found is None and isinstance(output, (tuple, list)) and output:
        found = output[0]
    return found if isinstance(found, Tensor) else None


def _called(root: Call, path: str | None) -> Call | None:
    """Return the last call of a module."""
    calls = [call for call in root.walk() if call.path == path]
    return calls[-1] if calls else None


def _pools_by_attention(module: nn.Module, head: Call) -> bool:
    """Whether a layer projects what an attention pooling sees everywhere, to keep the first place alone."""
    return "AttentionPool" in type(module.get_submodule(head.path.rpartition(".")[0])).__name__


def _classifier(root: Call, logits: Tensor | None) -> Call | None:
    if logits is None or logits.ndim != 2:
        return None
    found = None
    for call in root.walk():
        part, given = call.module, call.given
        if not call.path or given is None or call.inner:
            continue
        linear = isinstance(part, nn.Linear) and given.ndim == 2 and given.shape[-1] == logits.shape[1]
        pointwise = isinstance(part, nn.Conv2d) and part.kernel_size == (1, 1) and given.shape[1] == logits.shape[1]
        if linear or pointwise:
            found = call
    return found


def _calls_before(root: Call, head: Call | None) -> list[Call]:
    """Return the calls that ended before the classifier began."""
    calls = []
    for call in root.walk():
        if call is head:
            break
        calls.append(call)
    return calls


# --- maps ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lay:
    """How a tensor covers the image.

    Args:
        size: (height, width).
        layout: of a map, or `grid` for tokens.
        prefix: number of prefix tokens.
    """

    size: tuple[int, int]
    layout: Literal["nchw", "nhwc", "grid"]
    prefix: int = 0


@dataclass(frozen=True)
class Sight:
    """What is taken for a map.

    Args:
        image: the input.
        last: ids of maps that layers over the last dimension take or give.
        grids: tokens on a grid of the image's proportions count as well.
    """

    image: Tensor
    last: set[int]
    grids: bool = False

    def of(self, tensor: Tensor | None) -> Lay | None:
        """Return how a tensor covers the image, or None if it does not."""
        if tensor is not None and tensor.ndim == 4:
            return self._map(tensor)
        if self.grids and tensor is not None and tensor.ndim == 3 and len(tensor) == len(self.image):
            return self._tokens(tensor.shape[1])
        return None

    def _map(self, tensor: Tensor) -> Lay:
        _, a, b, c = tensor.shape
        height, width = self.image.shape[-2:]
        as_first, as_last = b * width == c * height, a * width == b * height
        channels_last = id(tensor) in self.last if as_first == as_last else as_last
        return Lay((a, b), "nhwc") if channels_last else Lay((b, c), "nchw")

    def _tokens(self, length: int) -> Lay | None:
        for prefix in (0, 1):
            rows = _rows(length - prefix, self.image)
            if rows is not None and length - prefix > 1:
                return Lay((rows, (length - prefix) // rows), "grid", prefix)
        return None


def _rows(cells: int, image: Tensor) -> int | None:
    """Return the height of a grid of so many cells in the image's proportions, or None if there is none."""
    height, width = image.shape[-2:]
    rows = math.isqrt(max(cells, 0) * height // width)
    return rows if rows and cells % rows == 0 and rows * width == cells // rows * height else None


@dataclass(frozen=True)
class Unit:
    """A module that gives a map, and is not looked into further."""

    call: Call
    lay: Lay


def _maps(root: Call, sight: Sight, calls: list[Call], stages: Sequence[str]) -> dict[str, Tap]:
    before = set(map(id, calls))
    chain = [unit for inner in root.inner for unit in _chain(inner, sight)]
    units = [unit for unit in chain if id(unit.call) in before]
    # an identity adds no name, and a padding, or a pooling that keeps the size, no knowledge
    units = [unit for unit in units if not _adds_nothing(unit.call)]
    units = [unit for unit in units if math.prod(unit.lay.size) > 1] or units[-1:]
    if not units:
        return {}
    if any(_is_sequence(call) and sight.of(call.given) is None for call in calls[calls.index(units[-1].call) :]):
        return {}  # what follows the maps works on tokens: they are not what the model ends in
    counts: dict[str, int] = {}
    for call in root.walk():
        counts[call.path] = max(counts.get(call.path, 0), call.number + 1)

    def tap(call: Call, side: Side, lay: Lay) -> Tap:
        number = call.number if counts[call.path] > 1 else None
        grid = lay.size if lay.layout == "grid" else None
        return Tap(call.path, side, call=number, layout=lay.layout, prefix=lay.prefix, grid=grid)

    end = units[-1]
    taps = {"map": tap(end.call, "output", end.lay)}
    if end.lay.layout == "grid":
        taps["tokens"] = replace(taps["map"], layout="tokens", grid=None)
        if any(type(part).__name__.startswith(SHUFFLED) for part in root.module.modules()):
            return taps
    for number, unit in enumerate(_named(root, sight, stages) or _ends(units)):
        taps[f"stages[{number}]"] = tap(unit.call, "output", unit.lay)
        activation = _ending_activation(unit.call)
        if activation is not None:
            taps[f"stages[{number}].pre"] = tap(activation, "input", unit.lay)
    first = next((unit for unit in units if _is_block(unit.call) and unit.call.taken is not sight.image), None)
    taken = sight.of(first.call.taken) if first is not None else None
    if first is not None and taken is not None:
        # the layout is that of what the block gives, unless a layer says otherwise of what it takes
        layout = "nchw" if taken.layout == "nhwc" and id(first.call.taken) not in sight.last else taken.layout
        taps["stem"] = tap(first.call, "input", replace(taken, layout=layout))
    return taps


def _ends(units: list[Unit]) -> list[Unit]:
    """Return the last unit of each resolution; one that is finer than what came before hides that."""
    ends: list[Unit] = []
    for unit in reversed(units):
        if not ends or math.prod(unit.lay.size) > math.prod(ends[-1].lay.size):
            ends.append(unit)
    return ends[::-1]


def _named(root: Call, sight: Sight, paths: Sequence[str]) -> list[Unit]:
    """Return the units of these paths, or nothing if one of them gives no map."""
    calls = [_called(root, path) for path in paths]
    units = [Unit(call, lay) for call in calls if call is not None and (lay := sight.of(call.given)) is not None]
    return units if len(units) == len(paths) else []


def _adds_nothing(call: Call) -> bool:
    same = call.given is not None and call.taken is not None and call.given.shape == call.taken.shape
    identity = call.given is call.taken and not any(isinstance(c.module, ACTIVATIONS) for c in call.walk())
    kind = type(call.module).__name__
    return identity or "Pad" in kind or (same and "Pool" in kind)


def _is_block(call: Call) -> bool:
    return any(isinstance(inner.module, (nn.Conv2d, nn.Linear)) for inner in call.walk() if inner is not call)


def _channels_last_calls(root: Call, known: bool) -> set[int]:
    """Return the ids of maps whose channels are last: what layers over the last dimension take or give."""
    found: set[int] = set()
    for call in root.walk():
        over_last = isinstance(call.module, nn.Linear) or type(call.module) is nn.LayerNorm
        over_last |= known and call is not root and not isinstance(call.module, nn.Conv2d)
        if over_last:
            found |= {id(tensor) for tensor in (call.taken, call.given) if tensor is not None and tensor.ndim == 4}
    return found


def _chain(call: Call, sight: Sight) -> list[Unit]:
    """Return the row of modules through which the map runs.

    A module that keeps the resolution, or changes it once, is one unit; one that changes it several times is
    looked into, and so is one that takes or gives no map.
    """
    lay = sight.of(call.given)
    if lay is None or sight.of(call.taken) is None or len(_resolutions(call, sight)) > 2:
        return [unit for inner in call.inner for unit in _chain(inner, sight)]
    return [Unit(call, lay)]


def _resolutions(call: Call, sight: Sight) -> set[tuple[int, int]]:
    """Return the resolutions a map runs through in a module; side branches below its output do not count."""
    taken, given = sight.of(call.taken), sight.of(call.given)
    if taken is None or given is None:
        return set()
    begin, end = taken.size, given.size
    if begin == end:
        return {end}
    inside = {size for inner in call.inner for size in _resolutions(inner, sight)}
    return {begin, end} | {size for size in inside if math.prod(end) < math.prod(size) < math.prod(begin)}


def _ending_activation(call: Call) -> Call | None:
    """Return the activation whose output is the module's output."""
    for inner in (*reversed(call.inner), call):
        if inner is call or inner.given is call.given:
            if isinstance(inner.module, ACTIVATIONS):
                return inner
            return _ending_activation(inner) if inner is not call else None
    return None


def _norms(root: Call, taps: Mapping[str, Tap]) -> dict[str, str]:
    """Return the batch norm before each stage's last activation: of the branch, where a shortcut is added."""
    calls = list(root.walk())
    found: dict[str, str] = {}
    for role, tap in taps.items():
        if not role.endswith(".pre"):
            continue
        end = next(n for n, c in enumerate(calls) if c.path == tap.where and c.number == (tap.call or 0))
        block = next((c for c in calls[end:] if calls[end] in c.inner), root)
        aside = {id(c) for inner in block.inner if inner.taken is block.taken for c in inner.walk()}
        norms = [
            c
            for c in calls[:end]
            if isinstance(c.module, nn.modules.batchnorm._BatchNorm) and _like(c.given, calls[end].taken)
        ]
        direct = [c for c in norms if c.given is calls[end].taken]
        last = (direct or [c for c in norms if id(c) not in aside] or norms)[-1:]
        found |= {role.removesuffix(".pre") + ".norm": c.path for c in last}
    return found


def _like(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and one.shape == other.shape


# --- tokens ----------------------------------------------------------------------------------------------


def _tokens(root: Call, image: Tensor, calls: list[Call], prefix: int | None) -> dict[str, Tap]:
    blocks = _blocks(root, len(image), calls)
    if not blocks:
        return {}
    shape = _shape(blocks[-1])
    # a known number holds for what the model ends in: class attention may add its token after the blocks
    counts = range(PREFIXES + 1) if prefix is None else (prefix, 0)
    fitting = [count for count in counts if _rows(shape[1] - count, image) is not None]
    prefix = fitting[0] if fitting else prefix or 0
    patches = shape[1] - prefix
    taps: dict[str, Tap] = {}
    for number, block in enumerate(blocks):
        own = max(_shape(block)[1] - patches, 0)  # prefix tokens may join the others on their way
        taps[f"blocks[{number}]"] = Tap(block.path, layout="tokens", prefix=own)
        if own:
            taps[f"cls[{number}]"] = Tap(block.path, layout="cls")
        taps |= {f"{role}[{number}]": tap for role, tap in projections(block).items()}
    after = calls[calls.index(blocks[-1]) + 1 :]
    repeated = {call.path for call in calls if call.number}
    norms = [c for c in after if "Norm" in type(c.module).__name__ and c.given is not None and c.given.shape == shape]
    direct = [call for call in norms if call.taken is blocks[-1].given]
    end = (direct or norms or blocks[-1:])[0]
    taps["tokens"] = Tap(end.path, call=end.number if end.path in repeated else None, layout="tokens", prefix=prefix)
    early = calls[: calls.index(next(blocks[0].walk()))]
    embeddings = [c for c in early if c.given is not None and c.given.ndim == 3 and c.given.shape[-1] == shape[-1]]
    full = [c for c in embeddings if c.given is not None and c.given.shape[1] == patches]
    if full:
        taps["patch_embed[0]"] = Tap(full[0].path, layout="tokens")
    return taps


def _shape(call: Call) -> tuple[int, ...]:
    assert call.given is not None
    return tuple(call.given.shape)


def _blocks(root: Call, count: int, calls: list[Call]) -> list[Call]:
    """Return the row of siblings that all give `[B, L, D]` of one width and as many rows as images, or nothing.

    A few prefix tokens may join on the way. A second row may follow on the same tokens and a few more, as
    class-attention layers do.
    """
    rows: dict[str, list[Call]] = {}
    for call in calls:
        parent = call.path.rpartition(".")[0]
        in_row = isinstance(root.module.get_submodule(parent), (nn.Sequential, nn.ModuleList))
        if in_row and call.number == 0 and _is_sequence(call) and _shape(call)[0] == count:
            rows.setdefault(parent, []).append(call)
    outer = {parent: row for parent, row in rows.items() if not any(parent.startswith(f"{o}.") for o in rows)}
    long = [row for row in outer.values() if len(row) > 1]
    even = [number for number, row in enumerate(long) if _of_one_width(row)]
    if not even:
        return []
    first, *later = long[even[0] :]
    _, length, width = _shape(first[0])
    follow = all(
        len(row) < len(first) and all(0 < n - length <= PREFIXES and d == width for _, n, d in map(_shape, row))
        for row in later
    )
    return first if follow else []


def _of_one_width(row: list[Call]) -> bool:
    lengths = [_shape(call)[1] for call in row]
    grown = lengths == sorted(lengths) and lengths[-1] - lengths[0] <= PREFIXES
    return grown and len({_shape(call)[2] for call in row}) == 1


def _is_sequence(call: Call) -> bool:
    # a class token alone, as class-attention layers give it, is no sequence
    return bool(call.inner) and call.given is not None and call.given.ndim == 3 and call.given.shape[1] > 1
