# SPDX-License-Identifier: Apache-2.0
"""torch.export: a program that needs torch and nothing else."""

from pathlib import Path

import torch
from torch import Tensor

from tutelage.core.error import UserError
from tutelage.core.storage import write_whole
from tutelage.export.student import Export, Exported, require_equal


def write(student: Exported, pixels: Tensor, path: Path) -> Export:
    """Write a `.pt2` program with a free batch size and compare its answers with the student's.

    Raises:
        UserError: if the network cannot be traced, or the answers differ.
    """
    with torch.no_grad():
        try:
            program = torch.export.export(student, (pixels,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
        except Exception as error:  # whatever tracing raises
            raise UserError(f"the student cannot be exported: {str(error).splitlines()[0]}") from error

        def save(partial: Path) -> None:
            with partial.open("wb") as file:
                torch.export.save(program, file)

        write_whole(path, save)
        with path.open("rb") as file:
            found = torch.export.load(file).module()(pixels)
        return Export(path, path.stat().st_size, require_equal(found, student(pixels), path))
