# SPDX-License-Identifier: Apache-2.0
"""`tutelage export`: hand a run's student over."""

from pathlib import Path
from typing import Annotated

import typer

from tutelage.cli._show import Json, document


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    to: Annotated[str, typer.Option(help="safetensors, onnx or torch_export.")] = "onnx",
    out: Annotated[Path | None, typer.Option(help="File; beside the student by default.")] = None,
    size: Annotated[int | None, typer.Option(help="Pixels of a side, where the student takes any size.")] = None,
    normalised: Annotated[
        bool, typer.Option("--normalised", help="The copy takes normalised pixels, not [0, 1].")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write the student as safetensors, ONNX or a torch.export program, and check that it answers the same."""
    from tutelage.run.export import export as write

    written = write(run, to, out, size=(size, size) if size else None, normalised=normalised)
    if as_json:
        document({"path": str(written.path), "size": written.size, "difference": written.difference})
        return
    print(f"{written.path}: {written.size / 1e6:.2f} MB")
    if written.difference is not None:
        print(f"largest difference from PyTorch on the same pixels: {written.difference:.1e}")
