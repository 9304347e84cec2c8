# SPDX-License-Identifier: Apache-2.0
"""A run's student in the formats of `tutelage.export`."""

from pathlib import Path

from tutelage.export.student import Export
from tutelage.export.student import export as write
from tutelage.models.load import load as load_model
from tutelage.run.folder import RunFolder

SUFFIXES = {"safetensors": ".safetensors", "onnx": ".onnx", "torch_export": ".pt2"}


def export(
    run: Path,
    kind: str,
    out: Path | None = None,
    *,
    size: tuple[int, int] | None = None,
    normalised: bool = False,
) -> Export:
    """Write a run's student in a format; see `tutelage.export.student.export`.

    Args:
        run: folder of the run.
        kind: of the file.
        out: the file; `student.<suffix>` in the run's folder by default, `exported.safetensors` for weights.
        size: (height, width) where the student takes any; the data's own size by default.
        normalised: the copy takes normalised pixels.

    Raises:
        UserError: if the folder holds no student, or the copy answers otherwise.
    """
    folder = RunFolder.existing(run)
    model = load_model(f"run:{run}")
    stem = "exported" if kind == "safetensors" else "student"
    path = out or folder.path / f"{stem}{SUFFIXES.get(kind, f'.{kind}')}"
    seen = model.source.get("image_size")
    return write(model, path, kind, size=size or (tuple(seen) if seen else None), normalised=normalised)
