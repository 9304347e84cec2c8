# SPDX-License-Identifier: Apache-2.0
"""`tutelage models`: which models can be named."""

from itertools import groupby
from typing import Annotated

import typer

from tutelage.cli._show import Json, document
from tutelage.core.error import UserError, nearest


def models(
    pattern: Annotated[
        str, typer.Argument(help="Part of a name, or with * the whole: resnet18, timm:vit_*.", show_default=False)
    ] = "",
    task: Annotated[str | None, typer.Option(help="Of one task alone: detection, segmentation, ...")] = None,
    as_json: Json = False,
) -> None:
    """List the models that can stand for a teacher or a student, by task, this library's own first."""
    from tutelage.models.names import names

    found = list(names(pattern, task))
    if not found:
        known = [one.name.partition(":")[2] for one in names(task=task)]
        there = f" for {task}" if task else ""
        raise UserError(f"no model{there} matches {pattern!r}{nearest(pattern.rpartition(':')[2], known)}")
    if as_json:
        document([one._asdict() for one in found])
        return
    for name, group in groupby(found, key=lambda one: one.task):
        entries = list(group)
        width = max((len(one.name) for one in entries if one.what), default=0)
        print(name)
        for one in entries:
            print(f"  {one.name:{width}}  {one.what}".rstrip())
