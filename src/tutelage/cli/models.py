# SPDX-License-Identifier: Apache-2.0
"""`tutelage models`: which models can be named."""

from typing import Annotated

import typer

from tutelage.cli._show import Json, document
from tutelage.core.error import UserError, nearest


def models(
    pattern: Annotated[
        str, typer.Argument(help="Part of a name, or with * the whole: resnet18, timm:vit_*.", show_default=False)
    ] = "",
    as_json: Json = False,
) -> None:
    """List the models that can stand for a teacher or a student, this library's own first."""
    from tutelage.models.names import names

    found = list(names(pattern))
    if not found:
        known = [name.partition(":")[2] for name in names()]
        raise UserError(f"no model matches {pattern!r}{nearest(pattern.rpartition(':')[2], known)}")
    if as_json:
        document(found)
        return
    print("\n".join(found))
