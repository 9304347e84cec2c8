# SPDX-License-Identifier: Apache-2.0
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tiny_text import words_folder
from tutelage.core.error import UserError
from tutelage.data.tokenizer import Bytes, Pretrained, tokenizer


@given(st.text())
def test_bytes_come_back(text: str) -> None:
    ids = Bytes().encode(text)
    assert Bytes().decode(ids) == text
    assert len(ids) == len(text.encode())
    assert not (ids >= 256).any()


def test_special_tokens_are_apart_and_left_out() -> None:
    found = Bytes()
    assert sorted({found.pad, found.end, found.mask}) == [256, 257, 258]
    assert found.size == 259
    assert found.decode(torch.tensor([found.end, 104, found.mask, 105, found.pad])) == "hi"
    assert found.decode(torch.tensor([255])) == "\ufffd"


def test_a_tokenizer_of_transformers(tmp_path: Path) -> None:
    found = tokenizer(words_folder(tmp_path, ["the", "cat", "sat", "on", "mat"]))
    assert isinstance(found, Pretrained)
    ids = found.encode("the cat sat")
    assert found.decode(ids) == "the cat sat"
    assert found.size == 9
    assert {found.pad, found.end, found.mask} == {0, 2, 3}
    assert ids.tolist() == [4, 5, 6]


def test_a_vocabulary_is_told_from_another(tmp_path: Path) -> None:
    one, same, other = (
        tokenizer(words_folder(tmp_path / name, words.split())).words
        for name, words in (("one", "the cat"), ("same", "the cat"), ("other", "cat the"))
    )
    assert one == same
    assert len({one, other, Bytes().words}) == 3


def test_nothing_is_fetched() -> None:
    said = "data.text.tokenizer: 'nobody/such-a-tokenizer' cannot be read ("
    with pytest.raises(UserError, match=f"^{re.escape(said)}"):
        tokenizer("nobody/such-a-tokenizer")


def test_a_damaged_file(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text('{"version": "1.0"')
    with pytest.raises(UserError, match=r"^data\.text\.tokenizer: '.*tokenizer\.json' is damaged \("):
        tokenizer(str(file))
