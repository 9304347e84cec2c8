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

    Args:
        path: the folder; made when first written to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe_path = path / "recipe.yaml"
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

        Raises:
            UserError: if the folder holds another run, naming what differs, or something else.
        """
        if self.recipe_path.exists():
            other = list(differences(self.recipe().plain(), recipe.plain()))
            if other:
                more = f" and {len(other) - SHOWN} more" if len(other) > SHOWN else ""
                raise UserError(
                    f"{self.path} holds a run of another recipe ({', '.join(other[:SHOWN])}{more}); "
                    "choose another --out, or remove the folder"
                )
            return True
        if self.path.is_file() or (self.path.is_dir() and any(self.path.iterdir())):
            what = "is a file" if self.path.is_file() else "is not empty and holds no run"
            raise UserError(f"{self.path} {what}; choose another --out")
        return False

    def claim(self, recipe: Recipe) -> None:
        """Write the recipe, or find the same one there: then the run goes on where it stopped.

        Raises:
            UserError: if the folder holds something else, or cannot be written.
        """
        if not self.holds(recipe):
            write_text(self.recipe_path, recipe.text())

    def recipe(self) -> Recipe:
        """Return the resolved recipe."""
        return parse(read_yaml(read_text(self.recipe_path), str(self.recipe_path)), where=str(self.recipe_path))

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


def differences(before: Any, after: Any, place: str = "") -> Iterator[str]:
    """Yield where two recipes differ, as `optimizer.lr was 0.1`."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in {**before, **after}:
            yield from differences(before.get(key), after.get(key), f"{place}.{key}" if place else str(key))
    elif before != after:
        was = "absent" if before is None else "a section" if isinstance(before, Mapping) else before
        yield f"{place} was {was}"
