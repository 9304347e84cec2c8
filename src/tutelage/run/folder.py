# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: what was asked, what happened, and the student."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_model
from torch import nn

from tutelage.core.error import UserError
from tutelage.run.recipe import Recipe, parse, read_yaml
from tutelage.train.checkpoint import write_text, write_whole


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

    def claim(self, recipe: Recipe) -> None:
        """Write the recipe, or find the same one there: then the run goes on where it stopped.

        Raises:
            UserError: if the folder holds another run.
        """
        if self.recipe_path.exists():
            before = self.recipe().plain()
            if before != recipe.plain():
                changed = [
                    key for key in {**before, **recipe.plain()} if before.get(key) != recipe.plain().get(key)
                ]
                raise UserError(
                    f"{self.path} holds a run of another recipe (other: {', '.join(sorted(changed))}); "
                    "choose another --out, or remove the folder"
                )
            return
        if self.path.exists() and any(self.path.iterdir()):
            raise UserError(f"{self.path} is not empty and holds no run; choose another --out")
        write_text(self.recipe_path, recipe.text())

    def recipe(self) -> Recipe:
        """Return the resolved recipe."""
        return parse(read_yaml(self.recipe_path.read_text(encoding="utf-8"), str(self.recipe_path)))

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
        return dict(json.loads(self.result_path.read_text(encoding="utf-8")))
