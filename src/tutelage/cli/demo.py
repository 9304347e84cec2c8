# SPDX-License-Identifier: Apache-2.0
"""`tutelage demo`: a small honest experiment on data that comes with the package."""

from pathlib import Path
from typing import Annotated

import typer

from tutelage.cli._show import Json, Quiet, compared_text, document, remark


def demo(
    stem: Annotated[str | None, typer.Argument(help="A method; without one, the tour: alone, KD, MGD + KD.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder; runs/demo or runs/demo-STEM by default.")] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Show what a method brings, on real digits.

    Baseline and method are trained over paired seeds; printed are both with their spread, the difference
    and the wins.
    """
    from tutelage.run.demo import demo_recipe

    recipe = demo_recipe(stem)
    from tutelage.run.compare import arms_of, compare

    compared = compare(
        arms_of(recipe),
        recipe.compare.seeds if recipe.compare else (),
        out or Path("runs", f"demo-{stem}" if stem else "demo"),
        title=f"tutelage demo{f' {stem}' if stem else ''}",
        quiet=quiet,
        say=(lambda text: None) if quiet else remark,
    )
    if as_json:
        document(compared.plain())
    else:
        compared_text(compared)
