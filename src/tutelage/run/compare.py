# SPDX-License-Identifier: Apache-2.0
"""Arms of one recipe over paired seeds: same initial weights, same batches, same number of updates."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutelage import methods
from tutelage.core.error import UserError
from tutelage.report.comparison import Comparison
from tutelage.report.measure import Measures
from tutelage.report.measure import table as cost_table
from tutelage.report.metric import Metric
from tutelage.report.table import Table
from tutelage.run.assemble import task_of
from tutelage.run.distill import Result, distill, teacher_recipe
from tutelage.run.folder import RunFolder
from tutelage.run.objective import build as build_objective
from tutelage.run.recipe import Recipe
from tutelage.train.checkpoint import write_text


@dataclass(frozen=True)
class Compared:
    """What a comparison ended with.

    Args:
        title: of its report.
        comparison: scores by arm and seed, against the first arm.
        measures: of the teacher and of each arm's student.
        runs: folders by arm and seed.
        folder: of all of them.
    """

    title: str
    comparison: Comparison
    measures: Mapping[str, Measures]
    runs: Mapping[str, Mapping[int, Path]]
    folder: Path

    @property
    def tables(self) -> tuple[Table, Table]:
        """What is printed and reported: scores, then size and speed."""
        return self.comparison.table(self.title), cost_table(self.measures)

    def plain(self) -> dict[str, Any]:
        """Return the comparison as plain data."""
        found = self.comparison
        return {
            "title": self.title,
            "metric": found.metric.key,
            "baseline": found.baseline,
            "teacher": found.teacher,
            "scores": {
                arm: {str(seed): value for seed, value in scores.items()}
                for arm, scores in found.scores.items()
            },
            "differences": {arm: vars(pairs) for arm, pairs in found.pairs.items()},
            "measures": {name: one.plain() for name, one in self.measures.items()},
            "verdict": found.verdict.sentence,
        }


def compare(
    recipe: Recipe,
    folder: Path,
    *,
    title: str,
    quiet: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Compared:
    """Run every arm of a recipe with every seed; finished runs are not run again.

    Args:
        recipe: with a `compare` section.
        folder: of the comparison; each run has a folder in it.
        title: of the report.
        quiet: show no progress.
        say: told what runs.

    Raises:
        UserError: if the recipe compares nothing, or whatever is wrong with a run.
    """
    if recipe.compare is None:
        raise UserError("the recipe has no `compare` section: arms and seeds")
    for objective in recipe.compare.arms.values():
        build_objective(objective)  # every arm is valid before the first one trains
    RunFolder(folder).claim(recipe)
    key = task_of(recipe.task, num_classes=2, class_names=()).headline
    metric, measures, teacher_score = Metric.of(key), dict[str, Measures](), None
    teacher_folder = folder / "teacher"
    if recipe.teacher is not None and recipe.teacher.fit is not None:
        fitted = distill(teacher_recipe(recipe), teacher_folder, title="teacher", quiet=quiet)
        teacher_score, measures["teacher"] = fitted.scores[key], fitted.measures
        say(f"teacher: {metric.label} {metric.show(teacher_score)}")
    results: dict[str, dict[int, Result]] = {name: {} for name in recipe.compare.arms}
    for seed in recipe.compare.seeds:
        for name, objective in recipe.compare.arms.items():
            one, place = arm_recipe(recipe, objective, seed), folder / f"{_stem(name)}-{seed}"
            found = distill(
                one, place, title=f"{name}, seed {seed}", quiet=quiet, teacher_folder=teacher_folder
            )
            results[name][seed] = found
            say(f"{name}, seed {seed}: {metric.label} {metric.show(found.scores[key])}")
    first = recipe.compare.seeds[0]
    measures |= {name: runs[first].measures for name, runs in results.items()}
    scores = {name: {seed: r.scores[key] for seed, r in runs.items()} for name, runs in results.items()}
    compared = Compared(
        title,
        Comparison(metric, scores, baseline=next(iter(results)), teacher=teacher_score),
        measures,
        {name: {seed: r.folder.path for seed, r in runs.items()} for name, runs in results.items()},
        folder,
    )
    write_text(folder / "comparison.json", json.dumps(compared.plain(), indent=2) + "\n")
    from tutelage.run.page import comparison_page

    comparison_page(compared, recipe)
    return compared


def arm_recipe(recipe: Recipe, objective: Mapping[str, Any], seed: int) -> Recipe:
    """Return the recipe of one arm and seed: a teacher that no term reads is left out."""
    stems = [
        str(block.get("method", label)) if isinstance(block, Mapping) else label
        for label, block in objective.items()
        if label != "task"
    ]
    cards = methods.cards()
    reads = any(stem not in cards or cards[stem].needs_teacher for stem in stems)
    return recipe.model_copy(
        update={
            "compare": None,
            "objective": dict(objective),
            "teacher": recipe.teacher if reads else None,
            "train": recipe.train.model_copy(update={"seed": seed}),
        }
    )


def _stem(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name).split())
