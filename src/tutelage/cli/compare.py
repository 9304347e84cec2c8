# SPDX-License-Identifier: Apache-2.0
"""`tutelage compare`: methods side by side over paired seeds."""

from pathlib import Path
from typing import Annotated, Any

import typer

from tutelage.cli._show import Json, Quiet, Sets, compared_text, document, remark


def compare(
    recipes: Annotated[list[str], typer.Argument(help="Recipes: files or names of shipped ones.")],
    methods: Annotated[
        str | None,
        typer.Option(help="Methods tried on every recipe, e.g. kd,nkd,kd+mgd: each with its own weights."),
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
    """Run recipes, or methods on one recipe or several, over the same seeds.

    Arms of one seed go side by side, and a teacher answers each batch once for all of them. The student alone, with
    plain and with smoothed labels, is always among them. Methods on several recipes, such as the pairs of a table, make
    a grid: a comparison of each pair, and one table over all. What has run is not run again.
    """
    from tutelage.run.compare import asked, compare
    from tutelage.run.grid import grid

    pairs, chosen = asked(recipes, methods, seeds, sets)
    name, arms = next(iter(pairs.items()))
    home = out or Path("runs", f"compare-{name}")
    how: dict[str, Any] = {"quiet": quiet, "apart": apart, "say": (lambda text: None) if quiet else remark}
    if len(pairs) == 1:
        compared: Any = compare(arms, chosen, home, title=f"{name}: {len(arms)} ways to train one student", **how)
    else:
        compared = grid(pairs, chosen, home, title=f"{len(arms)} ways to train {len(pairs)} students", **how)
    if as_json:
        document(compared.plain())
    else:
        compared_text(compared)
