# SPDX-License-Identifier: Apache-2.0
"""What the dry run found, as plain data: which tensors meet, through which layers, and what stands still."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tutelage.report.number import TIMES, count
from tutelage.report.table import Table

if TYPE_CHECKING:
    from torch import nn

    from tutelage.core import Distiller


@dataclass(frozen=True)
class Layer:
    """A layer that a term brings along: trained with the student, never exported.

    Args:
        term: label in the objective.
        name: inside the term.
        kind: what it is, such as `Conv2d 64 -> 128`.
        parameters: that are trained.
    """

    term: str
    name: str
    kind: str
    parameters: int


@dataclass(frozen=True)
class DryRun:
    """The dry run of one Distiller.

    Args:
        shapes: of every recorded signal, by source and name.
        layers: bridges and other layers of the terms.
        overwritten: taps that a later in-place operation rewrites; they are cloned.
        frozen: parameters of the student that no loss reaches.
    """

    shapes: Mapping[str, Mapping[str, tuple[int, ...]]]
    layers: tuple[Layer, ...] = ()
    overwritten: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()

    @classmethod
    def of(cls, distiller: Distiller) -> DryRun:
        """Return what a Distiller found when it was built."""
        found = distiller.report
        layers = tuple(
            Layer(label, name, _kind(module), sum(p.numel() for p in module.parameters() if p.requires_grad))
            for label, term in distiller.objective.terms.items()
            for name, module in term.named_children()
        )
        return cls(found.shapes, layers, found.overwritten, found.frozen)

    @classmethod
    def of_plain(cls, found: Mapping[str, Any]) -> DryRun:
        """Return a dry run from what `dataclasses.asdict` made of it, after a way through JSON."""
        shapes = {source: {n: tuple(s) for n, s in taps.items()} for source, taps in found["shapes"].items()}
        layers = tuple(Layer(**layer) for layer in found["layers"])
        return cls(shapes, layers, tuple(found["overwritten"]), tuple(found["frozen"]))

    @property
    def brief(self) -> str:
        """The counts in a line."""
        signals = sum(len(found) for found in self.shapes.values())
        parts = [_counted(signals, "signal"), _counted(len(self.layers), "bridge")]
        both = ((self.overwritten, "cloned"), (self.frozen, "parameters frozen"))
        return ", ".join([*parts, *(f"{len(names)} {word}" for names, word in both if names)])

    @property
    def remarks(self) -> list[tuple[str, tuple[str, ...]]]:
        """What a reader should know, each with the names it is about."""
        both = [("Cloned, since a later operation writes into them", self.overwritten)]
        both.append(("Frozen, since no loss reaches them", self.frozen))
        return [(heading, names) for heading, names in both if names]

    def signals(self) -> Table:
        """Return one row a recorded tensor."""
        rows = [
            (source, name, f" {TIMES} ".join(map(str, shape)) or "scalar")
            for source, found in self.shapes.items()
            for name, shape in found.items()
        ]
        return Table(("source", "tensor", "shape"), rows, "lll", title="Signals")

    def bridges(self) -> Table:
        """Return one row a layer that belongs to a term."""
        rows = [
            (layer.term, layer.name, layer.kind, count(layer.parameters) if layer.parameters else None)
            for layer in self.layers
        ]
        note = "Trained with the student, not part of what is exported."
        return Table(("term", "layer", "what", "parameters"), rows, "lllr", title="Bridges", note=note)


def _counted(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def _kind(module: nn.Module) -> str:
    """Return a layer's class with its widths, or the class and number of modules of a container."""
    name = type(module).__name__
    for ends in (("in_channels", "out_channels"), ("in_features", "out_features")):
        if all(isinstance(getattr(module, end, None), int) for end in ends):
            kernel = getattr(module, "kernel_size", ())
            shape = f" {TIMES.join(map(str, kernel))}" if isinstance(kernel, tuple) and kernel else ""
            return f"{name}{shape}, {getattr(module, ends[0])} → {getattr(module, ends[1])}"
    inner = [_kind(part) for part in module.children()]
    return f"{name} ({'; '.join(inner)})" if inner else name
