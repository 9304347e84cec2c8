# SPDX-License-Identifier: Apache-2.0
"""A small table, written the same in the terminal, in Markdown, HTML and LaTeX."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from markupsafe import Markup

from tutelage.report.latex import escape
from tutelage.report.number import MISSING

if TYPE_CHECKING:
    from rich.table import Table as RichTable

Justify = Literal["left", "center", "right"]
JUSTIFY: dict[str, Justify] = {"l": "left", "c": "center", "r": "right"}
RULE = {"l": ":-{}", "c": ":{}:", "r": "-{}:"}
MARKDOWN = re.compile(r"([\\`*_\[\]<>|~$&])")


@dataclass(frozen=True)
class Table:
    """Texts in rows and columns; numbers are written before (`tutelage.report.number`), so all forms agree.

    Args:
        columns: heads.
        rows: one text a column; None is missing and shown as an en dash.
        alignment: one of `l`, `c`, `r` a column; by default the first column is left, the others right.
        title: above the table.
        note: below it.

    Raises:
        ValueError: if a row or the alignment has another number of columns than the head.

    Example:
        >>> print(Table(("method", "top-1 (%)"), (("KD", "93.4 ± 0.3"), ("teacher", None))).markdown())
        | method  |  top-1 (%) |
        | :------ | ---------: |
        | KD      | 93.4 ± 0.3 |
        | teacher |          – |
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str | None]]
    alignment: str = ""
    title: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        width = len(self.columns)
        if not self.alignment:
            object.__setattr__(self, "alignment", ("l" + "r" * width)[:width])
        if len(self.alignment) != width or set(self.alignment) - set(RULE):
            raise ValueError(f"alignment {self.alignment!r} does not fit {width} columns: one of l, c, r for each")
        for number, row in enumerate(self.rows):
            if len(row) != width:
                raise ValueError(f"row {number} of {self.title or 'a table'} has {len(row)} cells for {width} columns")

    @property
    def cells(self) -> list[list[str]]:
        """The rows with what is missing filled in."""
        return [[MISSING if cell is None else cell for cell in row] for row in self.rows]

    def rich(self) -> RichTable:
        """Return the table for a rich console; cells are plain text, never console markup."""
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        made = RichTable(
            title=Text(self.title, style="bold") if self.title else None,
            caption=Text(self.note, style="dim") if self.note else None,
            title_justify="left",
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
        )
        for column, side in zip(self.columns, self.alignment, strict=True):
            made.add_column(Text(column), justify=JUSTIFY[side], overflow="fold")
        for row in self.cells:
            made.add_row(*(Text(cell) for cell in row))
        return made

    def markdown(self) -> str:
        """Return a GitHub-flavoured table, aligned in its source; the title is bold, the note italic."""
        lines = [[_markdown(cell) for cell in line] for line in (self.columns, *self.cells)]
        widths = [max(3, *(len(line[n]) for line in lines)) for n in range(len(self.columns))]
        pad = {"l": str.ljust, "c": str.center, "r": str.rjust}
        text = [
            "| " + " | ".join(pad[s](c, w) for c, w, s in zip(line, widths, self.alignment, strict=True)) + " |"
            for line in lines
        ]
        rule = [RULE[side].format("-" * (width - 2)) for side, width in zip(self.alignment, widths, strict=True)]
        text.insert(1, "| " + " | ".join(rule) + " |")
        above = [f"**{_markdown(self.title)}**", ""] if self.title else []
        below = ["", f"_{_markdown(self.note)}_"] if self.note else []
        return "\n".join([*above, *text, *below])

    def html(self) -> Markup:
        """Return a table element in a frame that scrolls sideways where the page is narrower."""
        kinds = [f' class="{side}"' for side in self.alignment]
        head = Markup("").join(
            Markup('<th scope="col"{}>{}</th>').format(Markup(kind), column)
            for kind, column in zip(kinds, self.columns, strict=True)
        )
        body = Markup("\n").join(self._row(row, kinds) for row in self.cells)
        caption = Markup("<caption>{}</caption>\n").format(self.title) if self.title else Markup("")
        note = Markup('\n<p class="note">{}</p>').format(self.note) if self.note else Markup("")
        name = self.title or "table"
        return Markup(
            '<div class="table">\n<div class="scroll" role="region" tabindex="0" aria-label="{}">\n'
            "<table>\n{}<thead><tr>{}</tr></thead>\n<tbody>\n{}\n</tbody>\n</table>\n</div>{}\n</div>"
        ).format(name, caption, head, body, note)

    def _row(self, row: Sequence[str], kinds: Sequence[str]) -> Markup:
        """Return one row; its first cell is its head."""
        cells = [
            Markup('<th scope="row"{}>{}</th>' if n == 0 else "<td{}>{}</td>").format(Markup(kind), cell)
            for n, (kind, cell) in enumerate(zip(kinds, row, strict=True))
        ]
        return Markup("<tr>{}</tr>").format(Markup("").join(cells))

    def latex(self) -> str:
        """Return a `table` environment with the rules of the booktabs package, every text escaped."""
        lines = [" & ".join(escape(cell) for cell in line) + r" \\" for line in (self.columns, *self.cells)]
        head = [r"\begin{table}", r"  \centering"] + ([rf"  \caption{{{escape(self.title)}}}"] if self.title else [])
        note = [rf"  \par\smallskip\footnotesize {escape(self.note)}"] if self.note else []
        body = [
            rf"  \begin{{tabular}}{{{self.alignment}}}",
            r"    \toprule",
            f"    {lines[0]}",
            r"    \midrule",
        ]
        body += [f"    {line}" for line in lines[1:]] + [r"    \bottomrule", r"  \end{tabular}"]
        return "\n".join([*head, *body, *note, r"\end{table}"])


def _markdown(text: str) -> str:
    return MARKDOWN.sub(r"\\\1", " ".join(text.split()))
