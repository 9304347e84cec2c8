# SPDX-License-Identifier: Apache-2.0
"""How to cite the methods used, from their cards."""

import re
import unicodedata
from collections.abc import Iterable

from tutelage.core.card import Card
from tutelage.report.latex import escape


def bibtex(card: Card) -> str:
    """Return a paper as a BibTeX entry.

    The entry is a `@misc`, which needs no knowledge of whether a venue is a journal or a conference. Authors
    are family names, as on the card; capitals of the title are kept.

    Example:
        >>> from tutelage.methods import cards
        >>> print(bibtex(cards()["kd"]))
        @misc{hinton2015kd,
          author = {Hinton and Vinyals and Dean},
          title = {{Distilling the Knowledge in a Neural Network}},
          year = {2015},
          howpublished = {NeurIPS Deep Learning Workshop 2014},
          eprint = {1503.02531},
          archivePrefix = {arXiv},
          url = {https://arxiv.org/abs/1503.02531},
        }
    """
    names = [name.strip() for name in card.authors.split(",") if name.strip()]
    fields = {
        "author": " and ".join(_author(name) for name in names),
        "title": f"{{{escape(card.title)}}}",
        "year": str(card.year),
        "howpublished": escape(card.venue),
        **_source(card.paper),
    }
    body = "".join(f"  {key} = {{{value}}},\n" for key, value in fields.items() if value)
    return f"@misc{{{key(card)},\n{body}}}"


def bibliography(cards: Iterable[Card]) -> str:
    """Return the entries of several papers, each paper once, in the order given."""
    return "\n\n".join(dict.fromkeys(bibtex(card) for card in cards))


def key(card: Card) -> str:
    """Return a citation key: first author, year and the method's name, in ASCII letters and digits."""
    first = card.authors.partition(",")[0]
    words = f"{first}{card.year}{card.name}".lower().replace("+", "p")
    plain = unicodedata.normalize("NFKD", words).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]", "", plain)


def link(paper: str) -> str:
    """Return where a paper can be read, or nothing for an identifier that leads nowhere.

    Example:
        >>> link("arxiv:1503.02531")
        'https://arxiv.org/abs/1503.02531'
    """
    scheme, _, rest = paper.partition(":")
    if scheme in ("http", "https"):
        return paper
    home = {
        "arxiv": "https://arxiv.org/abs/",
        "doi": "https://doi.org/",
        "github": "https://github.com/",
    }.get(scheme)
    return f"{home}{rest}" if home and rest else ""


def _source(paper: str) -> dict[str, str]:
    scheme, _, rest = paper.partition(":")
    if scheme == "arxiv":
        return {"eprint": rest, "archivePrefix": "arXiv", "url": link(paper)}
    if scheme == "doi":
        return {"doi": rest, "url": link(paper)}
    return {"url": link(paper)} if link(paper) else {"note": escape(paper)}


def _author(name: str) -> str:
    if name.lower().rstrip(".") in ("et al", "and others"):
        return "others"
    return f"{{{escape(name)}}}" if " " in name else escape(name)
