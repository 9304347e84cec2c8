# SPDX-License-Identifier: Apache-2.0
"""`tutelage predict`: what a model sees in images."""

from pathlib import Path
from typing import Annotated, Any

import typer

from tutelage.cli._show import Json, document, remark, tables_text
from tutelage.core.error import UserError


def predict(
    model: Annotated[str, typer.Argument(help="The folder of a run, or a model such as timm:resnet18.")],
    images: Annotated[list[Path], typer.Argument(help="Image files, folders of them, or videos.")],
    top: Annotated[int, typer.Option(help="So many classes an image.")] = 3,
    weights: Annotated[str | None, typer.Option(help="pretrained, or a file, for a model that is no run.")] = None,
    classes: Annotated[int | None, typer.Option(help="Number of classes in the file of weights.")] = None,
    size: Annotated[int | None, typer.Option(help="Pixels of a side; the run's, or the model's own.")] = None,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda.")] = None,
    skip: Annotated[bool, typer.Option("--skip", help="Files that cannot be read are no error.")] = False,
    task: Annotated[
        str | None, typer.Option(help="detection, segmentation or pose, for a model that is no run.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the drawings, of boxes, masks or keypoints.")] = None,
    boxes: Annotated[
        Path | None, typer.Option(help="Of pose: people a detector found, COCO results or its answers.json.")
    ] = None,
    openpose: Annotated[bool, typer.Option("--openpose", help="Of pose: OpenPose's order, with a neck.")] = False,
    as_json: Json = False,
) -> None:
    """Print the likeliest classes of each image; draw boxes, masks or keypoints where the model finds these.

    Files that cannot be read are named after the others; then the exit code is 2, unless --skip is given.
    """
    from tutelage.run.pictures import draw, task_named
    from tutelage.run.predict import files
    from tutelage.run.predict import predict as answers

    found: Any
    dense = task_named(model, task)
    if dense is not None:
        place = out or Path("predictions")
        paths = files(images)
        if dense.name != "pose" and (boxes is not None or openpose):
            raise UserError(f"--boxes and --openpose are for pose, and the model is for {dense.name}")
        if openpose:
            dense = dense.model_copy(update={"openpose": True})
        found = draw(
            model,
            paths,
            task=dense,
            out=place,
            weights=weights,
            num_classes=classes,
            image_size=size,
            device=device,
            options={"boxes": str(boxes)} if boxes is not None else None,
        )
    else:
        found = answers(model, images, top=top, weights=weights, num_classes=classes, image_size=size, device=device)
    if as_json:
        document(found.plain())
    elif dense is not None:
        print("\n".join([*found.drawings.values(), str(place / "answers.json")]))
    else:
        tables_text([found.table])
    for path, reason in found.unreadable.items():
        remark(f"cannot read {path}: {reason}")
    if found.unreadable and not skip:
        count = len(found.unreadable)
        raise UserError(f"{count} of {count + found.count} files could not be read; --skip lets them pass")
