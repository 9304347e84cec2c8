# SPDX-License-Identifier: Apache-2.0
"""Weights that a recipe gives as a share of the whole gradient: measured once, then numbers."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

import torch

from tutelage.core import ranks
from tutelage.core.error import UserError
from tutelage.core.schedule import Schedule
from tutelage.run.assemble import Assembled
from tutelage.run.recipe import Recipe
from tutelage.run.untouched import untouched

MEASURED = 4  # batches of the training set
DIGITS = 4  # of a weight that is written down


def shares(objective: Mapping[str, Any]) -> dict[str, float]:
    """Return the shares that an objective asks for, by label."""
    weights = {
        label: block if label == "task" else block.get("weight") if isinstance(block, Mapping) else block
        for label, block in objective.items()
    }
    return {label: float(w["share"]) for label, w in weights.items() if isinstance(w, Mapping) and "share" in w}


def settle_shares(made: Assembled) -> Recipe:
    """Give every loss that asks for a share its weight, and return the recipe with these numbers.

    A loss's share is its weighted gradient norm over the sum of all, the norms being means over the first batches
    of the run at the student's initial weights. The weights that are numbers stay as they are.

    Args:
        made: assembled, untrained; nothing but the weights of its objective is changed.

    Raises:
        UserError: if the shares leave nothing to the other losses, there are none, or a norm is zero.
    """
    wanted = shares(made.recipe.objective)
    if not wanted:
        return made.recipe
    norms = _norms(made)
    objective = made.distiller.objective
    rest = sum(objective.final_weight(label) * norm for label, norm in norms.items() if label not in wanted)
    left = 1 - sum(wanted.values())
    if rest <= 0 or left <= 1e-6:
        raise UserError(
            f"objective: the shares of {', '.join(wanted)} are measured against the losses whose weight is a number; "
            f"{'there is none' if rest <= 0 else 'they leave nothing to those'}"
        )
    numbers = {}
    for label, share in wanted.items():
        if not norms[label] > 0:
            raise UserError(f"objective.{label}.weight: its gradient on the student is zero, so it can have no share")
        numbers[label] = float(f"{share * rest / left / norms[label]:.{DIGITS}g}")
    for label, number in numbers.items():
        schedule = Schedule.parse(number)
        if label == "task":
            objective.task_weight = schedule
        else:
            objective.entries[label] = replace(objective.entries[label], weight=schedule)
    made.recipe = made.recipe.model_copy(update={"objective": _numbered(made.recipe.objective, numbers)})
    return made.recipe


def _norms(made: Assembled) -> dict[str, float]:
    """Return the mean norm of each loss's gradient on the student, before its weight, over all ranks."""
    distiller = made.distiller
    with untouched(made):
        distiller.train()
        found = []
        for batch in islice(made.data.train.epoch(0), MEASURED):
            fed = next(iter(distiller.feed(batch.to(made.runtime.device))))
            measured = distiller.measure(fed, distiller.observe(fed))
            found.append([norm for _, norm in measured.values()])
    means = ranks.mean(torch.tensor(found, dtype=torch.float64, device=made.runtime.device).mean(dim=0))
    return dict(zip(distiller.objective.labels, means.tolist(), strict=True))


def _numbered(objective: Mapping[str, Any], numbers: Mapping[str, float]) -> dict[str, Any]:
    """Return an objective with numbers for shares."""
    plain = {
        label: number if label == "task" else {**objective[label], "weight": number}
        for label, number in numbers.items()
    }
    return {**objective, **plain}
