# SPDX-License-Identifier: Apache-2.0
"""The papers behind a recipe."""

from pathlib import Path

from tutelage.core.card import Card
from tutelage.core.error import UserError
from tutelage.run.folder import RunFolder
from tutelage.run.page import cards_of
from tutelage.run.recipe import load


def cards(name: str) -> tuple[Card, ...]:
    """Return the cards of the methods that a recipe uses, those of its arms among them, each once.

    Args:
        name: of a recipe, or the folder of a run.

    Raises:
        UserError: if there is no such recipe, or it uses no method of a paper.
    """
    folder = RunFolder(Path(name))
    recipe = folder.recipe() if folder.recipe_path.is_file() else load(name)
    arms = recipe.compare.arms.values() if recipe.compare else ()
    found = {card.name: card for objective in (recipe.objective, *arms) for card in cards_of(objective)}
    if not found:
        raise UserError(f"{name} uses no method of a paper: its objective is the task alone")
    return tuple(found.values())
