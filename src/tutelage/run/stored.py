# SPDX-License-Identifier: Apache-2.0
"""Answers of a teacher in the place of the teacher: `teacher: {stored: FOLDER}`."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from tutelage.core import Stored
from tutelage.core.error import UserError
from tutelage.data.answers import Answers
from tutelage.data.load import Splits
from tutelage.data.loader import Replay
from tutelage.models import weights
from tutelage.models.load import rebuild
from tutelage.run.recipe import Recipe

LENT = "lent.safetensors"  # weights of the modules that the teacher lends


def replay_of(recipe: Recipe) -> Replay | None:
    """Return the views that a recipe's training must see, if its teacher's answers are stored.

    Raises:
        UserError: if the store cannot be opened.
    """
    folder = recipe.teacher.stored if recipe.teacher is not None else None
    return None if folder is None else Answers.open(folder).replay


def stored_teacher(folder: Path, recipe: Recipe, data: Splits) -> Stored:
    """Return a teacher that answers from disk.

    Args:
        folder: of the store.
        recipe: whose teacher it is.
        data: that is trained on: it must be what the answers are about.

    Raises:
        UserError: if the answers are about other samples or views, or of other classes.
    """
    answers = Answers.open(folder)
    names = answers.asked["class_names"]
    if names and data.class_names and list(data.class_names) != names:
        raise UserError(f"the classes of the answers in {folder} are not the data's, or lie in another order")
    answers.require(recipe.data.model_dump(mode="json"), data.train.samples)
    return Stored(answers.first(), answers.num_classes, _lent(answers), str(folder))


def _lent(answers: Answers) -> dict[str, nn.Module]:
    """Return the modules that the teacher lent, built as it was, with their own weights."""
    roles = answers.asked["lent"]
    if not roles:
        return {}
    path = answers.folder / LENT
    model, found = rebuild(answers.asked["teacher"]), {}
    try:
        held = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}): store again") from error
    for role in roles:
        module = model.lend(role)
        own = {name.partition("/")[2]: tensor for name, tensor in held.items() if name.startswith(f"{role}/")}
        weights.fit(module, own, path)
        found[role] = module
    return found
