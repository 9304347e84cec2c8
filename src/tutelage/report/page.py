# SPDX-License-Identifier: Apache-2.0
"""One page of a run or a comparison: a single file that shows and loads nothing from elsewhere."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from tutelage.core.card import Card
from tutelage.core.storage import write_text
from tutelage.report.cite import bibliography, link
from tutelage.report.dry_run import DryRun
from tutelage.report.gallery import Gallery
from tutelage.report.plot import Plot
from tutelage.report.table import Table
from tutelage.report.verdict import Verdict


@dataclass(frozen=True)
class Page:
    """What a page shows, as plain data; an empty part leaves its section out.

    Args:
        title: the heading.
        lead: a line below it: teacher, student, data.
        verdict: what the numbers allow to be said.
        tables: results, size and speed.
        plots: in the order of showing.
        gallery: pictures side by side.
        dry_runs: what was found at build, by label of the run.
        recipe: the resolved recipe as YAML.
        environment: what it ran on.
        cards: of the methods used.
        loading: Python that loads the student.
    """

    title: str
    lead: str = ""
    verdict: Verdict | None = None
    tables: tuple[Table, ...] = ()
    plots: tuple[Plot, ...] = ()
    gallery: Gallery = field(default_factory=Gallery)
    dry_runs: Mapping[str, DryRun] = field(default_factory=dict)
    recipe: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    cards: tuple[Card, ...] = ()
    loading: str = ""

    def html(self) -> str:
        """Return the page; every text is escaped."""
        home = Path(__file__).parent
        engine = Environment(
            loader=FileSystemLoader(home),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
        )
        style = Markup((home / "page.css").read_text(encoding="utf-8"))
        return engine.get_template("page.html.jinja").render(
            page=self, style=style, bibliography=bibliography(self.cards), link=link
        )


def write(page: Page, path: Path) -> None:
    """Write a page whole or not at all: under a temporary name, then renamed.

    Raises:
        UserError: if it cannot be written; what was there before is untouched.
    """
    write_text(path, page.html())
