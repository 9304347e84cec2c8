# SPDX-License-Identifier: Apache-2.0
"""Language models of a few thousand weights, and batches of numbers that pass for text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tutelage.core import Batch, Model, TextSpec
from tutelage.models.load import load

LENGTH = 12
NEXT = TextSpec(vocabulary=11, length=LENGTH, pad=8, end=9, mask=10)
HIDDEN = TextSpec(vocabulary=11, length=LENGTH, causal=False, pad=8, end=9, mask=10)
GPT2 = {"n_embd": 8, "n_layer": 2, "n_head": 2}
BERT = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {
    **{"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2},
}


def causal(seed: int = 0, **options: Any) -> Model:
    """Return a GPT-2 of 2 layers."""
    return load({"model": "hf:gpt2", **GPT2, **options}, text=NEXT, seed=seed)


def masked(seed: int = 0, **options: Any) -> Model:
    """Return a BERT of 2 layers."""
    return load({"model": "hf:bert", **BERT, **options}, text=HIDDEN, seed=seed)


def text_batch(rows: int = 4, *, seed: int = 0, lengths: tuple[int, ...] = ()) -> Batch:
    """Return rows of next tokens; `lengths` cuts rows off and pads them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(8, (rows, LENGTH + 1), generator=generator)
    size = torch.tensor(lengths or (LENGTH + 1,) * rows)
    tokens = tokens.where(torch.arange(LENGTH + 1) < size[:, None], -1)
    asked, real = tokens[:, 1:] >= 0, tokens[:, :-1] >= 0
    return Batch.of(
        {"input_ids": tokens[:, :-1].where(real, NEXT.pad), "attention_mask": real.long()},
        tokens[:, 1:],
        index=torch.arange(rows) + 100 * seed,
        labelled=asked,
        extra={"token_mask": asked, "prompt": torch.zeros(rows, dtype=torch.long)},
    )


def words_folder(folder: Path, words: Sequence[str]) -> str:
    """Write the tokenizer of a few words, with padding, unknown, end and mask, and return its folder."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[END]", "mask_token": "[MASK]"}
    plain = Tokenizer(WordLevel({word: n for n, word in enumerate([*special.values(), *words])}, "[UNK]"))
    plain.pre_tokenizer = Whitespace()
    folder.mkdir(parents=True, exist_ok=True)
    PreTrainedTokenizerFast(tokenizer_object=plain, **special).save_pretrained(str(folder))
    return str(folder)
