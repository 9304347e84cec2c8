# SPDX-License-Identifier: Apache-2.0
"""Text to numbers: bytes, which need no file, or a tokenizer of transformers."""

from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, final

import numpy as np
import torch
from torch import Tensor

from tutelage.core.error import UserError
from tutelage.core.text import words_of


class Tokenizer(Protocol):
    """What text data needs of a tokenizer."""

    @property
    def size(self) -> int:
        """Number of tokens."""

    @property
    def pad(self) -> int:
        """Id that fills a sample up."""

    @property
    def end(self) -> int | None:
        """Id that ends a text, or None."""

    @property
    def mask(self) -> int | None:
        """Id that hides a token, or None."""

    @property
    def words(self) -> str:
        """What `words_of` says of the vocabulary."""

    def encode(self, text: str) -> Tensor:
        """Return `[T]` int64 ids, without special tokens."""

    def decode(self, ids: Tensor) -> str:
        """Return the text of ids; special tokens are left out."""


@final
class Bytes:
    """The bytes of UTF-8, and three tokens more: padding, end of text, hidden.

    Example:
        >>> Bytes().encode("é!")
        tensor([195, 169,  33])
        >>> Bytes().decode(torch.tensor([195, 169, 33, Bytes.end]))
        'é!'
    """

    size = 259
    pad, end, mask = 256, 257, 258

    @property
    def words(self) -> str:
        """The name of this vocabulary."""
        return words_of([*(str(byte) for byte in range(256)), "<pad>", "<end>", "<mask>"])

    def encode(self, text: str) -> Tensor:
        """Return `[T]` int64: one id a byte."""
        return torch.from_numpy(np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64))

    def decode(self, ids: Tensor) -> str:
        """Return the text of ids; what is no byte is left out, what is no UTF-8 replaced."""
        return bytes(ids[(ids >= 0) & (ids < 256)].tolist()).decode("utf-8", errors="replace")


@final
class Pretrained:
    """A tokenizer of transformers from its files.

    Args:
        place: a folder or file, or a name of the hub.
        download: fetch what is not in the hub's cache.

    Raises:
        UserError: if transformers is not installed, or the files cannot be had.
    """

    def __init__(self, place: str, *, download: bool = False) -> None:
        self.place = place
        try:
            from transformers import AutoTokenizer, PreTrainedTokenizerFast
        except ImportError as error:
            raise UserError(f"data.text.tokenizer {place!r} needs transformers: pip install 'tutelage[hf]'") from error
        try:
            if Path(place).is_file():
                self.own: Any = PreTrainedTokenizerFast(tokenizer_file=place)
            else:
                self.own = AutoTokenizer.from_pretrained(place, local_files_only=not download)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"data.text.tokenizer: {place!r} cannot be read ({str(error).splitlines()[0]}); give a folder "
                "with its files, or `bytes`"
            ) from error
        except Exception as error:  # its reader, written in Rust, raises the bare class on a damaged file
            raise UserError(f"data.text.tokenizer: {place!r} is damaged ({str(error).splitlines()[0]})") from error

    @cached_property
    def size(self) -> int:
        """Number of tokens, added ones included."""
        return len(self.own)

    @property
    def pad(self) -> int:
        """The id for padding; where the tokenizer has none, the end of a text or 0: it is masked anyway."""
        found = self.own.pad_token_id
        return int(found) if found is not None else (self.end or 0)

    @property
    def end(self) -> int | None:
        """The id that ends a text, or separates two."""
        found = self.own.eos_token_id if self.own.eos_token_id is not None else self.own.sep_token_id
        return None if found is None else int(found)

    @property
    def mask(self) -> int | None:
        """The id that hides a token, or None."""
        found = self.own.mask_token_id
        return None if found is None else int(found)

    @cached_property
    def words(self) -> str:
        """What `words_of` says of the vocabulary in the order of ids."""
        found: dict[str, int] = self.own.get_vocab()
        return words_of(sorted(found, key=lambda word: (found[word], word)))

    def encode(self, text: str) -> Tensor:
        """Return `[T]` int64."""
        return torch.tensor(self.own.encode(text, add_special_tokens=False, verbose=False), dtype=torch.int64)

    def decode(self, ids: Tensor) -> str:
        """Return the text of ids."""
        return str(self.own.decode(ids, skip_special_tokens=True))


def tokenizer(name: str, *, download: bool = False) -> Tokenizer:
    """Return a tokenizer: `bytes`, or the files of one of transformers.

    Args:
        name: `bytes`, a folder, or a name of the hub.
        download: fetch what is not in the hub's cache.

    Raises:
        UserError: if the files cannot be had.
    """
    return Bytes() if name == "bytes" else Pretrained(name, download=download)
