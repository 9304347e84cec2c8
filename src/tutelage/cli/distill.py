# SPDX-License-Identifier: Apache-2.0
"""`tutelage distill`: train a student from a teacher."""

from pathlib import Path
from typing import Annotated

import typer

from tutelage.cli._show import Json, Quiet, Sets, finished, remark
from tutelage.core.error import UserError

Student = Annotated[str | None, typer.Option(help="The model that learns, e.g. timm:resnet18.")]
Teacher = Annotated[str | None, typer.Option(help="The model that knows, e.g. timm:resnet34.")]
Method = Annotated[str | None, typer.Option(help="Methods joined with +, e.g. kd+mgd.")]
Data = Annotated[str | None, typer.Option(help="Where the samples are: a folder, digits, cifar100:PATH, ...")]
Fit = Annotated[
    bool | None,
    typer.Option(
        "--fit-teacher/--no-fit-teacher",
        help="Fit a teacher that has no weights, or knows other classes, to the data first; or refuse it.",
        show_default="fit, unless a recipe says otherwise",
    ),
]
Out = Annotated[Path | None, typer.Option(help="Folder of the run; runs/NAME by default.")]
Named = Annotated[str | None, typer.Argument(help="A recipe: a YAML file or the name of a shipped one.")]


def distill(
    recipe: Named = None,
    teacher: Teacher = None,
    student: Student = None,
    data: Data = None,
    method: Method = None,
    fit_teacher: Fit = None,
    out: Out = None,
    sets: Sets = [],  # noqa: B006  (typer reads the default)
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train a student from a teacher.

    \b
    tutelage distill --teacher timm:resnet34 --student timm:resnet18 --data ./photos
    tutelage distill recipe.yaml --set optimizer.lr=0.05

    What the flags leave open is decided from data and models, said, and written into the recipe of the run. The
    same command goes on with a run that was stopped, from its last checkpoint.
    """
    from tutelage.run.quick import asked

    if recipe is None and student is not None and teacher is None and method is None:
        raise UserError("give a --teacher, or a --method that needs none; tutelage train is for a student alone")
    chosen, name = asked(
        recipe, student=student, data=data, teacher=teacher, method=method, sets=sets, fit_teacher=fit_teacher
    )
    if chosen.compare is not None:
        raise UserError(f"{recipe} is not one run, but arms over seeds: give it to tutelage compare")
    from tutelage.run.distill import distill as run

    result = run(chosen, out or Path("runs", name), quiet=quiet, say=(lambda text: None) if quiet else remark)
    finished(result, as_json)
