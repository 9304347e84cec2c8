# SPDX-License-Identifier: Apache-2.0
"""How every verb speaks: tables for people, one JSON document for programs."""

import json
import os
import sys
from collections.abc import Iterable
from typing import Annotated, Any

import typer

FIRST = os.environ.get("RANK", "0") == "0"

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Sets = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the recipe, e.g. optimizer.lr=0.05."),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, no remarks.")]


def document(value: Any) -> None:
    """Print a JSON document."""
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def remark(text: str) -> None:
    """Tell the user something beside the result; of several processes of a run, the first one speaks."""
    if FIRST:
        print(text, file=sys.stderr)


def scores_text(scores: Any) -> str:
    """Return scores as lines."""
    shown = {name: value for name, value in scores.items() if "/" not in name}  # those of a class are on the page
    width = max(12, *(len(name) + 2 for name in shown))
    return "\n".join(f"{name:{width}}{value:.4f}" for name, value in shown.items())


def finished(result: Any, as_json: bool) -> None:
    """Print what a run ended with; of several processes of a run, the first one speaks."""
    home = result.folder.path
    if not FIRST:
        return
    if as_json:
        measures = result.measures.plain()
        document({"scores": dict(result.scores), "measures": measures, "folder": str(home)})
    else:
        print(f"{scores_text(result.scores)}\n\n{home}/student.safetensors\n{home}/report.html")


def console() -> Any:
    """Return where tables are printed: as wide as the terminal, or 120 characters into a file."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False)


def tables_text(tables: Iterable[Any]) -> None:
    """Print tables; one without rows is left out."""
    screen = console()
    for table in tables:
        if table.rows:
            screen.print(table.rich())


def compared_text(compared: Any) -> None:
    """Print the tables and the verdict of a comparison, or of a grid of them."""
    tables_text(compared.tables)
    verdict = compared.verdict
    screen = console()
    for line in (verdict.sentence, *verdict.details):
        screen.print(line)
    print(f"\n{compared.folder}/report.html")


def checked_text(found: Any) -> None:
    """Print what `check` found."""
    tables_text((found.dry_run.signals(), found.dry_run.bridges(), found.table()))
    screen = console()
    for source, pixels in found.inputs.items():
        screen.print(f"{source} takes {pixels}")
    if found.teacher is not None:
        scores = ", ".join(f"{name} {value:.3f}" for name, value in found.teacher.items() if "/" not in name)
        screen.print(f"teacher on a few validation batches: {scores}")
    for heading, names in found.dry_run.remarks:
        screen.print(f"{heading}: {', '.join(names)}")
    for said in found.remarks:
        screen.print(f"look: {said}")
    screen.print(found.forecast)
