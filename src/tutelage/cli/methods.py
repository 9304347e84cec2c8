# SPDX-License-Identifier: Apache-2.0
"""`tutelage methods`: what can be used, read from the files without importing them."""

import ast
import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer

from tutelage.cli._show import Json, document
from tutelage.core.card import Card, Listing

SIDES = ("student", "teacher")
TERMS = ("Term", "Around")  # what the class of a method is derived from
MORE = "; with other taps, any task that has them"


def methods(
    stem: Annotated[str | None, typer.Argument(help="One method, in full.")] = None,
    as_json: Json = False,
) -> None:
    """List the methods, or show one."""
    from tutelage import methods as catalogue
    from tutelage.run.suits import suited

    if stem is not None:
        entry, home = catalogue.entry(stem), Path(catalogue.__file__).parent
        if as_json:
            more = {"objective": entry.objective, "options": options(entry, home)}
            document({**plain(entry), "tasks": suited(entry), **more})
        else:
            print(described(entry, suited(entry), options(entry, home)))
        return
    found = sorted(catalogue.catalogue().values(), key=lambda entry: (entry.family, entry.stem))
    if as_json:
        document([{**plain(entry), "tasks": suited(entry)} for entry in found])
        return
    width = max(len(entry.stem) for entry in found)
    for family, entries in groupby(found, key=lambda entry: entry.family):
        print(family)
        for entry in entries:
            teacher = "" if catalogue.needs_teacher(entry.stem) else "  (no teacher)"
            print(f"  {entry.stem:{width}}  {entry.card.title} ({published(entry.card)}){teacher}")
            print(f"  {'':{width}}  {listed(suited(entry))}; reads {signals(entry.card)}")
        print()
    print(f"{len(found)} methods. `tutelage methods STEM` shows one, `tutelage demo STEM` tries it.")


def plain(entry: Listing) -> dict[str, object]:
    """Return a method as plain data."""
    return {"stem": entry.stem, "family": entry.family, **asdict(entry.card)}


def published(card: Card) -> str:
    """Return venue and year, once where the venue carries a year of its own."""
    return card.venue if card.venue[-4:].isdigit() else f"{card.venue} {card.year}"


def listed(tasks: Sequence[str]) -> str:
    """Return the tasks of a method in words."""
    return ", ".join(tasks) or "no task of this version"


def signals(card: Card) -> str:
    """Return what a method reads, once where it is the same of student and teacher."""
    sides = {side: ", ".join(roles) for side, roles in card.reads.items() if roles}
    if sides.get("student") == sides.get("teacher"):
        sides = {"": sides["student"], **{side: roles for side, roles in sides.items() if side not in SIDES}}
    return "; ".join(f"{side}: {roles}" if side else roles for side, roles in sides.items())


def options(entry: Listing, home: Path) -> dict[str, str]:
    """Return a term's options with their defaults as they are written in its file."""
    text = (home / entry.family / f"{entry.stem}.py").read_text(encoding="utf-8")
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef) and any(isinstance(b, ast.Name) and b.id in TERMS for b in node.bases):
            for part in node.body:
                if isinstance(part, ast.FunctionDef) and part.name == "__init__":
                    pairs = zip(part.args.kwonlyargs, part.args.kw_defaults, strict=True)
                    return {one.arg: ast.unparse(value) if value else "required" for one, value in pairs}
    return {}


def described(entry: Listing, tasks: Sequence[str], options: dict[str, str]) -> str:
    """Return a method as text for people."""
    card = entry.card
    rows = {
        "family": entry.family,
        "tasks": listed(tasks) + (MORE if any(name.endswith(("tap", "taps")) for name in options) else ""),
        "reads": signals(card),
        "labels": ", ".join(card.labels),
        "averages over": card.averages,
        "batch": card.batch,
        "options": ", ".join(f"{name}={value}" for name, value in options.items()) or "none",
        "objective": json.dumps(dict(entry.objective)).replace('"', ""),
        "code": f"{card.code} ({card.code_licence or 'no licence stated'})" if card.code else "none published",
        "golden": ", ".join(card.golden) or "none",
    }
    lines = [f"{name + ':':15}{value}" for name, value in rows.items()]
    head = f"{card.name}: {card.title}\n{card.authors}. {published(card)}. {card.paper}\n\n{card.claims}\n"
    return "\n".join([head, *lines])
