# SPDX-License-Identifier: Apache-2.0
"""torch.export: a program that needs torch and nothing else."""

from pathlib import Path

import torch
from torch import Tensor

from tutelage.core.error import UserError
from tutelage.core.storage import write_whole
from tutelage.export.student import Export, Exported, require_equal, tensors


def write(student: Exported, pixels: Tensor, path: Path) -> Export:
    """Write a `.pt2` program with a free batch size and compare its answers with the student's.

    Raises:
        UserError: if the network cannot be traced, or the answers differ.
    """
    with torch.no_grad():
        try:
            free = {0: torch.export.Dim("batch", min=1)} if student.outputs.batched else {}
            program = torch.export.export(student, (pixels,), dynamic_shapes=(free,))
        except Exception as error:  # whatever tracing raises
            raise UserError(f"the student cannot be exported: {str(error).splitlines()[0]}") from error

        def save(partial: Path) -> None:
            with partial.open("wb") as file:
                torch.export.save(program, file)

        write_whole(path, save)
        with path.open("rb") as file:
            found = tensors(torch.export.load(file).module()(pixels))
        difference = require_equal(found, tensors(student(pixels)), path, ranked=student.outputs.ranked)
        return Export(path, path.stat().st_size, difference)
