# SPDX-License-Identifier: Apache-2.0
"""`tutelage cite`: whom to cite."""

from typing import Annotated

import typer

from tutelage.cli._show import Json, document


def cite(
    recipe: Annotated[str, typer.Argument(help="A recipe: a YAML file, the name of a shipped one, or a run's folder.")],
    as_json: Json = False,
) -> None:
    """Print the papers of the methods that a recipe uses, as BibTeX."""
    from tutelage.run.cite import cards

    found = cards(recipe)
    if as_json:
        from dataclasses import asdict

        document([asdict(card) for card in found])
        return
    from tutelage.report.cite import bibliography

    print(bibliography(found))
