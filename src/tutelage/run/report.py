# SPDX-License-Identifier: Apache-2.0
"""The page and the tables of what has run, made again from what lies in its folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutelage.core.error import UserError, nearest
from tutelage.report.table import Table
from tutelage.run.compare import COMPARISON, Compared
from tutelage.run.folder import RunFolder
from tutelage.run.grid import GRID, Grid
from tutelage.run.page import comparison_page, run_page, run_tables
from tutelage.run.recipe import Recipe

FORMS = ("html", "latex", "markdown")


@dataclass(frozen=True)
class Report:
    """What a folder has to tell.

    Args:
        tables: scores, then size and speed.
        plain: the same as plain data.
        page: the file of the page.
    """

    tables: tuple[Table, ...]
    plain: dict[str, Any]
    page: Path

    def text(self, form: str) -> str:
        """Return the tables as `markdown`, `latex` or `html`.

        Raises:
            UserError: on another form.
        """
        if form not in FORMS:
            raise UserError(f"--to {form!r} is not known{nearest(form, FORMS)}")
        return "\n\n".join(str(getattr(table, form)()) for table in self.tables)


def report(folder: Path, *, write: bool = True) -> Report:
    """Return what a run, a comparison or a grid of comparisons has to tell.

    Args:
        folder: of any of them.
        write: the page again; of a grid, those of its comparisons too.

    Raises:
        UserError: if it holds none that is finished.
    """
    if (folder / GRID).is_file():
        found = Grid.read(folder)
        if write:
            for one in found.compared.values():
                comparison_page(one, _arms(one))
            found.page({pair: _arms(one) for pair, one in found.compared.items()})
        return Report(found.tables, found.plain(), folder / "report.html")
    if (folder / COMPARISON).is_file():
        compared = Compared.read(folder)
        if write:
            comparison_page(compared, _arms(compared))
        return Report(compared.tables, compared.plain(), folder / "report.html")
    home = RunFolder(folder)
    result = home.result()
    if result is None:
        raise UserError(f"{folder} holds neither a finished run nor a comparison")
    try:
        tables = run_tables(result)
        if write:
            run_page(home, home.recipe(), result)
    except (KeyError, TypeError) as error:
        raise UserError(f"{home.result_path} is damaged ({error}); give the command of the run again") from error
    return Report(tables, result, home.report)


def _arms(compared: Compared) -> dict[str, Recipe]:
    """Return the recipe of each arm, as its first run kept it."""
    return {arm: RunFolder(next(iter(runs.values()))).recipe() for arm, runs in compared.runs.items()}
