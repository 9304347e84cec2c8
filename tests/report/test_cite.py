# SPDX-License-Identifier: Apache-2.0
import re
from typing import Any

import pytest

from tutelage.core import Card
from tutelage.methods import cards
from tutelage.report.cite import bibliography, bibtex, key, link


def card(**changes: Any) -> Card:
    given: dict[str, Any] = {
        "name": "KD",
        "title": "A Title",
        "authors": "Smith, Doe",
        "year": 2020,
        "venue": "CVPR",
        "paper": "arxiv:2001.00001",
        "claims": "",
        "reads": {},
    }
    return Card(**given | changes)


def fields(entry: str) -> dict[str, str]:
    return dict(re.findall(r"^  (\w+) = \{(.*)\},$", entry, flags=re.MULTILINE))


def test_an_entry_holds_what_the_card_says() -> None:
    entry = bibtex(card())
    assert entry.startswith("@misc{smith2020kd,\n")
    assert fields(entry) == {
        "author": "Smith and Doe",
        "title": "{A Title}",
        "year": "2020",
        "howpublished": "CVPR",
        "eprint": "2001.00001",
        "archivePrefix": "arXiv",
        "url": "https://arxiv.org/abs/2001.00001",
    }


def test_names_of_several_words_stay_whole_and_the_rest_are_others() -> None:
    assert fields(bibtex(card(authors="van den Oord, Li, et al.")))["author"] == "{van den Oord} and Li and others"


def test_special_characters_are_escaped() -> None:
    found = fields(bibtex(card(title="50% & more_{x}", venue="R&D")))
    assert found["title"] == r"{50\% \& more\_\{x\}}"
    assert found["howpublished"] == r"R\&D"


@pytest.mark.parametrize(
    ("paper", "url", "extra"),
    [
        ("doi:10.1000/x", "https://doi.org/10.1000/x", {"doi": "10.1000/x"}),
        ("https://example.org/p", "https://example.org/p", {}),
        ("private note", "", {"note": "private note"}),
    ],
)
def test_other_identifiers_lead_where_they_can(paper: str, url: str, extra: dict[str, str]) -> None:
    assert link(paper) == url
    found = fields(bibtex(card(paper=paper)))
    assert {name: found.get(name) for name in ("doi", "note") if name in found} == extra
    assert found.get("url", "") == url


def test_keys_are_plain_letters_and_digits() -> None:
    assert key(card(authors="Müller-Łuk, X", name="Logit-Std++")) == "mulleruk2020logitstdpp"


def test_a_paper_is_listed_once() -> None:
    one, two = card(), card(name="DKD")
    assert bibliography([one, two, one]).count("@misc{") == 2
    assert bibliography([]) == ""


def test_every_method_of_the_catalogue_can_be_cited() -> None:
    found = cards()
    assert len(found) >= 2
    entries = {stem: bibtex(one) for stem, one in found.items()}
    for stem, entry in entries.items():
        assert entry.count("{") == entry.count("}"), stem
        assert {"author", "title", "year", "howpublished"} <= fields(entry).keys(), stem
    assert len({key(one) for one in found.values()}) == len(set(entries.values()))
