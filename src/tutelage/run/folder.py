# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: what was asked, what happened, and the student."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_model
from torch import nn

from tutelage.core.error import UserError
from tutelage.core.storage import write_text, write_whole
from tutelage.run.recipe import Recipe, parse, read_text, read_yaml

SHOWN = 3  # differences that an error lists


class RunFolder:
    """`recipe.yaml`, `metrics.jsonl`, `checkpoints/`, `student.safetensors`, `student.json`, `result.json`.

    Where the recipe that was asked for left something open, it lies beside the resolved one, as `asked.yaml`.
    Students that learned along lie in `peers/NAME`: `run:FOLDER/peers/NAME` is a model.

    Args:
        path: the folder; made when first written to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe_path = path / "recipe.yaml"
        self.asked_path = path / "asked.yaml"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.weights = path / "student.safetensors"
        self.card = path / "student.json"
        self.result_path = path / "result.json"
        self.report = path / "report.html"

    @classmethod
    def existing(cls, path: Path) -> "RunFolder":
        """Return the folder of a finished run.

        Raises:
            UserError: if it holds no student.
        """
        folder = cls(path)
        if not folder.card.exists():
            raise UserError(f"{path} holds no finished run (no student.json)")
        return folder

    def holds(self, recipe: Recipe) -> bool:
        """Whether this very run was begun here before; nothing is written.

        Args:
            recipe: as it was asked for, or as it was resolved.

        Raises:
            UserError: if the folder holds another run, naming what differs, or something else.
        """
        if self.recipe_path.exists():
            known = [read(path) for path in (self.asked_path, self.recipe_path) if path.exists()]
            found = [list(differences(one.plain(), recipe.plain())) for one in known]
            if all(found):
                other = found[0]
                more = f" and {len(other) - SHOWN} more" if len(other) > SHOWN else ""
                raise UserError(
                    f"{self.path} holds a run of another recipe ({', '.join(other[:SHOWN])}{more}); "
                    "choose another --out, or remove the folder"
                )
            return True
        if self.path.is_file() or (self.path.is_dir() and set(self.path.iterdir()) - {self.asked_path}):
            what = "is a file" if self.path.is_file() else "is not empty and holds no run"
            raise UserError(f"{self.path} {what}; choose another --out")
        return False

    def claim(self, asked: Recipe, resolved: Recipe | None = None) -> None:
        """Write the recipe, or find the same one there: then the run goes on where it stopped.

        Args:
            asked: what was asked for.
            resolved: with everything decided that it left open; the same by default.

        Raises:
            UserError: if the folder holds something else, or cannot be written.
        """
        resolved = resolved or asked
        if self.holds(asked) and self.recipe() == resolved:
            return
        if asked != resolved and not self.asked_path.exists():
            write_text(self.asked_path, asked.text())
        write_text(self.recipe_path, resolved.text())

    def recipe(self) -> Recipe:
        """Return the resolved recipe."""
        return read(self.recipe_path)

    def peer(self, name: str) -> "RunFolder":
        """Return the folder of another student that learned along: its weights and how to build it again."""
        return RunFolder(self.path / "peers" / name)

    def save_student(self, module: nn.Module, card: Mapping[str, Any]) -> None:
        """Write the student's weights and how to build it again."""
        write_whole(self.weights, lambda partial: save_model(module, str(partial)))
        write_text(self.card, json.dumps(dict(card), indent=2) + "\n")

    def save_result(self, result: Mapping[str, Any]) -> None:
        """Write the scores: the sign of a finished run."""
        write_text(self.result_path, json.dumps(dict(result), indent=2) + "\n")

    def result(self) -> dict[str, Any] | None:
        """Return the scores of a finished run, or None."""
        if not self.result_path.exists():
            return None
        try:
            return dict(json.loads(read_text(self.result_path)))
        except ValueError as error:
            raise UserError(f"{self.result_path} is damaged ({error}); remove it") from error


def read(path: Path) -> Recipe:
    """Return the recipe of a file.

    Raises:
        UserError: if it cannot be read, or is none.
    """
    return parse(read_yaml(read_text(path), str(path)), where=str(path))


def differences(before: Any, after: Any, place: str = "") -> Iterator[str]:
    """Yield where two recipes differ, as `optimizer.lr was 0.1`."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in {**before, **after}:
            yield from differences(before.get(key), after.get(key), f"{place}.{key}" if place else str(key))
    elif before != after:
        was = "absent" if before is None else "a section" if isinstance(before, Mapping) else before
        yield f"{place} was {was}"
