# SPDX-License-Identifier: Apache-2.0
"""`tutelage compare`: methods side by side over paired seeds."""

from pathlib import Path
from typing import Annotated

import typer

from tutelage.cli._show import Json, Quiet, Sets, compared_text, document, remark


def compare(
    recipes: Annotated[list[str], typer.Argument(help="Recipes: files or names of shipped ones.")],
    methods: Annotated[
        str | None,
        typer.Option(help="Methods tried on the first recipe, e.g. kd,nkd,kd+mgd: each with its own weights."),
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds, e.g. 0,1,2; the recipe's own, or five, by default.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder; runs/compare-NAME by default.")] = None,
    apart: Annotated[
        bool, typer.Option("--apart", help="One arm after another: slower, in the memory of one student.")
    ] = False,
    sets: Sets = [],  # noqa: B006  (typer reads the default)
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run recipes, or methods on one recipe, over the same seeds.

    Arms of one seed go side by side, and a teacher answers each batch once for all of them. The student alone, with
    plain and with smoothed labels, is always among them. What has run is not run again.
    """
    from tutelage.run.compare import asked, compare

    arms, chosen = asked(recipes, methods, seeds, sets)
    first = Path(recipes[0])
    # a run's recipe is called after its folder
    name = first.parent.name if first.stem == "recipe" and first.parent.name else first.stem
    compared = compare(
        arms,
        chosen,
        out or Path("runs", f"compare-{name}"),
        title=f"{name}: {len(arms)} ways to train one student",
        quiet=quiet,
        apart=apart,
        say=(lambda text: None) if quiet else remark,
    )
    if as_json:
        document(compared.plain())
    else:
        compared_text(compared)
