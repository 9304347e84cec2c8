# SPDX-License-Identifier: Apache-2.0
"""`tutelage evaluate`: score a run's student on a split."""

from pathlib import Path
from typing import Annotated

import typer

from tutelage.cli._show import Json, document, scores_text


def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    data: Annotated[str | None, typer.Option(help="Other data than the run's own.")] = None,
    split: Annotated[str, typer.Option(help="validation or test.")] = "validation",
    as_json: Json = False,
) -> None:
    """Score the student of a run.

    What is printed was computed now, not read from the run.
    """
    from tutelage.run.evaluate import evaluate as score

    scores = score(run, source=data, split=split)
    if as_json:
        document(scores)
    else:
        print(scores_text(scores))
