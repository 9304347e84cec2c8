# SPDX-License-Identifier: Apache-2.0
import io
from html.parser import HTMLParser

import pytest
from rich.console import Console

from tutelage.report.latex import escape
from tutelage.report.number import MINUS, MISSING
from tutelage.report.table import Table

HOSTILE = r"<script>a & b_c | *d* [red]e[/red] 50% #1 $x$ {y} \z ~^"


def written(table: Table) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(table.rich())
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


class Cells(HTMLParser):
    """The texts of all cells and the elements met, as a browser reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: list[str] = []
        self.inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag in ("td", "th"):
            self.inside = True
            self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.texts[-1] += data


def read(html: str) -> Cells:
    cells = Cells()
    cells.feed(html)
    return cells


def test_all_forms_say_the_same() -> None:
    table = Table(("method", "top-1 (%)"), (("KD", "93.4 ± 0.3"), ("alone", None)), title="Results", note="5 seeds")
    for form in (
        written(table),
        table.markdown(),
        table.html(),
        table.latex().replace(r"$\pm$", "±").replace("--", MISSING),
    ):
        for text in ("method", "KD", "93.4 ± 0.3", "alone", MISSING, "Results", "5 seeds"):
            assert text.replace("%", r"\%") in form or text in form


def test_hostile_text_stands_for_itself_in_every_form() -> None:
    table = Table(("a",), ((HOSTILE,),), title=HOSTILE, note=HOSTILE)
    found = read(table.html())
    assert found.texts == ["a", HOSTILE]
    assert "script" not in found.tags
    assert written(table).count(HOSTILE) == 3
    (line,) = (line for line in table.markdown().splitlines() if line.startswith("| <") or line.startswith(r"| \<"))
    assert line[2:-2].replace("\\", "") == HOSTILE.replace("\\", "")
    for sign in "|*_[]<>~$&":
        place = line.index(sign, 2)
        assert line[place - 1] == "\\"


@pytest.mark.parametrize("sign", list("&%$#_{}"))
def test_latex_escapes_by_a_backslash(sign: str) -> None:
    assert escape(f"a{sign}b") == f"a\\{sign}b"


def test_latex_has_no_command_that_was_not_written_by_us() -> None:
    text = escape(r"\input{/etc/passwd} ^ ~ <>" + f" {MINUS} ±")
    assert text == (
        r"\textbackslash{}input\{/etc/passwd\} \textasciicircum{} \textasciitilde{} "
        r"\textless{}\textgreater{} $-$ $\pm$"
    )


def test_a_bracket_after_a_row_is_not_the_row_break_s_argument() -> None:
    lines = Table(("a",), (("[1]",), ("[2]",))).latex().splitlines()
    assert [line.strip() for line in lines if "{[}" in line] == [r"{[}1{]} \\", r"{[}2{]} \\"]


def test_latex_has_as_many_separators_as_columns() -> None:
    lines = Table(("a", "b", "c"), (("1", "2", "3"), ("4", None, "6"))).latex().splitlines()
    rows = [line for line in lines if line.endswith(r" \\")]
    assert [row.count("&") for row in rows] == [2, 2, 2]
    assert r"\begin{tabular}{lrr}" in "\n".join(lines)


def test_markdown_lines_are_equally_wide_and_carry_the_alignment() -> None:
    lines = Table(("a", "long head", "c"), (("1", "2", "a longer cell"),), "lcr").markdown().splitlines()
    assert len({len(line) for line in lines}) == 1
    left, middle, right = (part.strip() for part in lines[1].strip("|").split("|"))
    assert (left[0], left[-1]) == (":", "-")
    assert (middle[0], middle[-1]) == (":", ":")
    assert (right[0], right[-1]) == ("-", ":")


def test_newlines_do_not_break_a_row() -> None:
    table = Table(("a", "b"), (("two\nlines", "x"),))
    assert len(table.markdown().splitlines()) == 3
    assert r"two lines & x \\" in table.latex()


def test_a_table_without_rows_is_a_head() -> None:
    table = Table(("a", "b"), ())
    assert len(table.markdown().splitlines()) == 2
    assert read(table.html()).texts == ["a", "b"]
    assert "a" in written(table)
    assert r"\midrule" in table.latex()


def test_rows_and_alignment_must_fit_the_head() -> None:
    with pytest.raises(ValueError, match="row 1 of Results has 1 cells for 2 columns"):
        Table(("a", "b"), (("1", "2"), ("3",)), title="Results")
    with pytest.raises(ValueError, match="alignment 'lx' does not fit 2 columns"):
        Table(("a", "b"), (), "lx")
