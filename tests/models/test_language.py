# SPDX-License-Identifier: Apache-2.0
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_model

from tiny_text import BERT, GPT2, HIDDEN, LENGTH, LLAMA, NEXT, causal, masked, text_batch, words_folder
from tutelage.core import Batch, TextSpec
from tutelage.core.error import UserError
from tutelage.core.reader import Reader
from tutelage.core.tap import Tap
from tutelage.models import weights
from tutelage.models.load import load, rebuild
from tutelage.tasks.language import Language

KINDS: dict[str, tuple[TextSpec, dict[str, Any]]] = {
    "gpt2": (NEXT, GPT2),
    "llama": (NEXT, LLAMA),
    "bert": (HIDDEN, BERT),
    "distilbert": (HIDDEN, {"dim": 8, "hidden_dim": 16, "n_layers": 2, "n_heads": 2}),
}
#: Widths of queries, keys and values: grouped heads share keys.
WIDTHS = {"gpt2": (8, 8, 8), "llama": (8, 4, 4), "bert": (8, 8, 8), "distilbert": (8, 8, 8)}


def network(kind: str, **options: Any) -> Any:
    text, shape = KINDS[kind]
    return load({"model": f"hf:{kind}", **shape, **options}, text=text, seed=0)


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_are_those_that_transformers_counts(kind: str) -> None:
    model = network(kind)
    inputs = text_batch(lengths=(13, 5, 9, 2)).inputs
    signals = Reader(model, [Tap("hidden[*]")], Language())(Batch.of(inputs))
    expected = model.module(**inputs, output_hidden_states=True)
    assert len(expected.hidden_states) == 3
    for number, states in enumerate(expected.hidden_states):
        assert torch.equal(signals[f"hidden[{number}]"], states), number
    assert torch.equal(signals.logits, expected.logits)


@pytest.mark.parametrize("kind", KINDS)
def test_queries_keys_and_values_have_places(kind: str) -> None:
    model = network(kind)
    taps = [Tap(f"{role}[{n}]") for role in "qkv" for n in (0, -1)]
    signals = Reader(model, taps, Language())(Batch.of(text_batch().inputs))
    found = tuple(signals[f"{role}[-1]"].shape[-1] for role in "qkv")
    assert found == WIDTHS[kind]
    assert all(signals[tap.name].shape[:2] == (4, LENGTH) for tap in taps)
    assert model.module.get_submodule(model.modules["classifier"]).weight.shape[0] == 11


def test_attention_comes_from_the_tapped_queries_and_keys() -> None:
    model = causal()
    network: Any = model.module
    network.set_attn_implementation("eager")
    inputs = text_batch().inputs
    signals = Reader(model, [Tap("q[1]"), Tap("k[1]")], Language())(Batch.of(inputs))
    q, k = (signals[f"{role}[1]"].view(4, LENGTH, 2, 4).transpose(1, 2) for role in "qk")
    scores = (q @ k.transpose(2, 3) / 2).masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(scores.softmax(-1), network(**inputs, output_attentions=True).attentions[1])


def test_weights_shared_by_layers_have_no_places() -> None:
    options = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = load({"model": "hf:albert", "embedding_size": 4, **options}, text=HIDDEN, seed=0)
    assert not model.roles


def test_padding_does_not_reach_the_answers_that_count() -> None:
    for kind in KINDS:
        model = network(kind)
        batch = text_batch(lengths=(13, 5, 9, 2))
        mask = batch.attention_mask
        other = batch.inputs["input_ids"].where(mask, 3)
        answers = [model({**batch.inputs, "input_ids": ids}) for ids in (batch.inputs["input_ids"], other)]
        torch.testing.assert_close(answers[0][mask], answers[1][mask])


def test_a_table_that_is_filled_up_is_cut() -> None:
    model = network("gpt2", vocab_size=16)
    assert model.module.get_submodule("transformer.wte").weight.shape[0] == 16
    assert model(text_batch().inputs).shape == (4, LENGTH, 11)


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_is_built_again_from_its_record(kind: str, tmp_path: Path) -> None:
    model = network(kind, **({"tie_word_embeddings": True} if kind == "llama" else {}))
    save_model(model.module, str(tmp_path / "student.safetensors"))
    again = rebuild(dict(model.source), seed=1)
    weights.fit(again.module, weights.read(tmp_path / "student.safetensors"), "student.safetensors")
    inputs = text_batch().inputs
    assert torch.equal(model(inputs), again(inputs))
    assert again.text == model.text


def test_a_folder_with_weights_and_tokenizer(tmp_path: Path) -> None:
    words = ["one", "two", "three", "four", "five", "six", "seven"]
    folder = words_folder(tmp_path / "words", words)
    from tutelage.data.tokenizer import tokenizer

    reader = tokenizer(folder)
    text = TextSpec(reader.size, LENGTH, pad=reader.pad, end=reader.end, mask=reader.mask, words=reader.words)
    made = load({"model": "hf:gpt2", **GPT2}, text=text, seed=3)
    network: Any = made.module
    network.save_pretrained(folder)
    again = load(f"hf:{folder}", text=text)
    inputs = text_batch().inputs
    assert torch.equal(made(inputs), again(inputs))
    said = f"hf:{folder} has a tokenizer with other words than the data's"
    with pytest.raises(UserError, match=f"^{re.escape(said)}"):
        load(f"hf:{folder}", text=replace(text, words="another"))


def test_a_function_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from torch import nn\n"
        "class Own(nn.Module):\n"
        "    def __init__(self, words):\n"
        "        super().__init__()\n"
        "        self.table = nn.Embedding(words, 4)\n"
        "        self.answer = nn.Linear(4, words)\n"
        "    def forward(self, input_ids, attention_mask):\n"
        "        return self.answer(self.table(input_ids))\n"
        "def make(num_classes): return Own(num_classes)\n"
    )
    model = load(f"python:{tmp_path / 'own.py'}:make", text=NEXT, seed=0)
    assert model(text_batch().inputs).shape == (4, LENGTH, 11)
    assert not model.roles


# errors


@pytest.mark.parametrize(
    ("spec", "text", "said"),
    [
        ("hf:gtp2", NEXT, "'hf:gtp2' is neither a folder nor a type of causal language model; did you mean gpt2?"),
        ("hf:llama", HIDDEN, "'hf:llama' is neither a folder nor a type of masked language model"),
        (
            "hf:nobody/model",
            NEXT,
            "'hf:nobody/model' is neither a folder nor a type of causal language model; `weights: pretrained` fetches",
        ),
        (
            "timm:resnet18",
            NEXT,
            "model 'timm:resnet18' takes images, and the data is text: hf: and python: models read text",
        ),
        ({"model": "hf:gpt2", "n_layers": 2}, NEXT, "hf:gpt2 has no option 'n_layers'; did you mean n_layer?"),
        (
            {"model": "hf:gpt2", **GPT2, "vocab_size": 10},
            NEXT,
            "hf:gpt2 reads 10 tokens, the data has 11: teacher, student and data need one vocabulary",
        ),
        (
            {"model": "hf:gpt2", **GPT2, "n_positions": 4},
            NEXT,
            "hf:gpt2 has 4 positions, a sample 12 tokens: lower data.text.length",
        ),
        ({"model": "hf:gpt2", "n_embd": 7, "n_head": 2, "n_layer": 1}, NEXT, "hf:gpt2: "),
    ],
)
def test_models_that_do_not_read_this_text(spec: Any, text: TextSpec, said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}"):
        load(spec, text=text)


def run_folder(folder: Path, **changes: Any) -> str:
    import json

    model = causal()
    save_model(model.module, str(folder / "student.safetensors"))
    record = {**model.source, **changes}
    (folder / "student.json").write_text(json.dumps(record))
    return f"run:{folder}"


def test_a_runs_student_of_another_vocabulary_or_direction(tmp_path: Path) -> None:
    name = run_folder(tmp_path)
    model = load(name, text=NEXT)
    assert torch.equal(model(text_batch().inputs), causal()(text_batch().inputs))
    with pytest.raises(
        UserError, match=r"was trained for 12 tokens of 11, next token, the data asks for .* hidden tokens$"
    ):
        load(name, text=HIDDEN)
    with pytest.raises(UserError, match=r"has another vocabulary than the data: 11 tokens \(unknown\), not 12"):
        load(name, text=replace(NEXT, vocabulary=12))
    with pytest.raises(UserError, match=r"reads text, and the data is images$"):
        load(name, num_classes=10)
    named = run_folder(tmp_path, text=asdict(replace(NEXT, words="mine")))
    with pytest.raises(UserError, match=r"has another vocabulary than the data: 11 tokens \(mine\), not 11 \(yours\)"):
        load(named, text=replace(NEXT, words="yours"))


def test_answers_that_are_no_texts(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from torch import nn\n"
        "class Own(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.table = nn.Embedding(11, 4)\n"
        "    def forward(self, input_ids, attention_mask):\n"
        "        return self.table(input_ids).mean(1)\n"
        "def make(): return Own()\n"
    )
    said = "Own gave [1, 4] for [1, 8] tokens: a language model gives [B, L, V] logits, V at least 11"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        load(f"python:{tmp_path / 'own.py'}:make", text=NEXT)


def test_masked_models_are_told_apart() -> None:
    assert type(masked().module).__name__ == "BertForMaskedLM"
    assert type(causal().module).__name__ == "GPT2LMHeadModel"
