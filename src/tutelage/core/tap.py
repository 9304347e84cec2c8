# SPDX-License-Identifier: Apache-2.0
"""A name for one tensor inside a model, and the hooks that read it."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tutelage.core.error import UserError, nearest
from tutelage.functional.spatial import as_grid

#: The vocabulary of roles. `models/` says where each lies in a model; `classifier` and `stages[i].norm` (the
#: batch norm before a stage's last activation) name modules, `classifier.weight` is a parameter.
ROLES = (
    *("stem", "stages", "map", "pooled", "logits", "classifier", "classifier.weight", "blocks", "tokens"),
    *("logits.x", "logits.y"),
    *("cls", "q", "k", "v", "patch_embed", "fpn", "head.cls", "head.box", "hidden"),
)
ROLE = re.compile(rf"({'|'.join(re.escape(role) for role in ROLES)})(\[(-?\d+|\*)\])?(\.pre|\.norm)?")

Side = Literal["output", "input", "weight"]
Layout = Literal["nchw", "nhwc", "tokens", "grid", "cls", "flat"]


@dataclass(frozen=True)
class Tap:
    """One tensor inside a model.

    Args:
        where: a role (`map`, `stages[-2]`, `stages[*]` for every index) or a module path (`layer4.1.conv2`).
        side: the module's `output`, its `input`, or the `weight` it is called with (a live parameter).
        key: which element of a tuple, or which keyword or dictionary entry; the first tensor by default.
        call: which call (0-based), for a module that runs more than once in a forward.
        layout: how the tensor lies in the model; it is recorded as `[B, C, H, W]`, or `[B, L, D]` for tokens;
            `grid` makes tokens a map, `cls` takes the first token alone, `flat` makes a map one vector.
        prefix: number of prefix tokens, for the token layouts.
        grid: (height, width) of the tokens, for the layout `grid`; on images of another size its proportions hold.
        part: (which, of how many) equal parts of the last dimension, for a layer that gives several tensors side
            by side, such as a fused query, key and value.
        view: of the batch, for a term that reads one model on several views; None is the view of its source.

    Raises:
        UserError: if `side` or `layout` is none of these words.
    """

    where: str
    side: Side = "output"
    key: int | str | None = None
    call: int | None = None
    layout: Layout = "nchw"
    prefix: int = 0
    grid: tuple[int, int] | None = None
    part: tuple[int, int] | None = None
    view: str | None = None

    def __post_init__(self) -> None:
        for word, valid in (("side", get_args(Side)), ("layout", get_args(Layout))):
            given = getattr(self, word)
            if given not in valid:
                raise UserError(f"tap {self.where!r}: {word} {given!r} is not known{nearest(str(given), valid)}")
        if self.grid is not None:
            object.__setattr__(self, "grid", tuple(self.grid))  # a recipe gives a list
        if (self.layout == "grid") != (self.grid is not None) or (self.grid and len(self.grid) != 2):
            raise UserError(f"tap {self.where!r}: the layout `grid` goes with `grid: [height, width]`")
        if self.part is not None:
            which, count = self.part if len(self.part) == 2 else (-1, 0)
            if not 0 <= which < count:
                raise UserError(f"tap {self.where!r}: part is [which, of how many], such as [0, 3], not {self.part}")
            object.__setattr__(self, "part", (which, count))  # a recipe gives a list

    @classmethod
    def parse(cls, value: "str | Mapping[str, Any] | Tap") -> "Tap":
        """Read a role or path (`map`, or `map@strong` on a view), or a mapping of fields as in a recipe.

        Raises:
            UserError: on an unknown field.
        """
        if isinstance(value, Tap):
            return value
        if isinstance(value, str):
            where, _, view = value.partition("@")
            return cls(where, view=view or None)
        for word in value:
            if word not in cls.__dataclass_fields__:
                raise UserError(f"unknown word {word!r} in a tap{nearest(str(word), cls.__dataclass_fields__)}")
        if "where" not in value:
            raise UserError("a tap needs `where`: a role or a module path")
        return cls(**value)

    @property
    def name(self) -> str:
        """How signals call the tensor: the place alone, or with what sets it apart."""
        side = "" if self.side == "output" else f":{self.side}"
        key = "" if self.key is None else f"[{self.key!r}]"
        call = "" if self.call is None else f"#{self.call}"
        layout = "" if self.layout == "nchw" else f"({self.layout}{self.prefix or ''})"
        part = "" if self.part is None else f"({self.part[0]} of {self.part[1]})"
        return f"{self.where}{side}{key}{call}{layout}{part}" + (f"@{self.view}" if self.view else "")

    @property
    def plain(self) -> "Tap":
        """The same tensor, whatever the view."""
        return replace(self, view=None)

    def __str__(self) -> str:
        return self.name


def is_role(where: str) -> bool:
    """Whether a place is written in the vocabulary of roles."""
    return ROLE.fullmatch(where) is not None


def expand(where: str, known: Iterable[str]) -> tuple[str, ...]:
    """Return the known names that a pattern stands for, by index; any other name stands for itself.

    Example:
        >>> expand("stages[*]", ["stages[1]", "stages[0]", "stages[0].pre", "map"])
        ('stages[0]', 'stages[1]')
    """
    head, star, tail = where.partition("[*]")
    if not star:
        return (where,)
    index = re.compile(rf"{re.escape(head)}\[(\d+)\]{re.escape(tail)}")
    found = {int(match[1]): name for name in known if (match := index.fullmatch(name))}
    return tuple(found[number] for number in sorted(found))


def _pick(value: Any, key: int | str | None) -> Any:
    """Return the element of this key, or the first tensor; None where there is no such element."""
    if isinstance(value, Mapping):
        if isinstance(key, str):
            return value.get(key)
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        if key is None:
            return next((found for part in value if isinstance(found := _pick(part, None), Tensor)), None)
        return value[key] if isinstance(key, int) and -len(value) <= key < len(value) else None
    return value if key is None else None


def _arrange(tensor: Tensor, tap: Tap) -> Tensor:
    if tap.part is not None:
        which, count = tap.part
        if tensor.shape[-1] % count:
            raise UserError(f"tap {tap}: its last dimension, {tensor.shape[-1]}, has no {count} equal parts")
        tensor = tensor.chunk(count, dim=-1)[which]
    if tap.layout == "nhwc" and tensor.ndim == 4:
        return tensor.permute(0, 3, 1, 2)
    if tap.layout == "tokens" and tap.prefix:
        return tensor[:, tap.prefix :]
    if tap.grid is not None:
        try:
            return as_grid(tensor[:, tap.prefix :], tap.grid)
        except ValueError as error:
            raise UserError(f"tap {tap}: {error}") from error
    if tap.layout == "cls":
        return tensor[:, 0]
    if tap.layout == "flat":
        return tensor.flatten(1)
    return tensor


class Recorder:
    """Forward hooks on one model, registered once, recording only while armed.

    Hooks must be in place before the model is first compiled, and must not fire in the recomputation of a
    checkpointed block; hence one registration at build and a flag. The names are read inside the forward:
    under `torch.compile` that guards the frame, so an instance with other hooks than a sibling compiled
    earlier gets a frame of its own.

    Args:
        module: the model.
        taps: resolved taps (module paths) by the name signals call them.

    Raises:
        UserError: if a path leads to no module; the nearest paths are named.
    """

    def __init__(self, module: nn.Module, taps: Mapping[str, Tap]) -> None:
        self.taps = dict(taps)
        self.planned = tuple(self.taps)
        self.cloned: frozenset[str] = frozenset()
        self.taken: dict[str, list[Tensor]] = {}
        self.versions: dict[str, list[int]] | None = None
        self.armed = False
        modules = dict(module.named_modules(remove_duplicate=False))
        for tap in self.taps.values():
            if tap.where not in modules:
                paths = filter(None, modules)
                raise UserError(f"no module {tap.where!r} in {type(module).__name__}{nearest(tap.where, paths)}")
        self.handles: list[RemovableHandle] = []
        for name, tap in self.taps.items():
            place = modules[tap.where]
            if tap.side == "input":
                hook = place.register_forward_pre_hook(partial(self._before, name), with_kwargs=True)
            elif tap.side == "weight":
                hook = place.register_forward_hook(partial(self._beside, name))
            else:
                hook = place.register_forward_hook(partial(self._after, name))
            self.handles.append(hook)

    def _before(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.armed:
            key = self.taps[name].key
            self._keep(name, _pick(kwargs if isinstance(key, str) or not args else args, key))

    def _after(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if self.armed:
            self._keep(name, _pick(output, self.taps[name].key))

    def _beside(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if self.armed:  # read while the module runs: a sharded parameter is whole then
            self._keep(name, getattr(module, "weight", None))

    def _keep(self, name: str, tensor: Any) -> None:
        if not isinstance(tensor, Tensor):
            tap = self.taps[name]
            met = "no tensor" if tensor is None else type(tensor).__name__ + ", not a tensor,"
            at_key = "" if tap.key is None else f" at key {tap.key!r}"
            raise UserError(f"tap {name!r} met {met}{at_key} at the {tap.side} of {tap.where!r}: say which with `key`")
        if self.versions is not None:
            self.versions.setdefault(name, []).append(tensor._version)
        self.taken[name].append(tensor.clone() if name in self.cloned else tensor)

    def __enter__(self) -> "Recorder":
        self.taken = {name: [] for name in self.planned}
        self.armed = True
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.armed = False

    def release(self) -> dict[str, Tensor]:
        """Return what the last armed forward recorded, and keep no reference to it.

        Raises:
            UserError: if a tap did not fire, or fired several times and does not say which call.
        """
        taken, self.taken = self.taken, {}
        found = {}
        for name in self.planned:
            tap, seen = self.taps[name], taken[name]
            if not seen:
                raise UserError(
                    f"tap {name!r} ({tap.where}) recorded nothing: the module did not run, or the "
                    "model was compiled before the Distiller was built; compile with distiller.compile()"
                )
            if tap.call is None and len(seen) > 1:
                raise UserError(f"tap {name!r} ({tap.where}) ran {len(seen)} times in a forward: say which with `call`")
            if tap.call is not None and tap.call >= len(seen):
                raise UserError(f"tap {name!r} ran {len(seen)} times, there is no call {tap.call}")
            found[name] = _arrange(seen[tap.call or 0], tap)
        return found

    def watch(self) -> None:
        """Note version counters during the next forward: the dry run looks for in-place overwrites."""
        self.versions = {}

    def clone_overwritten(self) -> tuple[str, ...]:
        """After a watched forward, clone from now on each tap that a later operation wrote into.

        Returns:
            The names of those taps.
        """
        noted, self.versions = self.versions or {}, None
        moved = tuple(
            name
            for name, tensors in self.taken.items()
            if any(tensor._version != was for tensor, was in zip(tensors, noted.get(name, []), strict=True))
        )
        self.cloned = self.cloned | frozenset(moved)
        return moved

    def close(self) -> None:
        """Remove every hook."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
