# SPDX-License-Identifier: Apache-2.0
"""What models there are to name, by task."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

from tutelage.core.error import UserError, nearest
from tutelage.models.segmentation import DECODERS
from tutelage.models.source import listed

WILD = frozenset("*?[")
#: Stands for the name of any backbone.
ANY = "NAME"

Described = Mapping[str, str]


class Named(NamedTuple):
    """One model that can be named.

    Args:
        name: `kind:name`.
        task: what it is for.
        what: in one line what it is; empty where its name says it.
    """

    name: str
    task: str
    what: str


def names(pattern: str = "", task: str | None = None) -> Iterator[Named]:
    """Yield every model that matches, task by task, this library's own first; nothing is built.

    Of transformers types are named (`hf:vit`); a folder or a name of the hub may stand there too. `timm:NAME` is any
    backbone of timm. A library that is not installed offers nothing.

    Args:
        pattern: part of a name, or with `*`, `?` or `[` the whole of it; `timm:` and the like ask one source.
        task: one task alone.

    Raises:
        UserError: on an unknown task.

    Example:
        >>> [one.name for one in names("tutelage:resnet?")]
        ['tutelage:resnet8']
    """
    if task is not None and task not in TASKS:
        raise UserError(f"no models for a task {task!r}{nearest(task, TASKS)}")
    wanted = pattern.lower()
    kind, colon, _ = wanted.partition(":")
    whole = bool(WILD & set(wanted))
    for each, sources in TASKS.items():
        if task not in (None, each):
            continue
        for source, read in sources.items():
            if colon and kind != source:
                continue
            for name, what in read().items():
                full = f"{source}:{name}"
                seen = (full if colon else name).lower()
                if fnmatchcase(seen, wanted) if whole else wanted in seen:
                    yield Named(full, each, what)


def _own(folder: str) -> Described:
    """Return the constructors of a folder beside this file, each with the first line of what it says of itself."""
    return {name: described(make) for name, make in listed(folder).items()}


def described(make: Any) -> str:
    """Return the first line of the documentation of a class or function, also behind `partial`.

    Example:
        >>> described(partial(described, None))
        'The first line of the documentation of a class or function, also behind `partial`'
    """
    while isinstance(make, partial):
        make = make.func
    line = (inspect.getdoc(make) or "").partition("\n")[0].removesuffix(".").removeprefix("Return ")
    return line[:1].upper() + line[1:]


def _plain(found: list[str]) -> Described:
    return dict.fromkeys(found, "")


def _timm() -> Described:
    import timm

    return _plain(timm.list_models())


def _torchvision(home: str = "") -> Described:
    import torchvision

    models = torchvision.models
    return _plain(models.list_models(module=getattr(models, home) if home else models))


def _transformers(*tables: str, more: tuple[str, ...] = ()) -> Described:
    """Return the types that stand in tables of transformers."""
    try:
        tables_of = import_module("transformers.models.auto.modeling_auto")
    except ImportError:
        return {}
    types = {name for table in tables for name in getattr(tables_of, f"MODEL_FOR_{table}_MAPPING_NAMES")}
    return _plain(sorted(types | set(more)))


#: By task and kind of source what there is; each loads a library of its own.
TASKS: Mapping[str, Mapping[str, Callable[[], Described]]] = {
    "classification": {
        "tutelage": partial(_own, "networks"),
        "timm": _timm,
        "torchvision": _torchvision,
        "hf": partial(_transformers, "IMAGE_CLASSIFICATION"),
    },
    "detection": {
        "tutelage": partial(_own, "detectors"),
        "torchvision": lambda: _plain(sorted(listed("detectors", "PUBLISHED"))),
        "hf": partial(_transformers, "OBJECT_DETECTION"),
    },
    "segmentation": {
        "tutelage": partial(_own, "segmenters"),
        "timm": lambda: {ANY: f"PSPNet on any backbone that gives maps; `decoder`: {', '.join(DECODERS)}"},
        "torchvision": partial(_torchvision, "segmentation"),
        "hf": partial(_transformers, "SEMANTIC_SEGMENTATION", more=("mask2former",)),
    },
    "pose": {
        "tutelage": partial(_own, "poses"),
        "timm": lambda: {ANY: "The head of RTMPose on any backbone that gives maps"},
    },
    "language": {"hf": partial(_transformers, "CAUSAL_LM", "MASKED_LM")},
}
