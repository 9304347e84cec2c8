# SPDX-License-Identifier: Apache-2.0
"""`tutelage methods`: what can be used, read from the cards."""

from dataclasses import asdict
from typing import Annotated

import typer

from tutelage.cli._show import Json, document


def methods(
    stem: Annotated[str | None, typer.Argument(help="One method, in full.")] = None,
    as_json: Json = False,
) -> None:
    """List the methods, or show one."""
    from tutelage import methods as catalogue

    if stem is not None:
        entry = catalogue.entry(stem)
        if as_json:
            document({"stem": stem, "family": entry.family, **asdict(entry.card), "objective": entry.objective})
            return
        card = entry.card
        print(f"{card.name}: {card.title}\n{card.authors}. {card.venue}, {card.year}. {card.paper}")
        print(f"\n{card.claims}\n")
        rows = {
            "family": entry.family,
            "reads": "; ".join(f"{side}: {', '.join(roles)}" for side, roles in card.reads.items()),
            "labels": ", ".join(card.labels),
            "averages over": card.averages,
            "batch": card.batch,
            "objective": str(dict(entry.objective)),
            "code": f"{card.code or 'none published'} ({card.code_licence or 'no licence stated'})",
            "golden": ", ".join(card.golden) or "none",
        }
        for name, value in rows.items():
            print(f"{name + ':':15}{value}")
        return
    found = catalogue.catalogue()
    if as_json:
        document([{"stem": s, "family": e.family, **asdict(e.card)} for s, e in found.items()])
        return
    width = max(len(stem) for stem in found)
    family = ""
    for name, entry in sorted(found.items(), key=lambda item: (item[1].family, item[0])):
        if entry.family != family:
            family = entry.family
            print(f"\n{family}")
        teacher = "" if entry.card.needs_teacher else "  (no teacher)"
        print(f"  {name:{width}}  {entry.card.title} ({entry.card.venue} {entry.card.year}){teacher}")
    print(f"\n{len(found)} methods. `tutelage methods STEM` shows one, `tutelage demo STEM` tries it.")
