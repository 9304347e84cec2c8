# SPDX-License-Identifier: Apache-2.0
"""`tutelage inspect`: one model as the library sees it."""

from typing import Annotated

import typer

from tutelage.cli._show import Json, document, tables_text


def inspect(
    model: Annotated[str, typer.Argument(help="A model such as timm:resnet18, or the folder of a run.")],
    size: Annotated[int | None, typer.Option(help="Pixels of a side; the model's own by default.")] = None,
    classes: Annotated[int | None, typer.Option(help="Number of classes; the model's own by default.")] = None,
    weights: Annotated[str | None, typer.Option(help="pretrained, or a file.")] = None,
    as_json: Json = False,
) -> None:
    """Show what a model takes and gives, its size, and where the tensors lie that methods read."""
    from tutelage.run.inspect import inspect as look

    found = look(model, image_size=size, num_classes=classes, weights=weights)
    if as_json:
        document(found.plain())
    else:
        tables_text(found.tables)
