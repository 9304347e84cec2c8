# SPDX-License-Identifier: Apache-2.0
"""The catalogue of methods, read from this folder: a file's stem is the method's name everywhere."""

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from tutelage.core.card import Card, Listing, read
from tutelage.core.error import UserError, nearest

if TYPE_CHECKING:
    from tutelage.core.term import Term

T = TypeVar("T")


@cache
def catalogue() -> dict[str, Listing]:
    """Return every method found in the folder by stem, without importing any."""
    entries: dict[str, Listing] = {}
    for path in sorted(Path(__file__).parent.glob("*/*.py")):
        entry = None if path.stem.startswith("_") else read(path)
        if entry is not None:
            entries[entry.stem] = entry
    return entries


def cards() -> dict[str, Card]:
    """Return every method's card by stem."""
    return {stem: entry.card for stem, entry in catalogue().items()}


def family(stem: str) -> str:
    """Return the folder of a method."""
    return entry(stem).family


def entry(stem: str) -> Listing:
    """Return the catalogue's entry of a method.

    Raises:
        UserError: if no file has this stem; the nearest name is given.
    """
    found = catalogue().get(stem)
    if found is None:
        raise UserError(f"unknown method {stem!r}{nearest(stem, catalogue())}")
    return found


def needs_teacher(stem: str) -> bool:
    """Return whether a method needs a teacher beside its students, which may teach each other or themselves.

    Raises:
        UserError: if no file has this stem.
    """
    found = entry(stem)
    blocks = [block for label, block in found.objective.items() if label != "task"]
    places = [block.get("teacher", "teacher") if isinstance(block, Mapping) else "teacher" for block in blocks]
    return found.card.needs_teacher and "teacher" in places


def module(name: str) -> ModuleType:
    """Import the file of a method: a stem of the catalogue."""
    return import_module(f"tutelage.methods.{family(name)}.{name}")


def find(name: str) -> "type[Term]":
    """Return a method's class by stem, or anyone's own by dotted path `package.module:Class`.

    Raises:
        UserError: if there is no such method, or the path leads to something else than a Term.
    """
    from tutelage.core.term import Term

    if ":" in name:
        path, _, attribute = name.partition(":")
        try:
            home = import_module(path)
        except ImportError as error:
            raise UserError(f"method {name!r}: cannot import {path!r} ({error})") from error
        found: Any = getattr(home, attribute, None)
        if found is None:
            raise UserError(f"method {name!r}: {path} has no {attribute!r}{nearest(attribute, vars(home))}")
    else:
        home = module(name)
        classes = _of_kind(home, Term)
        if len(classes) != 1:
            raise UserError(f"{name} holds {len(classes)} terms, expected one")
        found = classes[0]
    if not (isinstance(found, type) and issubclass(found, Term)):
        raise UserError(f"method {name!r} is not a Term")
    return found


def role(name: str, kind: type[T]) -> type[T] | None:
    """Return the `Rebuild` or `Feeder` that stands in the file of a method's term, or None."""
    found = _of_kind(import_module(find(name).__module__), kind)
    return found[0] if found else None


def _of_kind(home: ModuleType, kind: type[T]) -> list[type[T]]:
    """Return the classes of a kind that a file defines."""
    return [
        value
        for value in vars(home).values()
        if isinstance(value, type) and issubclass(value, kind) and value.__module__ == home.__name__
    ]
