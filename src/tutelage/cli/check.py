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
    from tutelage.run.check import check as run
    from tutelage.run.resolve import resolve
    from tutelage.run.share import settle_shares
    from tutelage.run.stages import assembled

    found = {}
    for name, made in assembled(resolve(chosen, remark)):
        settle_shares(made)
        taught = made.recipe.teacher
        found[name] = run(made, fitted=taught is None or taught.fit is None)
    if as_json:
        plain = {name: one.plain() for name, one in found.items()}
        document(plain if chosen.stages else plain[""])
        return
    for name, one in found.items():
        if name:
            remark(f"stage {name}")
        checked_text(one)
