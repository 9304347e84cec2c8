# SPDX-License-Identifier: Apache-2.0
"""The identity of a paper, and what must be known of its method before it is imported."""

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Averages = Literal["samples", "labelled", "tokens", "boxes"]


@dataclass(frozen=True, kw_only=True)
class Card:
    """One paper, as literals: read from the source text without importing torch.

    Args:
        name: the acronym as printed.
        title: the paper's title.
        authors: family names, comma separated.
        year: of publication.
        venue: conference or journal.
        paper: identifier such as `arxiv:1503.02531`.
        code: official code at a commit, `github:owner/name@commit`, or None.
        code_licence: licence of that code, or None.
        claims: what the paper says the method improves, in one sentence.
        reads: roles read from `student` and `teacher`, teacher modules lent (`borrows`), and those that a rebuilt
            student takes over (`rebuild`).
        labels: kinds of target the term understands; `none` when it reads no target.
        averages: what the returned mean runs over.
        batch: `independent` if the mean of two half batches equals the whole, else `coupled`.
        zero_at_teacher: the term is 0 when the student's signals equal the teacher's.
        adversarial: the term is not meant to fall under gradient descent on all its parameters.
        golden: claimed groups of golden numbers, `folder/group`.
        provenance: `paper`, or `reconstruction` where no official definition exists.
    """

    name: str
    title: str
    authors: str
    year: int
    venue: str
    paper: str
    claims: str
    reads: Mapping[str, tuple[str, ...]]
    code: str | None = None
    code_licence: str | None = None
    labels: tuple[Literal["hard", "soft", "none"], ...] = ("none",)
    averages: Averages = "samples"
    batch: Literal["independent", "coupled"] = "independent"
    zero_at_teacher: bool = False
    adversarial: bool = False
    golden: tuple[str, ...] = ()
    provenance: Literal["paper", "reconstruction"] = "paper"

    @property
    def needs_teacher(self) -> bool:
        """Whether the method reads anything of a teacher."""
        return bool(self.reads.get("teacher") or self.reads.get("borrows"))


@dataclass(frozen=True)
class Listing:
    """What the catalogue knows of one method file without importing it."""

    stem: str
    family: str
    card: Card
    objective: Mapping[str, Any] = field(default_factory=dict)


def read(path: Path) -> Listing | None:
    """Return the card and the `OBJECTIVE` of a method file, or None if it holds no card.

    Raises:
        ValueError: if the card is not made of literals.
    """
    card: Card | None = None
    objective: Mapping[str, Any] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)):
            continue
        name, value = node.targets[0].id, node.value
        try:
            if name == "CARD" and isinstance(value, ast.Call):
                card = Card(**{word.arg: ast.literal_eval(word.value) for word in value.keywords if word.arg})
            elif name == "OBJECTIVE":
                objective = ast.literal_eval(value)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path.name}: {name} must be made of literals only ({error})") from error
    return Listing(path.stem, path.parent.name, card, objective) if card else None
