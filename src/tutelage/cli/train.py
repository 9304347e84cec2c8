# SPDX-License-Identifier: Apache-2.0
"""`tutelage train`: the same loop without a teacher, the baseline."""

from pathlib import Path

from tutelage.cli._show import Json, Quiet, Sets, finished, remark
from tutelage.cli.distill import Data, Named, Out, Student


def train(
    recipe: Named = None,
    student: Student = None,
    data: Data = None,
    out: Out = None,
    sets: Sets = [],  # noqa: B006  (typer reads the default)
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train a student without a teacher: the baseline.

    Of a recipe, the teacher and the objective are left out: the student learns from the labels alone.
    """
    from tutelage.run import quick
    from tutelage.run.recipe import load

    if recipe:
        given = load(
            recipe, quick.overrides(student=student, data=data, teacher=None, method=None) + list(sets)
        )
        chosen = given.model_copy(update={"teacher": None, "objective": {"task": 1.0}})
        name = f"{Path(recipe).stem}-alone"
    else:
        chosen = quick.recipe(student=student, data=data, sets=sets)
        name = f"alone-{chosen.student.model.rpartition(':')[2]}"
    from tutelage.run.distill import distill as run

    result = run(chosen, out or Path("runs", name), quiet=quiet, say=(lambda text: None) if quiet else remark)
    finished(result, as_json)
