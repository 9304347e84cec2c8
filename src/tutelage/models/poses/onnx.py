# SPDX-License-Identifier: Apache-2.0
"""A published ONNX file as a pose model: to score it, or to learn from its answers. It has no gradients."""

from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from tutelage.core.error import UserError


@final
class OnnxPose(nn.Module):
    """RTMPose, DWPose or RTMW as exported: `[B, 3, H, W]` normalised pixels in, logits of x and y out.

    Args:
        num_keypoints: K of the data.
        image_size: (height, width) of the data's crops.
        file: the ONNX file.
        in_channels: of the images.

    Raises:
        UserError: if there is no such file, ONNX Runtime is not installed, or the file is for other images.
    """

    def __init__(
        self, num_keypoints: int, image_size: tuple[int, int], *, file: str | None = None, in_channels: int = 3
    ) -> None:
        super().__init__()
        if file is None or not Path(file).is_file():
            raise UserError(f"tutelage:onnx: no file {file!r}: say which with `file`")
        try:
            import onnxruntime
        except ImportError as error:
            raise UserError("tutelage:onnx needs ONNX Runtime: pip install 'tutelage[onnx]'") from error
        try:
            self.session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors share no class
            raise UserError(f"tutelage:onnx: {file} cannot be read ({str(error).splitlines()[0]})") from error
        first = self.session.get_inputs()[0]
        self.image_size, self.name = image_size, first.name
        size: list[Any] = list(first.shape[2:])
        if first.shape[1] != in_channels or any(
            isinstance(own, int) and own != given for own, given in zip(size, image_size, strict=True)
        ):
            raise UserError(f"tutelage:onnx: {file} takes {first.shape}, the crops are {in_channels} x {image_size}")
        outputs = self.session.get_outputs()
        keypoints = outputs[0].shape[1] if len(outputs) == 2 and len(outputs[0].shape) == 3 else None
        if keypoints is None or (isinstance(keypoints, int) and keypoints != num_keypoints):
            said = ", ".join(f"{one.name} {one.shape}" for one in outputs)
            raise UserError(
                f"tutelage:onnx: {file} gives {said}; wanted are two outputs [B, {num_keypoints}, bins], x and y"
            )
        # a model without parameters has no device; this one is no weight
        self.register_parameter("nothing", nn.Parameter(torch.zeros(())))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return `[B, K, Wx]` and `[B, K, Wy]`, cut from any graph."""
        given = pixels.detach().float().cpu().numpy()
        x, y = self.session.run(None, {self.name: given})
        return torch.from_numpy(x).to(pixels), torch.from_numpy(y).to(pixels)


ARCHITECTURES = {"onnx": OnnxPose}
