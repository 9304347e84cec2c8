# SPDX-License-Identifier: Apache-2.0
"""How every verb speaks: tables for people, one JSON document for programs."""

import json
import os
import sys
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
    return "\n".join(f"{name:12}{value:.4f}" for name, value in scores.items())


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


def compared_text(compared: Any) -> None:
    """Print the tables and the verdict of a comparison."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120)
    for table in compared.tables:
        console.print(table.rich())
    verdict = compared.comparison.verdict
    for line in (verdict.sentence, *verdict.details):
        console.print(line, highlight=False)
    console.print(f"\n{compared.folder}/report.html", highlight=False)


def checked_text(found: Any) -> None:
    """Print what `check` found."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120)
    for table in (found.dry_run.signals(), found.dry_run.bridges(), found.table()):
        if table.rows:
            console.print(table.rich())
    for source, pixels in found.inputs.items():
        console.print(f"{source} takes {pixels}", highlight=False)
    if found.teacher is not None:
        scores = ", ".join(f"{name} {value:.3f}" for name, value in found.teacher.items())
        console.print(f"teacher on a few validation batches: {scores}", highlight=False)
    for heading, names in found.dry_run.remarks:
        console.print(f"{heading}: {', '.join(names)}", highlight=False)
    for said in found.remarks:
        console.print(f"look: {said}", highlight=False)
    memory = f", {found.memory / 2**30:.1f} GiB on the device" if found.memory else ""
    console.print(f"{found.steps} steps, about {found.seconds / 60:.1f} minutes{memory}", highlight=False)
