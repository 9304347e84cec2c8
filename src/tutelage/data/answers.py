# SPDX-License-Identifier: Apache-2.0
"""A teacher's answers on disk: which samples and views they are about, and where each lies.

A store is a folder. `store.json` says what was asked; `answers-NNNNN.safetensors` hold the answers, so many rows
each: view by view, in a view sample by sample. The word `files` of `store.json`, with the hash of each, is written
last: a store without it is unfinished, and goes on where it stopped.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tutelage.core.error import UserError
from tutelage.core.storage import write_text
from tutelage.data.loader import Replay
from tutelage.data.samples import Samples

MANIFEST = "store.json"
PROBES = 32  # samples whose content is held against what was seen when answers were stored
#: Words of the `data` section that change what a model sees.
WORDS = ("augment", "image_size", "channels", "text")


def fingerprint(samples: Samples) -> dict[str, Any]:
    """Return what tells a set from another: its length, the names of its samples, and the content of some."""
    names = hashlib.sha256()
    for index in range(len(samples)):
        names.update(samples.name(index).rpartition("/")[2].encode() + b"\n")
    places = torch.linspace(0, len(samples) - 1, min(PROBES, len(samples))).long().tolist()
    content = {
        str(place): hashlib.sha256(torch.as_tensor(samples.read(place)).contiguous().numpy().tobytes()).hexdigest()
        for place in places
    }
    return {"samples": len(samples), "names": names.hexdigest(), "content": content}


@final
@dataclass(frozen=True)
class Answers:
    """An opened store.

    Args:
        folder: where it lies.
        asked: what its manifest says.
    """

    folder: Path
    asked: Mapping[str, Any]
    _files: dict[int, dict[str, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, folder: Path) -> "Answers":
        """Return a finished store.

        Raises:
            UserError: if there is none, if it is unfinished, or if a file is missing or has another size.
        """
        found = cls(folder, manifest(folder))
        if "files" not in found.asked:
            raise UserError(f"{folder} is an unfinished store: give the `tutelage store` command again")
        for name, entry in found.asked["files"].items():
            size = (folder / name).stat().st_size if (folder / name).exists() else None
            if size != entry["bytes"]:
                said = "is missing" if size is None else f"has {size} bytes, not {entry['bytes']}"
                raise UserError(f"{folder / name} {said}: remove it and give the `tutelage store` command again")
        return found

    @property
    def num_classes(self) -> int:
        """Of the logits; 0 where there are none."""
        return int(self.asked["num_classes"])

    @property
    def replay(self) -> Replay:
        """The views that were answered, with their answers."""
        return Replay(self.asked["seed"], self.asked["views"], answers=self.rows)

    @cached_property
    def samples(self) -> int:
        """How many samples a view has."""
        return int(self.asked["data"]["samples"])

    def rows(self, ids: Tensor, turn: Tensor) -> dict[str, Tensor]:
        """Return the answers about samples at turns.

        Args:
            ids: `[B]` sample ids.
            turn: `[B]` which view of each.

        Returns:
            by name, `[B, ...]` on the CPU.
        """
        place = turn * self.samples + ids
        number, row = place // self.asked["rows"], place % self.asked["rows"]
        files = number.unique().tolist()
        if len(files) == 1:
            return {name: tensor[row] for name, tensor in self._file(files[0]).items()}
        found: dict[str, Tensor] = {}
        for file in files:
            rows = (number == file).nonzero().flatten()
            for name, tensor in self._file(file).items():
                taken = tensor[row[rows]]
                found.setdefault(name, taken.new_empty(len(ids), *taken.shape[1:]))[rows] = taken
        return found

    def first(self, count: int = 2) -> dict[str, Tensor]:
        """Return the answers about the first samples."""
        ids = torch.arange(min(count, self.samples))
        return self.rows(ids, torch.zeros_like(ids))

    def _file(self, number: int) -> dict[str, Tensor]:
        """Return the tensors of a file; they are mapped, and read as they are used."""
        if number not in self._files:
            path = self.folder / file_name(number)
            try:
                self._files[number] = load_file(path)
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path} cannot be read ({error}): remove it and store again") from error
        return self._files[number]

    def require(self, data: Mapping[str, Any], samples: Samples) -> None:
        """Refuse to teach with answers that are about other samples, or about other views of them.

        Args:
            data: the section of the recipe.
            samples: that are trained on.

        Raises:
            UserError: naming what differs.
        """
        known = self.asked["data"]
        for word in WORDS:
            if plain(data.get(word)) != known["words"][word]:
                raise UserError(
                    f"the answers in {self.folder} are about data.{word} = {known['words'][word]}, and the recipe has "
                    f"{plain(data.get(word))}: train on the same, or store again"
                )
        if len(samples) != known["samples"]:
            raise UserError(
                f"the answers in {self.folder} are about {known['samples']} samples, and there are {len(samples)}: "
                "train on the same data, or store again"
            )
        found = fingerprint(samples)
        if found["names"] != known["names"]:
            raise UserError(f"the answers in {self.folder} are about samples of other names, or in another order")
        other = [place for place, said in found["content"].items() if known["content"].get(place) != said]
        if other:
            raise UserError(
                f"{samples.name(int(other[0]))} is not what it was when the answers in {self.folder} were stored: "
                "train on the same data, or store again"
            )

    def verify(self) -> None:
        """Hold every file against its hash.

        Raises:
            UserError: naming the first that differs.
        """
        for name, entry in self.asked["files"].items():
            if digest(self.folder / name) != entry["sha256"]:
                raise UserError(
                    f"{self.folder / name} is damaged: remove it and give the `tutelage store` command again"
                )


def manifest(folder: Path) -> dict[str, Any]:
    """Return what a store says of itself.

    Raises:
        UserError: if the folder holds none, or a damaged one.
    """
    path = folder / MANIFEST
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except OSError:
        raise UserError(f"{folder} holds no stored answers (no {MANIFEST}): make them with `tutelage store`") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): remove the folder and store again") from error


def write_manifest(folder: Path, asked: Mapping[str, Any]) -> None:
    """Write what a store says of itself."""
    write_text(folder / MANIFEST, json.dumps(dict(asked), indent=2) + "\n")


def plain(value: Any) -> Any:
    """Return a value as it comes back from a file."""
    return json.loads(json.dumps(value, default=str))


def file_name(number: int) -> str:
    """Return the name of a file of answers."""
    return f"answers-{number:05d}.safetensors"


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
