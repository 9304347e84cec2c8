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
    from tutelage.run.quick import asked

    chosen, name = asked(recipe, student=student, data=data, sets=sets)
    if recipe:
        chosen = chosen.model_copy(update={"teacher": None, "objective": {"task": 1.0}, "compare": None})
        name = f"{name}-alone"
    from tutelage.run.distill import distill as run

    result = run(chosen, out or Path("runs", name), quiet=quiet, say=(lambda text: None) if quiet else remark)
    finished(result, as_json)
