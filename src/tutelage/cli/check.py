# SPDX-License-Identifier: Apache-2.0
"""`tutelage check`: two steps of a run before it."""

from tutelage.cli._show import Json, Sets, checked_text, document, remark
from tutelage.cli.distill import Data, Fit, Method, Named, Student, Teacher


def check(
    recipe: Named = None,
    teacher: Teacher = None,
    student: Student = None,
    data: Data = None,
    method: Method = None,
    fit_teacher: Fit = None,
    sets: Sets = [],  # noqa: B006  (typer reads the default)
    as_json: Json = False,
) -> None:
    """Try a run: which layers meet, how strong each loss is, the teacher's score, the time it will take."""
    from tutelage.run.quick import asked

    chosen, _ = asked(
        recipe, student=student, data=data, teacher=teacher, method=method, sets=sets, fit_teacher=fit_teacher
    )
    from tutelage.run.assemble import assemble
    from tutelage.run.check import check as run
    from tutelage.run.resolve import resolve
    from tutelage.run.share import settle_shares

    resolved = resolve(chosen, remark)
    made = assemble(resolved)
    settle_shares(made)
    found = run(made, fitted=resolved.teacher is None or resolved.teacher.fit is None)
    if as_json:
        document(found.plain())
    else:
        checked_text(found)
