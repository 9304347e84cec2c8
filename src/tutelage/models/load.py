# SPDX-License-Identifier: Apache-2.0
"""Models by name: `kind:place`, or a mapping with options."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from torch import nn

from tutelage.core import InputSpec, Model
from tutelage.core.error import UserError, nearest
from tutelage.models import own, weights
from tutelage.models.adapt import adapt, blank


@dataclass(frozen=True)
class Wanted:
    """What a source is asked for.

    Args:
        place: what stands after the colon.
        num_classes: K.
        in_channels: of the images.
        class_names: of the outputs.
        pretrained: the library's own weights.
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
    """What a source gives: a network, the pixels it wants and what a trace cannot show."""

    module: nn.Module
    input: InputSpec | None = None
    size: tuple[int, int] = (32, 32)
    prefix: int | None = None
    call: Callable[[nn.Module, Any], Any] | None = None
    roles: Mapping[str, Any] = field(default_factory=dict)


def _own(wanted: Wanted) -> Built:
    if wanted.pretrained:
        raise UserError(f"tutelage:{wanted.place} comes without weights: give a file")
    module, pixels = own.build(
        wanted.place,
        num_classes=wanted.num_classes or 10,
        in_channels=wanted.in_channels or 3,
        **wanted.options,
    )
    return Built(module, pixels)


#: Builds a kind of model.
SOURCES: dict[str, Callable[[Wanted], Built]] = {"tutelage": _own}
#: Words of a mapping that are not the constructor's.
WORDS = ("model", "weights", "roles", "input", "num_classes", "in_channels", "class_names")


def load(
    spec: str | Mapping[str, Any],
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    image_size: tuple[int, int] | None = None,
    class_names: Sequence[str] = (),
    seed: int | None = None,
) -> Model:
    """Return a model with its roles.

    Args:
        spec: `tutelage:NAME`, `timm:NAME`, `torchvision:NAME`, `hf:NAME_OR_PATH`, `python:FILE.py:FUNCTION`
            or `run:FOLDER`; or a mapping with `model`, `weights` (null, `pretrained` or a file), `roles`
            (places by role), `input` (size, mean, std, channels, bgr) and options of the constructor.
        num_classes: K, where the mapping does not say.
        in_channels: of the images, where the mapping does not say.
        image_size: (height, width) of the images, for the forward that looks for roles.
        class_names: of the outputs, in order.
        seed: of the initial weights; None draws them from torch's generator.

    Raises:
        UserError: on an unknown name, word or file; the nearest name is given.

    Example:
        >>> model = load("tutelage:resnet8", num_classes=10, in_channels=1, seed=0)
        >>> model.roles["stages[2]"].where, model(torch.zeros(2, 1, 8, 8)).shape
        ('layer3', torch.Size([2, 10]))
    """
    given: dict[str, Any] = {"model": spec} if isinstance(spec, str) else dict(spec)
    if "model" not in given:
        raise UserError(f"a model needs the word `model`: {', '.join(f'{kind}:...' for kind in SOURCES)}")
    kind, _, place = str(given["model"]).partition(":")
    if kind not in SOURCES or not place:
        raise UserError(f"model {given['model']!r} is not known: write KIND:NAME{nearest(kind, SOURCES)}")
    wanted = Wanted(
        place,
        given.get("num_classes", num_classes),
        given.get("in_channels", in_channels),
        tuple(given.get("class_names", class_names)),
        given.get("weights") == "pretrained",
        {word: value for word, value in given.items() if word not in WORDS},
    )
    built = _seeded(SOURCES[kind], wanted, seed)
    file = given.get("weights")
    if file is not None and not wanted.pretrained:
        weights.fit(built.module, weights.read(file), file)
    pixels = _pixels(built.input, given.get("input"))
    names = wanted.class_names
    return adapt(
        built.module,
        blank(built.module, pixels or InputSpec(channels=wanted.in_channels or 3), image_size or built.size),
        roles={**built.roles, **given.get("roles", {})},
        input=pixels,
        class_names=names,
        call=built.call,
        prefix=built.prefix,
        source=record(given, wanted, pixels),
    )


def record(given: Mapping[str, Any], wanted: Wanted, pixels: InputSpec | None) -> dict[str, Any]:
    """Return how to build a model again without its weights: what `student.json` holds."""
    return {
        "model": {
            word: value for word, value in given.items() if word in ("model", "roles", *wanted.options)
        },
        "num_classes": wanted.num_classes,
        "in_channels": wanted.in_channels,
        "class_names": list(wanted.class_names),
        "input": asdict(pixels) if pixels is not None else None,
    }


def rebuild(found: Mapping[str, Any]) -> Model:
    """Return the model of a record, with initial weights."""
    spec = dict(found["model"])
    if found.get("input") is not None:
        spec["input"] = found["input"]
    return load(
        spec,
        num_classes=found.get("num_classes"),
        in_channels=found.get("in_channels"),
        class_names=found.get("class_names", ()),
    )


def _seeded(build: Callable[[Wanted], Built], wanted: Wanted, seed: int | None) -> Built:
    if seed is None:
        return build(wanted)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(wanted)


def _pixels(found: InputSpec | None, given: Mapping[str, Any] | None) -> InputSpec | None:
    """Return the input spec with what the user says of it."""
    if given is None:
        return found
    words = [part.name for part in fields(InputSpec)]
    for word in given:
        if word not in words:
            raise UserError(f"input.{word} is not known{nearest(str(word), words)}")
    as_tuples: dict[str, Any] = {
        word: tuple(value) if isinstance(value, list) else value for word, value in given.items()
    }
    return replace(found or InputSpec(), **as_tuples)
