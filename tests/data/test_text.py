# SPDX-License-Identifier: Apache-2.0
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_text import words_folder
from tutelage.core import Batch, TextSpec
from tutelage.core.error import UserError
from tutelage.data.load import load
from tutelage.data.text import TRAIN_MODULES, VALIDATION_MODULES, Options, Texts, texts
from tutelage.data.tokenizer import Bytes

NEXT = TextSpec(vocabulary=259, length=4, pad=256, end=257, mask=258)
HIDDEN = TextSpec(vocabulary=259, length=400, causal=False, pad=256, end=257, mask=258)


def ids(*lengths: int) -> list[Tensor]:
    """Texts that count on: 0, 1, 2, ..."""
    edges = torch.tensor((0, *lengths)).cumsum(0).tolist()
    return [torch.arange(a, b) for a, b in pairwise(edges)]


def batch_of(found: Texts, *index: int, train: bool = False, view: Tensor | None = None) -> Batch:
    rows = torch.tensor(index)
    plain = Batch.of(found.read_many(rows), found.targets[rows], index=rows)
    if view is not None:
        plain = Batch.of(found.read_many(rows), found.targets[rows], index=rows, view=view)
    return found.compose(plain, train=train)


# next tokens


def test_every_token_of_running_text_is_asked_for_once() -> None:
    found = Texts.blocks(ids(7, 3), NEXT, 0.0, "x")  # 12 tokens with two ends: two blocks of 4
    assert len(found) == 2
    batch = batch_of(found, 0, 1)
    assert batch.inputs["input_ids"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 257]]
    assert batch.target.tolist() == [[1, 2, 3, 4], [5, 6, 257, 7]]
    assert batch.inputs["attention_mask"].all()
    assert batch.token_mask.all()
    assert batch.labelled.all()


def test_rows_lie_between_ends_and_are_padded_or_cut() -> None:
    found = Texts.rows(ids(1, 2, 9), NEXT, 0.0, "x")
    batch = batch_of(found, 0, 1, 2)
    assert batch.inputs["input_ids"].tolist() == [[257, 0, 257, 256], [257, 1, 2, 257], [257, 3, 4, 5]]
    assert batch.attention_mask.tolist() == [[True, True, True, False], [True] * 4, [True] * 4]
    assert batch.target.tolist() == [[0, 257, -1, -1], [1, 2, 257, -1], [3, 4, 5, 6]]
    assert torch.equal(batch.labelled, batch.target >= 0)
    assert torch.equal(batch.token_mask, batch.labelled)
    assert batch.count("tokens") == batch.count("labelled") == 9


def test_a_prompt_is_read_and_not_learnt() -> None:
    found = Texts.rows([torch.tensor([7, 8])], NEXT, 0.0, "x", [torch.tensor([1, 2])])
    batch = batch_of(found, 0)
    assert batch.inputs["input_ids"].tolist() == [[257, 1, 2, 7]]
    assert batch.target.tolist() == [[-1, -1, 7, 8]]
    assert batch.extra["prompt"].tolist() == [3]


def test_ids_are_counted_anew_in_a_part_of_a_set() -> None:
    found = Texts.rows(ids(1, 2, 3), NEXT, 0.0, "x").keep(torch.tensor([2, 0]))
    assert found.read(0).tolist() == [257, 3, 4, 5, 257]
    assert found.read(1).tolist() == [257, 0, 257, -1, -1]
    assert found.name(1) == "x[1]"
    with pytest.raises(UserError, match=r"^x is text, which has no labels to change$"):
        found.relabel(torch.zeros(2))


# hidden tokens


def hidden(masking: float = 0.15, length: int = 400) -> Texts:
    return Texts.blocks([torch.arange(40 * length) % 200], HIDDEN, masking, "x")


def test_hidden_tokens_are_those_of_bert() -> None:
    found = hidden()
    batch = batch_of(found, *range(40), train=True, view=torch.arange(40))
    tokens = found.read_many(torch.arange(40))
    asked, shown = batch.labelled, batch.inputs["input_ids"]
    assert abs(asked.float().mean() - 0.15) < 0.01
    assert torch.equal(batch.target[asked], tokens[asked])
    assert torch.equal(shown[~asked], tokens[~asked])
    assert abs((shown[asked] == HIDDEN.mask).float().mean() - 0.8) < 0.03
    assert abs((shown[asked] == tokens[asked]).float().mean() - 0.1) < 0.02
    assert (batch.target[~asked] == -1).all()
    assert batch.token_mask.all()


def test_what_is_hidden_depends_on_the_key_in_training_and_on_the_sample_otherwise() -> None:
    found = hidden()
    seen = [
        batch_of(found, 3, 5, train=train, view=torch.tensor([key, key + 1])).labelled
        for train, key in ((True, 0), (True, 0), (True, 9), (False, 0), (False, 9))
    ]
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    assert torch.equal(seen[3], seen[4])
    alone = batch_of(found, 5).labelled
    assert torch.equal(alone[0], seen[3][1])


def test_padding_is_never_hidden_nor_compared() -> None:
    found = Texts.rows(ids(5, 50), HIDDEN, 0.5, "x")
    batch = batch_of(found, 0, 1)
    padding = ~batch.attention_mask
    assert padding.any()
    assert not (batch.labelled | batch.token_mask)[padding].any()
    assert (batch.inputs["input_ids"][padding] == HIDDEN.pad).all()
    assert batch.token_mask.sum() == 7 + 52


# sources


def test_the_standard_library_is_text_without_a_file_of_ours() -> None:
    found = texts("stdlib-text", "", Options(length=64))
    assert len(found["train"]) > 10_000
    assert len(found["validation"]) > 300
    assert not set(TRAIN_MODULES) & set(VALIDATION_MODULES)
    first = Bytes().decode(found["train"].read(0))
    assert first.startswith("# Author: Steven J. Bethard")


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


def read_back(found: Texts) -> str:
    return Bytes().decode(torch.cat([found.read(n)[: found.text.length] for n in range(len(found))]))


def test_a_file_gives_its_end_for_validation(tmp_path: Path) -> None:
    write(tmp_path, book="abcdefghij" * 8)
    found = texts("text", str(tmp_path / "book.txt"), Options(length=4), validation_share=0.25)
    assert (len(found["train"]), len(found["validation"])) == (15, 5)
    assert read_back(found["train"]) + read_back(found["validation"]) == "abcdefghij" * 8


def test_files_named_after_splits_are_the_splits(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", train="abcd" * 3, valid="efgh" * 2, test="ijkl" * 2)
    found = texts("text", str(folder), Options(length=4))
    assert [read_back(found[split])[:4] for split in ("train", "validation", "test")] == ["abcd", "efgh", "ijkl"]
    folder = write(tmp_path / "b", train="abcd" * 3, test="ijkl" * 2)
    assert read_back(texts("text", str(folder), Options(length=4))["validation"])[:4] == "ijkl"


def test_lines_are_samples_if_they_are_not_packed(tmp_path: Path) -> None:
    folder = write(tmp_path, train="one\n\ntwo\nthree\n", validation="four\n")
    found = texts("text", str(folder), Options(length=8, packed=False))
    assert [Bytes().decode(found["train"].read(n)) for n in range(3)] == ["one", "two", "three"]


def test_columns_of_a_table(tmp_path: Path) -> None:
    datasets: Any = pytest.importorskip("datasets")
    rows = {"question": ["2+2?", "sky?"], "answer": ["4", "blue"]}
    datasets.DatasetDict(
        train=datasets.Dataset.from_dict(rows), validation=datasets.Dataset.from_dict(rows)
    ).save_to_disk(str(tmp_path / "set"))
    data = load(
        {
            "source": f"hf:{tmp_path / 'set'}",
            "batch_size": 2,
            "text": {"length": 16, "column": "answer", "prompt": "question"},
        }
    )
    batch = next(data.validation.epoch())
    assert batch.extra["prompt"].tolist() == [5, 5]
    assert Bytes().decode(batch.target[1][batch.labelled[1]]) == "blue"
    with pytest.raises(UserError, match=r"has no column 'answr'; did you mean answer\?$"):
        load({"source": f"hf:{tmp_path / 'set'}", "text": {"column": "answr"}})


def test_a_users_tokenizer(tmp_path: Path) -> None:
    write(tmp_path, book="the cat sat on the mat " * 20)
    words = words_folder(tmp_path / "words", ["the", "cat", "sat", "on", "mat"])
    data = load({"source": f"text:{tmp_path / 'book.txt'}", "batch_size": 2, "text": {"tokenizer": words, "length": 6}})
    facts = data.model_facts()["text"]
    assert (facts.vocabulary, facts.length, facts.end, facts.mask) == (9, 6, 2, 3)
    assert next(data.validation.epoch()).inputs["input_ids"].shape[1] == 6


# the loader


def test_batches_are_a_function_of_seed_epoch_and_position() -> None:
    section = {"source": "stdlib-text", "batch_size": 4, "text": {"length": 32, "masking": 0.15}}
    one, other, third = (load(section, seed=seed) for seed in (0, 0, 1))

    def batch(data: Any, epoch: int, position: int) -> Batch:
        found: Batch = next(data.train.epoch(epoch, start=position))
        return found

    assert torch.equal(batch(one, 1, 3).inputs["input_ids"], batch(other, 1, 3).inputs["input_ids"])
    assert not torch.equal(batch(one, 1, 3).inputs["input_ids"], batch(third, 1, 3).inputs["input_ids"])
    held = [next(data.validation.epoch()).inputs["input_ids"] for data in (one, third)]
    assert torch.equal(*held)
    sample = one.sample()
    assert sample.inputs["input_ids"].shape == (2, 32)
    assert one.facts(10).num_classes == 0


# errors


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"lenght": 3}, "data.text.lenght is not known; did you mean length?"),
        ({"length": 1}, "data.text.length counts tokens, at least 2, not 1"),
        ({"masking": 1.0}, "data.text.masking is a share in [0, 1), not 1.0"),
        (
            {"masking": 0.1, "prompt": "question"},
            "data.text.prompt goes with the next token; leave data.text.masking out",
        ),
    ],
)
def test_words_of_the_section(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        Options.parse(given)


def test_words_for_images() -> None:
    said = "data.mixup is for images with classes, and stdlib-text is text; leave it out"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        load({"source": "stdlib-text", "mixup": 0.2})


@pytest.mark.parametrize(
    ("files", "options", "said"),
    [
        ({}, {}, "data.source: {place} holds no file that ends in .txt"),
        (
            {"a": "abc"},
            {"length": 8},
            "text:{place}/train has 4 tokens, less than one sample of 8; lower data.text.length",
        ),
        ({"a": "abcdefgh"}, {"length": 4}, "text:{place} makes 2 samples of 4 tokens: too few to hold one out"),
        ({"a": "\n\n"}, {"packed": False}, "text:{place}/train holds no text"),
    ],
)
def test_too_little_text(tmp_path: Path, files: dict[str, str], options: dict[str, Any], said: str) -> None:
    folder = write(tmp_path / "folder", **files)
    with pytest.raises(UserError) as error:
        texts("text", str(folder), Options(**options), validation_share=0.99)
    assert str(error.value) == said.format(place=folder)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^data\.source: no file .*missing\.txt$"):
        texts("text", str(tmp_path / "missing.txt"), Options())
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"bad\.txt cannot be read: it is no text in UTF-8$"):
        texts("text", str(tmp_path / "bad.txt"), Options())
    with pytest.raises(UserError, match=r"^data\.source: write text:PATH$"):
        load({"source": "text"})


def test_a_prompt_that_fills_a_sample() -> None:
    said = "x[1]: its prompt has 6 tokens, a sample 5; raise data.text.length"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        Texts.rows(ids(1, 1), NEXT, 0.0, "x", [torch.arange(2), torch.arange(5)])


def test_a_tokenizer_without_a_mask(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    place = words_folder(tmp_path, ["the"])
    plain = PreTrainedTokenizerFast.from_pretrained(place)
    plain.mask_token = None
    plain.save_pretrained(str(tmp_path / "plain"))
    with pytest.raises(
        UserError, match=r"^data\.text\.masking: the tokenizer '.*plain' has no token that hides another"
    ):
        texts("stdlib-text", "", Options(tokenizer=str(tmp_path / "plain"), masking=0.1))
