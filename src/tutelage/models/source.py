# SPDX-License-Identifier: Apache-2.0
"""What a library of models is asked for, and what it gives."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from tutelage.core import InputSpec


@dataclass(frozen=True)
class Wanted:
    """What a source is asked for.

    Args:
        place: what stands after the colon.
        num_classes: K.
        in_channels: of the images.
        class_names: of the outputs.
        pretrained: with the library's own weights.
        options: of the constructor.
    """

    place: str
    num_classes: int | None = None
    in_channels: int | None = None
    class_names: tuple[str, ...] = ()
    pretrained: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Built:
    """What a source gives: a network, and what a trace of it cannot show.

    Args:
        module: the network.
        input: pixels it wants.
        size: images on which its roles are told apart best; the data's are tried if these do not fit.
        prefix: number of class and register tokens.
        classifier: path of the layer that gives the logits.
        stages: paths of the modules that end a stage, in the library's own words.
        channels_last: of its maps.
        call: how it is called.
        class_names: of its outputs.
        again: how to build it without what the hub holds, where its place does not say.
    """

    module: nn.Module
    input: InputSpec | None = None
    size: tuple[int, int] = (64, 64)
    prefix: int | None = None
    classifier: str | None = None
    stages: Sequence[str] = ()
    channels_last: bool = False
    call: Callable[[nn.Module, Any], Any] | None = None
    class_names: tuple[str, ...] = ()
    again: Mapping[str, Any] = field(default_factory=dict)


def by_channels(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Return a constant of three colours for a number of channels: other counts take their mean."""
    return tuple(values) if channels == len(values) else (sum(values) / len(values),) * channels


@cache
def listed(folder: str, table: str = "ARCHITECTURES") -> Mapping[str, Any]:
    """Return what the files of a folder beside this one list in a table of theirs, joined; some list nothing.

    Args:
        folder: such as `networks`.
        table: name of the mapping: by default the constructors by name.
    """
    found: dict[str, Any] = {}
    for path in sorted((Path(__file__).parent / folder).glob("[!_]*.py")):
        found |= getattr(import_module(f"tutelage.models.{folder}.{path.stem}"), table, {})
    return found
