# SPDX-License-Identifier: Apache-2.0
"""Language models: causal and masked ones of transformers, or a function's, and where their tensors lie."""

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.core import Model, Tap, TextSpec
from tutelage.core.error import UserError, nearest
from tutelage.core.text import words_of
from tutelage.models import weights
from tutelage.models.attention import projections
from tutelage.models.roles import logits_of
from tutelage.models.source import Wanted
from tutelage.models.trace import Call, trace

#: Words of a mapping that are not the configuration's.
WORDS = ("model", "weights", "roles")


def call(module: nn.Module, inputs: Mapping[str, Tensor], *, text: TextSpec) -> Tensor:
    """Return `[B, L, V]` logits; rows of the table beyond the vocabulary, which only fill it up, are cut off."""
    if not isinstance(inputs, Mapping):
        raise UserError(f"{type(module).__name__} reads tokens, `input_ids` and `attention_mask`, and no pixels")
    cache = {"use_cache": False} if text.causal and hasattr(module, "generate") else {}
    found = logits_of(module(**inputs, **cache))
    if found is None or found.ndim != 3 or found.shape[-1] < text.vocabulary:
        got = "nothing" if found is None else f"{list(found.shape)}"
        raise UserError(
            f"{type(module).__name__} gave {got} for {list(inputs['input_ids'].shape)} tokens: a language model "
            f"gives [B, L, V] logits, V at least {text.vocabulary}"
        )
    return found[..., : text.vocabulary]


def load(kind: str, place: str, given: Mapping[str, Any], text: TextSpec, seed: int | None = None) -> Model:
    """Return a language model with its roles.

    - `hidden[i]`: `[B, L, D]` before block i, and as the last one what leaves the blocks, after the norm that may
      follow them: the hidden states as transformers counts them
    - `q[i]`, `k[i]`, `v[i]`: `[B, L, *]` of block i, heads side by side, before any rotation of positions
    - `classifier`: the module that gives the logits

    Args:
        kind: `hf` or `python`.
        place: a folder, a name of the hub or a type of transformers; a file and its function.
        given: the mapping of a recipe: `weights`, `roles` and options of the configuration.
        text: what the data gives to read.
        seed: of the initial weights; None draws them from torch's generator.

    Raises:
        UserError: if the model cannot be had, or does not read this text.

    Example:
        >>> text = TextSpec(vocabulary=11, length=8)
        >>> model = load("hf", "gpt2", {"n_layer": 2, "n_head": 2, "n_embd": 4}, text, seed=0)
        >>> model({"input_ids": torch.zeros(1, 8, dtype=torch.long)}).shape
        torch.Size([1, 8, 11])
    """
    options = {word: value for word, value in given.items() if word not in WORDS}
    if kind == "hf":
        build = partial(_transformers, place, options, text, given.get("weights") == "pretrained")
    elif kind == "python":
        build = partial(_python, place, options, text)
    else:
        raise UserError(f"model '{kind}:{place}' takes images, and the data is text: hf: and python: models read text")
    if seed is None:
        module = build()
    else:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            module = build()
    file = given.get("weights")
    if file not in (None, "pretrained"):
        weights.fit(module, weights.read(file), file)
    _check_length(module, f"{kind}:{place}", text)
    calls = partial(call, text=text)
    found = roles(module, text)
    named = {role: Tap.parse(tap) for role, tap in (given.get("roles") or {}).items()}
    table = _path(module, _table(module))
    source = {"model": {word: value for word, value in given.items() if word != "weights"}, "text": asdict(text)}
    return Model(
        module,
        {**found, **named},
        {"classifier": table} if table else {},
        call=calls,
        source=source,
        text=text,
    )


def require_same(record: Mapping[str, Any] | None, text: TextSpec, name: str) -> None:
    """Refuse the record of a model that reads other text than the data gives.

    Raises:
        UserError: naming both.
    """
    if record is None:
        raise UserError(f"model {name!r} takes images, and the data is text")
    own = TextSpec(**record)
    if own.causal != text.causal:
        raise UserError(f"model {name!r} was trained for {own}, the data asks for {text}")
    if own.vocabulary != text.vocabulary or (own.words and text.words and own.words != text.words):
        raise UserError(
            f"model {name!r} has another vocabulary than the data: {own.vocabulary} tokens ({own.words or 'unknown'}), "
            f"not {text.vocabulary} ({text.words or 'unknown'}); give the data its tokenizer: data.text.tokenizer"
        )


# --- sources ---------------------------------------------------------------------------------------------


def _python(place: str, options: Mapping[str, Any], text: TextSpec) -> nn.Module:
    """Return what a user's function gives; its `num_classes` is the size of the vocabulary."""
    from tutelage.models.python import build

    return build(Wanted(place, num_classes=text.vocabulary, options=options)).module


def _transformers(place: str, options: Mapping[str, Any], text: TextSpec, pretrained: bool) -> nn.Module:
    """Return a model of transformers; nothing is fetched unless `weights: pretrained` asks for it."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM
        from transformers.models.auto.modeling_auto import (
            MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        )
    except ImportError as error:
        raise UserError("hf: models need transformers: pip install 'tutelage[hf]'") from error
    kind, types, word = (
        (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "causal")
        if text.causal
        else (AutoModelForMaskedLM, MODEL_FOR_MASKED_LM_MAPPING_NAMES, "masked")
    )
    folder = Path(place)
    here = folder.is_dir()
    if not here and not pretrained and place not in types:
        hint = "; `weights: pretrained` fetches it from the hub" if "/" in place else nearest(place, types)
        raise UserError(f"'hf:{place}' is neither a folder nor a type of {word} language model{hint}")
    whole = pretrained or any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))
    try:
        if whole:
            module: nn.Module = kind.from_pretrained(place, local_files_only=here, **options)
        else:
            module = kind.from_config(_configuration(AutoConfig, place, here, options, text))
    except UserError:
        raise
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"hf:{place}: {str(error).splitlines()[0]}") from error
    _check_vocabulary(module, place, here or whole, text)
    module.eval()
    return module


def _configuration(auto: Any, place: str, here: bool, options: Mapping[str, Any], text: TextSpec) -> Any:
    """Return a configuration; the vocabulary and the special tokens are the data's where nothing else is said."""
    if here:
        return auto.from_pretrained(place, local_files_only=True, **options)
    known = {"vocab_size": text.vocabulary}
    if not text.causal:  # a causal model may write the token, which means nothing to it
        known["pad_token_id"] = text.pad
    if text.end is not None:
        known |= {"bos_token_id": text.end, "eos_token_id": text.end}
    plain = auto.for_model(place)
    renamed: Mapping[str, str] = getattr(plain, "attribute_map", {})
    valid = {*plain.to_dict(), *renamed}
    for word in options:
        if word not in valid:
            raise UserError(f"hf:{place} has no option {word!r}{nearest(word, valid)}")
    positions = "max_position_embeddings"
    if getattr(plain, positions, text.length) < text.length and not {positions, renamed.get(positions)} & {*options}:
        known[positions] = text.length
    return auto.for_model(place, **{**known, **options})


def _check_vocabulary(module: Any, place: str, files: bool, text: TextSpec) -> None:
    """Refuse a model whose tables are too small, or whose own tokenizer has other words."""
    for what, table in (("reads", module.get_input_embeddings()), ("answers with", module.get_output_embeddings())):
        size = len(table.weight) if table is not None else text.vocabulary
        if size < text.vocabulary:
            raise UserError(
                f"hf:{place} {what} {size} tokens, the data has {text.vocabulary}: teacher, student and data need "
                "one vocabulary; give the model's own tokenizer as data.text.tokenizer, or leave vocab_size out"
            )
    if files and text.words:
        own = _own_words(place)
        if own is not None and own != text.words:
            raise UserError(
                f"hf:{place} has a tokenizer with other words than the data's: teacher, student and data need one "
                f"vocabulary; set data.text.tokenizer to {place}"
            )


def _own_words(place: str) -> str | None:
    """Return the vocabulary of the tokenizer that lies beside a model's weights, if there is one."""
    from transformers import AutoTokenizer

    try:
        found: dict[str, int] = AutoTokenizer.from_pretrained(place, local_files_only=True).get_vocab()
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError):
        return None  # saved without one: only the sizes can be compared
    return words_of(sorted(found, key=lambda word: (found[word], word))) if found else None


def _check_length(module: nn.Module, name: str, text: TextSpec) -> None:
    positions = getattr(getattr(module, "config", None), "max_position_embeddings", None)
    if isinstance(positions, int) and positions < text.length:
        raise UserError(f"{name} has {positions} positions, a sample {text.length} tokens: lower data.text.length")


# --- roles -----------------------------------------------------------------------------------------------


def roles(module: nn.Module, text: TextSpec) -> dict[str, Tap]:
    """Return the places of hidden states, queries, keys and values; what is not beyond doubt is left out."""
    parameter = next(module.parameters(), torch.zeros(0))
    inputs = {name: ids[:, :8].to(parameter.device) for name, ids in text.blank().items()}
    root, _ = trace(module, lambda: call(module, inputs, text=text))
    blocks = _blocks(module, root)
    if not blocks:
        return {}
    taps = {f"hidden[{number}]": Tap(block.path, "input") for number, block in enumerate(blocks)}
    norm = _final_norm(root, blocks[-1])
    taps[f"hidden[{len(blocks)}]"] = Tap(norm.path if norm is not None else blocks[-1].path)
    for number, block in enumerate(blocks):
        for role, tap in projections(block).items():
            taps[f"{role}[{number}]"] = tap
    return taps


def _is_states(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.ndim == 3 and tensor.is_floating_point()


def _blocks(module: nn.Module, root: Call) -> list[Call]:
    """Return the outermost row of siblings that take and give hidden states of one shape, one after the other."""
    rows: dict[str, list[Call]] = {}
    for made in root.walk():
        parent = made.path.rpartition(".")[0]
        if made.inner and made.number == 0 and isinstance(module.get_submodule(parent), nn.ModuleList):
            rows.setdefault(parent, []).append(made)
    outer = [row for parent, row in rows.items() if not any(parent.startswith(f"{other}.") for other in rows)]
    again = {made.path.rpartition(".")[0] for made in root.walk() if made.number}  # shared weights: ambiguous
    whole = [
        row
        for row in outer
        if all(_is_states(c.taken) and _is_states(c.given) for c in row) and row[0].path.rpartition(".")[0] not in again
    ]
    shapes = [{tuple(part.shape) for c in row for part in (c.taken, c.given) if part is not None} for row in whole]
    return whole[0] if len(whole) == 1 and len(shapes[0]) == 1 else []


def _final_norm(root: Call, last: Call) -> Call | None:
    """Return the norm that follows the last block within the same network, not one of the head's."""
    calls = [*root.walk()]
    home = last.path.partition(".")[0]
    for made in calls[calls.index(last) + 1 :]:
        same = made.given is not None and last.given is not None and made.given.shape == last.given.shape
        if same and made.path.startswith(f"{home}.") and "norm" in f"{type(made.module).__name__} {made.path}".lower():
            return made
    return None


def _table(module: nn.Module) -> nn.Module | None:
    found = getattr(module, "get_output_embeddings", None)
    table = found() if callable(found) else None
    return table if isinstance(table, nn.Module) else None


def _path(module: nn.Module, part: nn.Module | None) -> str | None:
    return next((path for path, one in module.named_modules() if one is part and path), None)
