# SPDX-License-Identifier: Apache-2.0
"""ONNX, checked in ONNX Runtime."""

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tutelage.core.error import UserError
from tutelage.core.storage import write_whole
from tutelage.export.student import Export, Exported, require_equal, tensors

INT32, BOOL = 6, 9  # as ONNX numbers its types


def write(student: Exported, pixels: Tensor, path: Path) -> Export:
    """Write an ONNX file with a free batch size and compare its answers with PyTorch's.

    Raises:
        UserError: if the packages are missing, the network cannot be exported, or the answers differ.
    """
    try:
        import onnxruntime
        from onnxscript import opset18 as op
    except ImportError as error:
        raise UserError(f"ONNX needs {error.name}: pip install 'tutelage[onnx]'") from error

    def all_true(self: Any) -> Any:  # asked by checks of transformers, and not known to the exporter
        return op.Cast(op.ReduceMin(op.Cast(self, to=INT32), keepdims=0), to=BOOL)

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter speaks of its own internals
        try:
            program = torch.onnx.export(
                student,
                (pixels,),
                input_names=["pixels"],
                output_names=list(student.outputs.names),
                dynamic_shapes={"pixels": {0: torch.export.Dim("batch", min=1)} if student.outputs.batched else {}},
                custom_translation_table={torch.ops.aten._is_all_true.default: all_true},
                dynamo=True,
                verbose=False,
            )
        except Exception as error:  # the exporter raises whatever its passes raise
            raise UserError(f"the student cannot be exported to ONNX: {_reason(error)}") from error
        assert program is not None
        write_whole(path, lambda partial: program.save(partial))
        expected = tensors(student(pixels))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = [torch.from_numpy(one) for one in session.run(None, {"pixels": pixels.numpy()})]
    return Export(path, path.stat().st_size, require_equal(found, expected, path, ranked=student.outputs.ranked))


def _reason(error: Exception) -> str:
    """Return the line of the exporter's report that says what was wrong."""
    lines = re.sub(r"\x1b\[\d*m", "", str(error)).splitlines()
    start = lines.index("## Exception summary") + 1 if "## Exception summary" in lines else 0
    return next((line for line in lines[start:] if line.strip()), type(error).__name__)
