# SPDX-License-Identifier: Apache-2.0
"""A user's module with what the library must know to call and tap it."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from tutelage.core.error import UserError, nearest
from tutelage.core.tap import Tap, expand, is_role
from tutelage.core.text import TextSpec

SHOWN = 4  # of a row of roles in a message


@dataclass(frozen=True)
class InputSpec:
    """What pixels a model wants. Batches carry pixels in [0, 1]; each model prepares them for itself.

    Args:
        size: (height, width) to resize to (bilinear, antialiased), or None to take any.
        mean: by channel, in [0, 1] units; empty for none.
        std: by channel.
        channels: number of channels; one-channel batches are repeated to it.
        bgr: channel order of the model is blue, green, red.
    """

    size: tuple[int, int] | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    channels: int = 3
    bgr: bool = False

    def prepare(self, pixels: Tensor, constants: dict[Any, tuple[Tensor, Tensor]]) -> Tensor:
        """Return pixels as the model wants them, on their device and in their dtype.

        Raises:
            UserError: if the number of channels fits neither.
        """
        if pixels.shape[1] != self.channels:
            if pixels.shape[1] != 1:
                raise UserError(f"images have {pixels.shape[1]} channels, the model takes {self.channels}")
            pixels = pixels.expand(-1, self.channels, -1, -1)
        if self.size is not None and tuple(pixels.shape[-2:]) != self.size:
            pixels = F.interpolate(pixels, self.size, mode="bilinear", align_corners=False, antialias=True)
        if self.bgr:
            pixels = pixels.flip(1)
        if self.mean:
            key = (pixels.device, pixels.dtype)
            if key not in constants:
                constants[key] = (
                    torch.tensor(self.mean, device=key[0], dtype=key[1]).view(1, -1, 1, 1),
                    torch.tensor(self.std, device=key[0], dtype=key[1]).view(1, -1, 1, 1),
                )
            mean, std = constants[key]
            pixels = (pixels - mean) / std
        return pixels


@dataclass(frozen=True)
class Outputs:
    """What an exported copy of a model answers.

    Args:
        names: of its tensors, in order.
        plain: makes them of what the module gives, where that is more than tensors.
        batched: any number of images at a time; otherwise one.
        ranked: rows come in the order of a score, so that those of equal scores may change places.
    """

    names: tuple[str, ...] = ("logits",)
    plain: Callable[[Any], Tensor | tuple[Tensor, ...]] | None = None
    batched: bool = True
    ranked: bool = False


def _in_short(roles: Iterable[str]) -> list[str]:
    """Return roles in their order, a long row of one kind as its ends: `blocks[0]...blocks[11]`."""
    rows: dict[str, list[str]] = {}
    for role in roles:
        rows.setdefault(re.sub(r"\d+", "*", role), []).append(role)
    return [word for row in rows.values() for word in (row if len(row) <= SHOWN else [f"{row[0]}...{row[-1]}"])]


class Lent(nn.Module):
    """A module of a student, lent as it stands at each call: its weights are constants then, its buffers copies.

    Gradients pass through to what it is given. It is in the mode that the student is in.

    Args:
        module: of the student, where it stays.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *given: Any, **named: Any) -> Any:
        """Return what the module says, without a trace in it."""
        held = {name: one.detach() for name, one in self.module.named_parameters()}
        held |= {name: one.clone() for name, one in self.module.named_buffers()}
        return functional_call(self.module, held, given, named)


@dataclass
class Model:
    """A module with its adapters. The module itself is left as the user made it.

    Args:
        module: the network.
        roles: places of tensors by role; see `tutelage.core.tap.ROLES`.
        modules: paths of modules by role, for what a teacher may lend (`classifier`).
        input: pixels it wants; None passes inputs as they are.
        text: tokens it reads, for a language model.
        class_names: of its outputs, in order; empty if unknown.
        call: how to call it, where `module(inputs)` is not enough.
        source: how to build it again, as in a recipe.
        outputs: what an exported copy answers.
    """

    module: nn.Module
    roles: Mapping[str, Tap] = field(default_factory=dict)
    modules: Mapping[str, str] = field(default_factory=dict)
    input: InputSpec | None = None
    class_names: tuple[str, ...] = ()
    call: Callable[..., Any] | None = None
    source: Mapping[str, Any] = field(default_factory=dict)
    text: TextSpec | None = None
    outputs: Outputs = field(default_factory=Outputs)
    constants: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, model: "nn.Module | Model") -> "Model":
        """Return a bare module as a Model without roles; its taps are named by path."""
        return model if isinstance(model, Model) else cls(model)

    def __call__(self, inputs: Any, **more: Any) -> Any:
        """Return what the module says to inputs, prepared as it wants them; `more` goes to the module as it is."""
        if self.input is not None and isinstance(inputs, Tensor) and inputs.ndim == 4:
            inputs = self.input.prepare(inputs, self.constants)
        return self.call(self.module, inputs, **more) if self.call else self.module(inputs, **more)

    def expand(self, tap: Tap) -> tuple[Tap, ...]:
        """Return the taps that a tap stands for: one for every index of `stages[*]`, else itself.

        Raises:
            UserError: if the model has no such role.
        """
        found = expand(tap.where, self.roles)
        if not found:
            raise UserError(self._missing(tap.where))
        return tuple(replace(tap, where=where) for where in found)

    def resolve(self, tap: Tap) -> Tap:
        """Return a tap with its role replaced by a place in this model.

        Raises:
            UserError: if the model has no such role or module; what it has is named. Also if a role is given
                a side or layout: the model knows these itself.
        """
        where = self._counted(tap.where)
        if where in self.roles:
            if tap.side != "output" or tap.layout != "nchw" or tap.prefix:
                raise UserError(
                    f"tap {tap}: the role {where!r} has its own side and layout; name a module path instead"
                )
            place = self.roles[where]
            own = {word: getattr(tap, word) for word in ("key", "call", "part") if getattr(tap, word) is not None}
            return replace(place, **own)
        if where == "classifier.weight" and "classifier" in self.modules:
            return Tap(self.modules["classifier"], "weight")
        paths = [path for path, _ in self.module.named_modules(remove_duplicate=False)]
        if where in paths:
            return tap
        if is_role(tap.where):
            raise UserError(self._missing(tap.where))
        known_places = [*self.roles, *filter(None, paths)]
        kind = type(self.module).__name__
        raise UserError(f"no module or role {tap.where!r} in {kind}{nearest(tap.where, known_places)}")

    def _missing(self, role: str) -> str:
        nothing = "none (build it with tutelage.models.load or adapt, or name a module path)"
        known = ", ".join(_in_short(self.roles)) or nothing
        tokens = role == "map" and "tokens" in self.roles
        hint = "; where a method takes tokens for a map, name the tap `tokens`" if tokens else ""
        return f"{type(self.module).__name__} has no role {role!r}; its roles: {known}{hint}"

    def _counted(self, where: str) -> str:
        """Turn a negative index of a role into a positive one."""
        name, bracket, rest = where.partition("[-")
        if not bracket:
            return where
        back, _, tail = rest.partition("]")
        count = sum(1 for role in self.roles if role.startswith(f"{name}[") and role.endswith("]"))
        return f"{name}[{count - int(back)}]{tail}"

    def lent(self, role: str) -> tuple[str, ...]:
        """Return the roles of modules that a role stands for: one for every index of `stages[*].norm`.

        Raises:
            UserError: if the model has none.
        """
        found = expand(role, self.modules)
        if not found:
            raise UserError(self._lends_no(role))
        return found

    def lend(self, role: str) -> nn.Module:
        """Return the module that carries a role, for a frozen copy.

        Raises:
            UserError: if the model has none.
        """
        path = self.modules.get(role, role)
        try:
            return self.module.get_submodule(path)
        except AttributeError:
            raise UserError(self._lends_no(role)) from None

    def _lends_no(self, role: str) -> str:
        return f"{type(self.module).__name__} lends no {role!r}; it lends: {', '.join(self.modules) or 'none'}"
