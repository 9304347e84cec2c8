# SPDX-License-Identifier: Apache-2.0
"""What a model's roles read in one forward."""

from typing import Any

import torch
from torch import Tensor

from tutelage.core import Model
from tutelage.core.tap import Recorder


def readings(model: Model, images: Tensor) -> tuple[dict[str, Tensor], Any]:
    """Return every role's tensor, and the output, in evaluation mode."""
    model.module.eval()
    recorder = Recorder(model.module, model.roles)
    with torch.no_grad():
        recorder.watch()
        with recorder:
            model(images)
        recorder.clone_overwritten()
        with recorder:
            output = model(images)
    recorder.close()
    return recorder.release(), output


def noise(size: int, channels: int = 3, rows: int = 2) -> Tensor:
    """Return images in [0, 1]."""
    return torch.rand(rows, channels, size, size, generator=torch.Generator().manual_seed(0))


def stages(model: Model) -> list[str]:
    """Return the roles `stages[i]` in order."""
    return [role for role in model.roles if role.startswith("stages[") and role.endswith("]")]
