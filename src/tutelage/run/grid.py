# SPDX-License-Identifier: Apache-2.0
"""Methods over several pairs of teacher and student: a comparison of each pair, and one table over all."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutelage.core.storage import write_text
from tutelage.report.environment import environment
from tutelage.report.page import Page, write
from tutelage.report.plot import scores, styles
from tutelage.report.table import Table
from tutelage.report.verdict import Verdict
from tutelage.run.compare import Compared, compare, undamaged
from tutelage.run.page import cards_of
from tutelage.run.recipe import Recipe, read_text

GRID = "grid.json"


@dataclass(frozen=True)
class Grid:
    """What the comparisons of several pairs ended with.

    Args:
        title: of its report.
        compared: by pair.
        folder: of all of them; each comparison has a folder in it.
    """

    title: str
    compared: Mapping[str, Compared]
    folder: Path

    @property
    def tables(self) -> tuple[Table]:
        """A row for each method of each pair."""
        parts = {pair: one.comparison.table() for pair, one in self.compared.items()}
        columns = tuple(dict.fromkeys(head for part in parts.values() for head in part.columns))
        rows = []
        for pair, part in parts.items():
            for row in part.rows:
                cells = dict(zip(part.columns, row, strict=True))
                rows.append((pair, *(cells.get(head) for head in columns)))
            rows += [(pair, name, *[None] * (len(columns) - 1)) for name in self.compared[pair].left_out]
        note = next(iter(parts.values())).note
        return (
            Table(("pair", *columns), rows, alignment="ll" + "r" * (len(columns) - 1), title=self.title, note=note),
        )

    @property
    def verdict(self) -> Verdict:
        """What each pair's differences allow to be said."""
        found = {pair: one.verdict for pair, one in self.compared.items()}
        kinds = {verdict.kind for verdict in found.values()}
        kind = next(one for one in ("gain", "unclear", "no gain", "not compared") if one in kinds)
        return Verdict(kind, " ".join(f"{pair}: {verdict.sentence}" for pair, verdict in found.items()), self._gaps())

    def _gaps(self) -> tuple[str, ...]:
        left = ((pair, name, why) for pair, one in self.compared.items() for name, why in one.left_out.items())
        return tuple(f"{name} does not fit {pair}: {why}" for pair, name, why in left)

    def plain(self) -> dict[str, Any]:
        """Return the grid as plain data."""
        return {"title": self.title, "pairs": {pair: one.plain() for pair, one in self.compared.items()}}

    @classmethod
    def read(cls, folder: Path) -> "Grid":
        """Return the grid that a folder holds.

        Raises:
            UserError: if it holds none, or a damaged one.
        """
        file = folder / GRID
        with undamaged(file):
            found = json.loads(read_text(file))
            places = {str(pair): folder / str(name) for pair, name in found["pairs"].items()}
            return cls(str(found["title"]), {pair: Compared.read(place) for pair, place in places.items()}, folder)

    def page(self, arms: Mapping[str, Mapping[str, Recipe]]) -> None:
        """Write the page of all pairs.

        Args:
            arms: recipes by pair and name.
        """
        plots = []
        for pair, one in self.compared.items():
            found = one.comparison
            looks = styles([*found.scores], found.baseline, "teacher")
            values = {arm: [*by_seed.values()] for arm, by_seed in found.scores.items()}
            plots.append(scores(values, found.metric, looks=looks, teacher=found.teacher, title=f"Scores: {pair}"))
        recipes = [recipe for pair in arms.values() for recipe in pair.values()]
        page = Page(
            title=self.title,
            lead=", ".join(f"{pair}: {one.folder.name}/report.html" for pair, one in self.compared.items()),
            verdict=self.verdict,
            tables=self.tables,
            plots=tuple(plots),
            environment=environment(),
            cards=cards_of({key: block for one in recipes for key, block in one.objective.items()}),
        )
        write(page, self.folder / "report.html")


def grid(
    arms: Mapping[str, Mapping[str, Recipe]],
    seeds: Sequence[int],
    folder: Path,
    *,
    title: str,
    quiet: bool = False,
    apart: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Grid:
    """Compare the arms of each pair; what has run is not run again.

    A method that does not fit a pair is left out there, and named.

    Args:
        arms: recipes by pair and name, each pair's baseline first.
        seeds: each arm runs with all of them.
        folder: of the grid.
        title: of its report.
        quiet: show no progress.
        apart: as for `compare`.
        say: told what has run.

    Raises:
        UserError: as `compare` does.
    """
    done = {}
    for pair, own in arms.items():
        say(f"{pair}:")
        heading = f"{pair}: {len(own)} ways to train one student"
        done[pair] = compare(own, seeds, folder / pair, title=heading, quiet=quiet, apart=apart, lenient=True, say=say)
    found = Grid(title, done, folder)
    write_text(folder / GRID, json.dumps({"title": title, "pairs": {p: c.folder.name for p, c in done.items()}}) + "\n")
    found.page(arms)
    return found
