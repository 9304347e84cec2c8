# SPDX-License-Identifier: Apache-2.0
"""ONNX, checked in ONNX Runtime."""

import warnings
from pathlib import Path

import torch
from torch import Tensor

from tutelage.core.error import UserError
from tutelage.core.storage import write_whole
from tutelage.export.student import Export, Exported, require_equal, tensors


def write(student: Exported, pixels: Tensor, path: Path) -> Export:
    """Write an ONNX file with a free batch size and compare its answers with PyTorch's.

    Raises:
        UserError: if the packages are missing, the network cannot be exported, or the answers differ.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    except ImportError as error:
        raise UserError(f"ONNX needs {error.name}: pip install 'tutelage[onnx]'") from error
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter speaks of its own internals
        try:
            program = torch.onnx.export(
                student,
                (pixels,),
                input_names=["pixels"],
                output_names=list(student.outputs.names),
                dynamic_shapes={"pixels": {0: torch.export.Dim("batch", min=1)} if student.outputs.batched else {}},
                dynamo=True,
                verbose=False,
            )
        except Exception as error:  # the exporter raises whatever its passes raise
            raise UserError(f"the student cannot be exported to ONNX: {str(error).splitlines()[0]}") from error
        assert program is not None
        write_whole(path, lambda partial: program.save(partial))
        expected = tensors(student(pixels))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = [torch.from_numpy(one) for one in session.run(None, {"pixels": pixels.numpy()})]
    return Export(path, path.stat().st_size, require_equal(found, expected, path))
