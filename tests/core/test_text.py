# SPDX-License-Identifier: Apache-2.0
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tutelage.core import Batch, Tap, TextSpec
from tutelage.core.error import UserError
from tutelage.core.tap import Recorder
from tutelage.core.text import words_of


def test_a_part_of_a_layer_that_gives_several_tensors() -> None:
    network = nn.Sequential(nn.Linear(4, 6))
    taps = {name: Tap.parse({"where": "0", "part": [number, 3]}) for number, name in enumerate("qkv")}
    found, whole = recorded(network, taps)
    assert torch.equal(torch.cat([found["q"], found["k"], found["v"]], -1), whole)
    assert taps["k"].name == "0(1 of 3)"
    assert taps["k"] == Tap("0", part=(1, 3))
    assert hash(taps["k"]) == hash(Tap("0", part=(1, 3)))


def recorded(network: nn.Module, taps: dict[str, Tap]) -> tuple[dict[str, Tensor], Tensor]:
    recorder = Recorder(network, taps)
    with recorder:
        whole = network(torch.randn(2, 5, 4))
    return recorder.release(), whole


@pytest.mark.parametrize("part", [[3, 3], [-1, 2], [1], [0, 1, 2]])
def test_a_part_that_is_none(part: list[int]) -> None:
    said = f"tap 'x': part is [which, of how many], such as [0, 3], not {part}"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        Tap.parse({"where": "x", "part": part})


def test_parts_must_be_equal() -> None:
    said = "tap 0(0 of 3): its last dimension, 7, has no 3 equal parts"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        recorded(nn.Sequential(nn.Linear(4, 7)), {"q": Tap("0", part=(0, 3))})


def text(**more: Any) -> Batch:
    ids = torch.zeros(2, 3, dtype=torch.long)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    return Batch.of({"input_ids": ids, "attention_mask": mask}, torch.zeros(2), **more)


def test_masks_of_a_batch() -> None:
    batch = text(extra={"token_mask": torch.tensor([[1, 0, 0], [1, 1, 0]])})
    assert batch.token_mask.tolist() == [[True, False, False], [True, True, False]]
    assert batch.attention_mask.tolist() == [[True, True, False], [True, True, True]]
    assert batch.count("tokens") == 3
    assert [part.count("tokens").item() for part in batch.split(2)] == [1, 2]


def test_masks_that_are_missing() -> None:
    with pytest.raises(UserError, match="which tokens count"):
        _ = text().token_mask
    with pytest.raises(UserError, match="what is padding"):
        _ = Batch.of(torch.zeros(2, 3)).attention_mask


def test_a_vocabulary_is_known_by_its_words_in_order() -> None:
    assert words_of(["a", "b"]) == words_of(("a", "b"))
    assert len({words_of(words) for words in (["a", "b"], ["b", "a"], ["ab"], ["a", "", "b"])}) == 4
    assert str(TextSpec(259, 64)) == "64 tokens of 259, next token"
    assert str(TextSpec(259, 64, causal=False)) == "64 tokens of 259, hidden tokens"
