# SPDX-License-Identifier: Apache-2.0
"""What text a model reads: its vocabulary, its direction and its length."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TextSpec:
    """Tokens as data makes them and a model takes them.

    Args:
        vocabulary: number of tokens; ids lie in [0, vocabulary).
        length: tokens of a sample.
        causal: the model predicts each next token; otherwise tokens that were hidden.
        pad: id that fills a sample up; it is masked wherever it stands.
        end: id that ends a text, or None.
        mask: id that hides a token, or None.
        words: what `words_of` says of the vocabulary; empty if unknown.
    """

    vocabulary: int
    length: int
    causal: bool = True
    pad: int = 0
    end: int | None = None
    mask: int | None = None
    words: str = ""

    def blank(self, rows: int = 1) -> dict[str, Tensor]:
        """Return samples of token 0, as a model takes them."""
        ids = torch.zeros(rows, self.length, dtype=torch.long)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def __str__(self) -> str:
        direction = "next token" if self.causal else "hidden tokens"
        return f"{self.length} tokens of {self.vocabulary}, {direction}"


def words_of(words: Sequence[str]) -> str:
    """Return a short name of a vocabulary: equal for equal words in equal order.

    Example:
        >>> words_of(["a", "b"]) == words_of(["b", "a"])
        False
    """
    return hashlib.sha256("\0".join(words).encode("utf-8", "surrogatepass")).hexdigest()[:16]
