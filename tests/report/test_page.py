# SPDX-License-Identifier: Apache-2.0
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tutelage.core import Card
from tutelage.core.error import UserError
from tutelage.methods import cards
from tutelage.report.dry_run import DryRun, Layer
from tutelage.report.metric import Metric
from tutelage.report.number import TIMES
from tutelage.report.page import Page, write
from tutelage.report.paired import paired
from tutelage.report.plot import curves, scores
from tutelage.report.table import Table
from tutelage.report.verdict import Verdict

TOP1 = Metric.of("top1")
HOSTILE = "<img/on=1>\"'&"  # short enough for one line of a plot


class Reader(HTMLParser):
    """The elements, attributes and texts of a page; complains about elements left open."""

    VOID = ("meta", "br", "img", "link", "hr", "input")

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(page: Page) -> Reader:
    reader = Reader()
    reader.feed(page.html())
    assert reader.open == []
    return reader


def full(text: str = "KD") -> Page:
    """Return a page with every section, this text in each."""
    words: dict[str, Any] = dict.fromkeys(("name", "title", "authors", "venue", "paper", "claims"), text)
    card = Card(**words, year=2020, reads={}, provenance="reconstruction")
    runs = {text: [[(1.0, 0.5), (2.0, 0.6)], [(1.0, 0.6), (2.0, 0.7)]]}
    found = DryRun({text: {text: (2, 3)}}, (Layer(text, text, text, 4),), (text,), (text,))
    return Page(
        title=text,
        lead=text,
        verdict=Verdict("unclear", text, (text,)),
        tables=(Table((text, "n"), ((text, None),), title=text, note=text),),
        plots=(curves(runs, TOP1, title=text), scores({text: [0.5]}, TOP1, title=text)),
        dry_runs={text: found, f"{text} 2": found},
        recipe=text,
        environment={text: text},
        cards=(card, cards()["kd"]),
        loading=text,
    )


def test_a_page_shows_every_section() -> None:
    reader = read(full("the text"))
    ids = {value for tag, name, value in reader.attributes if (tag, name) == ("section", "id")}
    assert ids == {"numbers", "plots", "student", "dry-run", "recipe", "environment", "citations"}
    assert reader.tags.count("svg") == 2
    assert reader.tags.count("table") == 1 + 2 * 2
    for words in (
        "@misc{hinton2015kd",
        "no official definition exists",
        "no loss reaches",
        f"2 {TIMES} 3",
        "1 signal, 1 bridge",
    ):
        assert words in reader.text


def test_every_text_is_escaped() -> None:
    plain, hostile = read(full("x")), read(full(HOSTILE))
    assert "img" not in hostile.tags
    assert hostile.tags == plain.tags
    assert not [name for _, name, _ in hostile.attributes if name.startswith("on")]
    assert hostile.text.count(HOSTILE) >= 20


def test_the_page_stands_alone() -> None:
    reader = read(full())
    loading = [
        (tag, name, value)
        for tag, name, value in reader.attributes
        if name in ("src", "srcset", "href", "xlink:href", "data", "poster", "action") and not value.startswith("#")
    ]
    assert loading == [("a", "href", "https://arxiv.org/abs/1503.02531")]
    assert not {"script", "link", "iframe", "img", "base"} & set(reader.tags)
    html = full().html()
    assert not re.search(r"@import|@font-face|url\((?!#)", html)
    assert "default-src 'none'" in html
    assert "prefers-color-scheme: dark" in html


def test_ids_are_unique() -> None:
    names = [value for _, name, value in read(full()).attributes if name == "id"]
    assert len(names) > 7
    assert len(names) == len(set(names))


def test_an_empty_page_is_a_title() -> None:
    reader = read(Page(title="Nothing yet"))
    assert "section" not in reader.tags
    assert "Nothing yet" in reader.text


@pytest.mark.parametrize(
    ("values", "kind"),
    [((0.8, 0.83), "gain"), ((0.6, 0.63), "no gain"), ((0.6, 0.83), "unclear")],
)
def test_the_verdict_is_the_one_the_numbers_give(values: tuple[float, float], kind: str) -> None:
    pairs = paired(dict(enumerate(values)), {0: 0.7, 1: 0.73 - 0.001})
    verdict = Verdict.of_comparison(TOP1, "alone", {"KD": pairs})
    reader = read(Page(title="t", verdict=verdict))
    assert verdict.kind == kind
    assert ("section", "class", f"verdict {kind.replace(' ', '-')}") in reader.attributes
    assert verdict.sentence in reader.text


def test_each_kind_of_verdict_has_its_colour() -> None:
    html = Page(title="t").html()
    for kind in ("gain", "no-gain", "unclear"):
        assert f".verdict.{kind} {{ --tone" in html


def test_the_same_page_is_the_same_text() -> None:
    assert full().html() == full().html()


def test_writing_leaves_the_page_alone_in_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "run" / "report.html"
    write(Page(title="é"), path)
    write(Page(title="ü"), path)
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    assert "<h1>ü</h1>" in path.read_text(encoding="utf-8")


def test_a_failed_write_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    write(Page(title="old"), path)
    before = path.read_bytes()

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(UserError, match=r"report\.html.*disk is full"):
        write(Page(title="new"), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_a_reader_never_meets_half_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    write(Page(title="old"), path)
    seen: list[str] = []
    sync = os.fsync

    def look(descriptor: int) -> None:
        seen.append(path.read_text(encoding="utf-8"))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", look)
    write(Page(title="new"), path)
    assert [("<h1>old</h1>" in text, "</html>" in text) for text in seen] == [(True, True)]


def test_a_page_that_cannot_be_made_writes_nothing(tmp_path: Path) -> None:
    broken: Any = object()
    with pytest.raises(Exception, match="has no attribute"):
        write(Page(title="t", tables=(broken,)), tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []
