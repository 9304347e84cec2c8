# SPDX-License-Identifier: Apache-2.0
"""`tutelage report`: the page and the tables of what has run."""

from pathlib import Path
from typing import Annotated

import typer

from tutelage.cli._show import Json, document


def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a run or of a comparison.")],
    to: Annotated[str | None, typer.Option(help="Print the tables as markdown, latex or html instead.")] = None,
    as_json: Json = False,
) -> None:
    """Write the page of a run or a comparison again, or print its tables for a paper."""
    from tutelage.run.report import report as tell

    found = tell(folder, write=to is None and not as_json)
    if as_json:
        document(found.plain)
    elif to is not None:
        print(found.text(to))
    else:
        print(found.page)
