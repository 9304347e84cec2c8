# SPDX-License-Identifier: Apache-2.0
"""Distillation as one call from Python."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from tutelage.core import Model, Teacher
from tutelage.data.objects import sets_of
from tutelage.run.distill import Result
from tutelage.run.distill import distill as run
from tutelage.run.given import Given, word
from tutelage.run.quick import name_of, recipe

Name = str | Mapping[str, Any]
Module = nn.Module | Model


def distill(
    *,
    student: Name | Module,
    data: Any,
    teacher: Name | Module | Teacher | None = None,
    method: str | None = None,
    out: str | Path | None = None,
    fit_teacher: bool = True,
    quiet: bool = True,
    say: Callable[[str], None] = lambda text: None,
    **sections: Any,
) -> Result:
    """Train a student from a teacher, and return it with its scores.

    The same as `tutelage distill`: what is left open is decided, a teacher that needs it is fitted first, the run is
    checked before it trains, and the same call goes on where it stopped. Models and data may be objects as well:

    - a module is tapped by the roles that one forward shows, and gets images as the data set gives them; the
      student is trained in place, the teacher is taken as it is
    - of a DataLoader the data set is read, by index: order and batches are functions of the seed

    Args:
        student: a name such as `timm:resnet18`, a recipe's section, a module or a `Model`.
        data: a source such as `digits` or a folder, a recipe's section, a Dataset or DataLoader of (image, class),
            a pair of them for training and validation, or a mapping of them by split.
        teacher: as the student, or a `Teacher`; None for methods that need none.
        method: methods joined with `+`; `kd` with a teacher.
        out: folder of the run; `runs/NAME` by default.
        fit_teacher: whether a named teacher that has no weights, or knows other classes, is fitted to the data.
        quiet: show no progress bar.
        say: told what was chosen, line by line.
        sections: further sections of a recipe: `objective`, `optimizer`, `train`, `task`; a `data` of objects takes
            its words (`batch_size`, `augment`, ...) as `data_options`.

    Returns:
        Scores, size and speed, the folder, and the student.

    Raises:
        UserError: for whatever is wrong with what was given.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     result = distill(teacher="tutelage:resnet8", student="tutelage:resnet8", data="digits",
        ...                      method="kd", out=folder, train={"steps": 2})
        >>> sorted(result.scores)
        ['agreement', 'ece', 'loss', 'top1', 'top5']
    """
    options = dict(sections.pop("data_options", {}))
    named_student, own_student = _parted(student)
    named_teacher, own_teacher = _parted(teacher)
    if own_teacher is not None:
        named_teacher["fit"] = None  # an object is taken as it is
    sets = None
    if isinstance(data, Path):
        data = str(data)
    if not isinstance(data, str) and not (isinstance(data, Mapping) and "source" in data):
        if isinstance(data, DataLoader) and data.batch_size:
            options.setdefault("batch_size", data.batch_size)
        sets = sets_of(data)
        data = {"source": word(data)}
    section = {"source": data, **options} if isinstance(data, str) else {**data, **options}
    made = recipe(
        student=named_student,
        data=section,
        teacher=named_teacher,
        method=method,
        fit_teacher=fit_teacher,
        sections=sections,
    )
    folder = Path(out) if out is not None else Path("runs", name_of(made, method))
    return run(made, folder, quiet=quiet, say=say, given=Given(own_student, own_teacher, sets))


def _parted(given: Any) -> tuple[Any, Any]:
    """Return what a recipe says of a model, and the object itself if it is one."""
    if given is None or isinstance(given, (str, Mapping)):
        return given, None
    return {"model": word(given)}, given
