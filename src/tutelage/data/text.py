# SPDX-License-Identifier: Apache-2.0
"""Text as samples: blocks of running text, or texts of their own with padding; next tokens, or hidden ones."""

import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from tutelage.core import Batch, TextSpec
from tutelage.core.error import UserError, check_words, nearest
from tutelage.data.tokenizer import Tokenizer, tokenizer
from tutelage.functional.noise import mix, uniform

#: Share of the hidden tokens that become the mask, and that become the mask or any token (BERT, section 3.1).
MASKED, MASKED_OR_ANY = 0.8, 0.9
MASKING = 0x7E47  # salt: which tokens are hidden
FILL = -1  # stands where a sample has no token
#: Modules of the standard library whose source text comes with every Python, in their order.
TRAIN_MODULES = (
    *("argparse", "calendar", "cmd", "configparser", "contextlib", "copy", "csv", "dataclasses", "difflib"),
    *("doctest", "fractions", "functools", "gettext", "heapq", "imaplib", "inspect", "ipaddress", "mailbox"),
    *("mimetypes", "optparse", "pdb", "pickle", "platform", "plistlib", "pprint", "random", "selectors"),
    *("shlex", "shutil", "smtplib", "socketserver", "statistics", "subprocess", "tarfile", "tempfile"),
    *("textwrap", "threading", "tokenize", "traceback", "types", "typing", "uuid", "weakref"),
)
VALIDATION_MODULES = ("netrc", "poplib", "queue", "sched", "shelve")
SPLITS = {"train": ("train",), "validation": ("validation", "valid", "val"), "test": ("test",)}


@final
@dataclass(frozen=True)
class Options:
    """The words of `data.text`.

    Args:
        tokenizer: `bytes`, or a folder with the files of a tokenizer of transformers, or a name of the hub.
        length: tokens of a sample.
        masking: share of the tokens that are hidden and to be found (BERT: 0.15); 0 predicts each next token.
        packed: cut the running text into blocks; otherwise each line or row is a sample of its own, cut at
            `length` and padded.
        column: of a table, with the text.
        prompt: of a table, with a text that comes before and is not learnt; rows are not packed then.
    """

    tokenizer: str = "bytes"
    length: int = 128
    masking: float = 0.0
    packed: bool = True
    column: str = "text"
    prompt: str | None = None

    @classmethod
    def parse(cls, given: Mapping[str, Any] | None) -> "Options":
        """Read the section, or nothing.

        Raises:
            UserError: on an unknown word, or a value that makes no sense.
        """
        check_words(given or {}, [part.name for part in fields(cls)], "data.text")
        options = cls(**(given or {}))
        if not isinstance(options.length, int) or options.length < 2:
            raise UserError(f"data.text.length counts tokens, at least 2, not {options.length}")
        if not 0 <= options.masking < 1:
            raise UserError(f"data.text.masking is a share in [0, 1), not {options.masking}")
        if options.prompt is not None and options.masking:
            raise UserError("data.text.prompt goes with the next token; leave data.text.masking out")
        return options


@final
@dataclass(frozen=True)
class Texts:
    """Samples of one length cut from one row of tokens.

    Args:
        flat: `[T]` tokens of everything, one text after the other.
        start: `[N]` where a sample begins.
        size: `[N]` tokens it has.
        prompt: `[N]` tokens at its beginning that are given and not learnt.
        text: what a model must read.
        masking: share of hidden tokens, 0 for the next token.
        source: what to call the set in an error.
    """

    flat: Tensor
    start: Tensor
    size: Tensor
    prompt: Tensor
    text: TextSpec
    masking: float = 0.0
    source: str = "text"
    class_names: tuple[str, ...] = ()
    targets: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", torch.full_like(self.start, -1))

    @classmethod
    def blocks(cls, texts: Iterable[Tensor], text: TextSpec, masking: float, source: str) -> "Texts":
        """Return running text cut into whole blocks, a token for the end after each text.

        Raises:
            UserError: if it does not fill a block.
        """
        end = torch.tensor([] if text.end is None else [text.end], dtype=torch.int64)
        flat = torch.cat([part for one in texts for part in (one, end)] or [end]).to(torch.int32)
        count = (len(flat) - int(text.causal)) // text.length
        if count < 1:
            raise UserError(
                f"{source} has {len(flat)} tokens, less than one sample of {text.length}; lower data.text.length"
            )
        start = torch.arange(count) * text.length
        size = torch.full_like(start, text.length + int(text.causal))
        return cls(flat, start, size, torch.zeros_like(start), text, masking, source)

    @classmethod
    def rows(
        cls, texts: Sequence[Tensor], text: TextSpec, masking: float, source: str, prompts: Sequence[Tensor] = ()
    ) -> "Texts":
        """Return each text as a sample, between two tokens for the end; too long ones are cut.

        Raises:
            UserError: if there is none, or if a prompt leaves no room for its text.
        """
        if not texts:
            raise UserError(f"{source} holds no text")
        end = torch.tensor([] if text.end is None else [text.end], dtype=torch.int64)
        before: Sequence[Tensor] = prompts or [texts[0][:0]] * len(texts)
        rows = [torch.cat([end, prompt, one, end]) for prompt, one in zip(before, texts, strict=True)]
        given = torch.tensor([len(end) + len(prompt) if len(prompt) else 0 for prompt in before])
        room = text.length + int(text.causal)
        if int(given.max()) >= room:
            raise UserError(
                f"{source}[{int(given.argmax())}]: its prompt has {int(given.max())} tokens, a sample {room}; "
                "raise data.text.length"
            )
        size = torch.tensor([len(row) for row in rows])
        return cls(
            torch.cat(rows).to(torch.int32), size.cumsum(0) - size, size.clamp(max=room), given, text, masking, source
        )

    def __len__(self) -> int:
        return len(self.start)

    def model_facts(self) -> dict[str, Any]:
        """Return what a model must read."""
        return {"text": self.text}

    @property
    def room(self) -> int:
        """Tokens read of a sample: one more than a model sees, where each next token is asked for."""
        return self.text.length + int(self.text.causal)

    def read(self, index: int) -> Tensor:
        """Return `[W]` int64 tokens, -1 where there is none."""
        return self.read_many(torch.tensor([index]))[0]

    def read_many(self, index: Tensor) -> Tensor:
        """Return `[B, W]` int64 tokens, -1 where there is none."""
        place = torch.arange(self.room)
        there = place < self.size[index, None]
        return self.flat[(self.start[index, None] + place).where(there, 0)].long().where(there, FILL)

    def name(self, index: int) -> str:
        """Return the set and the number."""
        return f"{self.source}[{index}]"

    def keep(self, index: Tensor) -> "Texts":
        """Return the set of these samples, in this order."""
        return replace(self, start=self.start[index], size=self.size[index], prompt=self.prompt[index])

    def relabel(self, targets: Tensor) -> "Texts":
        """Refuse: a text is its own label."""
        raise UserError(f"{self.source} is text, which has no labels to change")

    def compose(self, batch: Batch, *, train: bool) -> Batch:
        """Return a batch of tokens as models take it.

        - `inputs`: `input_ids` and `attention_mask`, `[B, L]` int64
        - `target`: `[B, L]` int64, the token that position i is asked for, -1 where none is; `labelled`: where one is
        - `extra`: `token_mask` `[B, L]`, where models are compared: at every token that is asked for (next
          token), or at every token that is no padding (hidden tokens); `prompt` `[B]`

        Which tokens are hidden is a function of the augmentation's key in training, and of the sample id
        otherwise, so that every run is scored on the same ones.

        Args:
            batch: with tokens `[B, W]` as its inputs, as `read_many` gives them.
            train: whether it is seen in training.
        """
        tokens, prompt = batch.inputs, self.prompt[batch.index]
        if self.text.causal:
            seen, target = tokens[:, :-1], tokens[:, 1:]
            asked = (target >= 0) & (torch.arange(target.shape[1]) + 1 >= prompt[:, None])
            compared = asked
        else:
            seen, asked = self._hidden(tokens, batch.view if train else batch.index)
            target, compared = tokens, tokens >= 0
        real = seen >= 0
        return replace(
            batch,
            inputs={"input_ids": seen.where(real, self.text.pad), "attention_mask": real.long()},
            target=target.where(asked, -1),
            labelled=asked,
            extra={**batch.extra, "token_mask": compared, "prompt": prompt},
        )

    def _hidden(self, tokens: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens `[B, L]` of which some are hidden, and which."""
        assert self.text.mask is not None
        chosen, way, other = uniform(mix(MASKING), key, (3, tokens.shape[1])).unbind(1)
        asked = (chosen < self.masking) & (tokens >= 0)
        stranger = (other * self.text.vocabulary).long()
        shown = tokens.where(way >= MASKED_OR_ANY, stranger).where(way >= MASKED, self.text.mask)
        return shown.where(asked, tokens), asked


def texts(
    kind: str, place: str, options: Options, *, validation_share: float = 0.1, download: bool = False
) -> dict[str, Texts]:
    """Return the splits of a source of text: `train`, `validation` and, where there is one, `test`.

    Args:
        kind: `stdlib-text`, `text` (a file, or a folder of files that end in .txt) or `hf` (a table).
        place: what stands after the colon.
        options: of the section.
        validation_share: held out at the end of the text where the source has no split for it.
        download: let `hf` and the tokenizer fetch what is not there.

    Raises:
        UserError: if something cannot be read, or does not fill a sample.

    Example:
        >>> found = texts("stdlib-text", "", Options(length=64))
        >>> batch = found["train"].compose(Batch.of(found["train"].read_many(torch.arange(2))), train=True)
        >>> batch.inputs["input_ids"].shape, bool((batch.inputs["input_ids"][:, 1:] == batch.target[:, :-1]).all())
        (torch.Size([2, 64]), True)
    """
    reader = tokenizer(options.tokenizer, download=download)
    if options.masking and reader.mask is None:
        raise UserError(
            f"data.text.masking: the tokenizer {options.tokenizer!r} has no token that hides another; "
            "leave it out to predict the next token, or give a tokenizer of a masked model"
        )
    spec = TextSpec(
        vocabulary=reader.size,
        length=options.length,
        causal=not options.masking,
        pad=reader.pad,
        end=reader.end,
        mask=reader.mask,
        words=reader.words,
    )
    if kind == "hf":
        from tutelage.data.hub import tables

        raw = {split: _columns(table, options, f"{place}/{split}") for split, table in tables(place, download).items()}
    else:
        raw = {split: (found, []) for split, found in _read(kind, place, options.packed).items()}
    source = f"{kind}:{place}" if place else kind
    sets = {
        split: _samples(found, prompts, reader, spec, options, f"{source}/{split}")
        for split, (found, prompts) in raw.items()
    }
    return sets if "validation" in sets else _held_out(sets, validation_share, source)


def _samples(
    found: Sequence[str], prompts: Sequence[str], reader: Tokenizer, spec: TextSpec, options: Options, source: str
) -> Texts:
    encoded = [reader.encode(one) for one in found]
    if options.packed and options.prompt is None:
        return Texts.blocks(encoded, spec, options.masking, source)
    return Texts.rows(encoded, spec, options.masking, source, [reader.encode(one) for one in prompts])


def _held_out(sets: dict[str, Texts], share: float, source: str) -> dict[str, Texts]:
    """Take the last samples of the training split: neighbours are much alike."""
    train = sets["train"]
    if not 0 < share < 1:
        raise UserError(f"{source} has no validation split: data.validation_share must lie in (0, 1), not {share}")
    count = max(round(share * len(train)), 1)
    if count >= len(train):
        raise UserError(f"{source} makes {len(train)} samples of {train.text.length} tokens: too few to hold one out")
    place = torch.arange(len(train))
    return {**sets, "train": train.keep(place[:-count]), "validation": train.keep(place[-count:])}


def _read(kind: str, place: str, packed: bool) -> dict[str, list[str]]:
    """Return the texts of each split."""
    if kind == "stdlib-text":
        home = Path(sysconfig.get_path("stdlib"))
        modules = {"train": TRAIN_MODULES, "validation": VALIDATION_MODULES}
        return {split: [_text(home / f"{name}.py") for name in names] for split, names in modules.items()}
    path = Path(place)
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"data.source: {place} holds no file that ends in .txt")
    named = {split: [file for file in files if file.stem in names] for split, names in SPLITS.items()}
    chosen = {split: found for split, found in named.items() if found} if named["train"] else {"train": files}
    if "validation" not in chosen and "test" in chosen:
        chosen["validation"] = chosen.pop("test")
    read = {split: [_text(file) for file in found] for split, found in chosen.items()}
    if packed:
        return read
    return {
        split: [line for one in found for line in one.splitlines() if line.strip()] for split, found in read.items()
    }


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"data.source: no file {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is no text in UTF-8" if isinstance(error, ValueError) else error.strerror
        raise UserError(f"data.source: {path} cannot be read: {reason}") from error


def _columns(table: Any, options: Options, source: str) -> tuple[list[str], list[str]]:
    """Return the texts and prompts of a table."""
    found: list[list[str]] = []
    for word, column in (("column", options.column), ("prompt", options.prompt)):
        if column is None:
            found.append([])
            continue
        if column not in table.column_names:
            raise UserError(f"data.text.{word}: {source} has no column {column!r}{nearest(column, table.column_names)}")
        values = list(table[column])
        wrong = next((n for n, value in enumerate(values) if not isinstance(value, str)), None)
        if wrong is not None:
            raise UserError(f"data.text.{word}: {source}[{wrong}] holds {type(values[wrong]).__name__}, not text")
        found.append(values)
    return found[0], found[1]
