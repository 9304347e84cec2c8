# SPDX-License-Identifier: Apache-2.0
"""A student as it is handed over: what it takes, what it gives, and the proof that the copy answers the same."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.core import InputSpec, Model
from tutelage.core.error import UserError, nearest

#: What else a difference may come from, where rows come in the order of a score.
UNLEARNED = "; rounding decides where a student that has not learned scores all places alike: train it first"


class Exported(nn.Module):
    """A student that takes pixels in [0, 1] and normalises them itself, as a plain module.

    Args:
        model: the student.
        normalised: leave the normalisation to the caller.
    """

    def __init__(self, model: Model, *, normalised: bool = False) -> None:
        super().__init__()
        self.module, self.call, self.outputs = model.module, model.call, model.outputs
        spec = None if normalised else model.input
        self.bgr = spec is not None and spec.bgr
        mean, std = (spec.mean, spec.std) if spec is not None else ((), ())
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean or (0.0,)).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std or (1.0,)).view(1, -1, 1, 1), persistent=False)
        self.normalises = bool(mean)

    def forward(self, pixels: Tensor) -> Any:
        """Return the student's output for `[B, C, H, W]` pixels."""
        if self.bgr:
            pixels = pixels.flip(1)
        if self.normalises:
            pixels = (pixels - self.mean) / self.std
        found = self.call(self.module, pixels) if self.call else self.module(pixels)
        return self.outputs.plain(found) if self.outputs.plain else found


@dataclass(frozen=True)
class Export:
    """What was written.

    Args:
        path: of the file.
        size: in bytes.
        difference: largest absolute difference between the copy's answers and PyTorch's, or None where the
            copy was not run.
    """

    path: Path
    size: int
    difference: float | None


def example(model: Model, size: tuple[int, int] | None, rows: int = 2) -> Any:
    """Return pixels in [0, 1] of the size a student takes, or tokens.

    Raises:
        UserError: if neither the student nor the caller says a size.
    """
    if model.text is not None:
        return model.text.blank(rows)
    spec = model.input or InputSpec()
    chosen = spec.size or size
    if chosen is None:
        raise UserError("the student takes any size; say one: --size 224")
    generator = torch.Generator().manual_seed(0)
    return torch.rand(rows, spec.channels, *chosen, generator=generator)


def kinds() -> list[str]:
    """Return the formats: the files of this folder that write one."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in ("__init__", "student"))


def export(
    model: Model,
    path: Path,
    kind: str,
    *,
    size: tuple[int, int] | None = None,
    normalised: bool = False,
) -> Export:
    """Write a student in a format and check the copy against PyTorch.

    Args:
        model: the student, on the CPU.
        path: of the file.
        kind: `safetensors` (weights alone, keys as the library that made the model expects them), `onnx` or
            `torch_export`.
        size: (height, width) of the pixels, where the student takes any.
        normalised: the copy takes normalised pixels; by default it takes [0, 1] and normalises itself.

    Raises:
        UserError: on an unknown format, or if the copy answers otherwise than the student.
    """
    from importlib import import_module

    if kind not in kinds():
        raise UserError(f"unknown format {kind!r}{nearest(kind, kinds())}")
    if model.text is not None and kind != "safetensors":
        raise UserError(f"a language model is not exported as {kind} yet: choose safetensors")
    model.module.eval()
    written: Export = import_module(f"tutelage.export.{kind}").write(
        Exported(model, normalised=normalised).eval(), example(model, size, 2 if model.outputs.batched else 1), path
    )
    return written


def tensors(answer: Any) -> list[Tensor]:
    """Return what a student answers as a list: one tensor, or several."""
    return [answer] if isinstance(answer, Tensor) else list(answer)


def require_equal(found: Sequence[Tensor], expected: Sequence[Tensor], path: Path, *, ranked: bool = False) -> float:
    """Return the largest difference of two answers.

    Args:
        found: what the copy answers.
        expected: what the student answers.
        path: of the copy; it is removed if it answers otherwise.
        ranked: rows come in the order of a score: those that rounding exchanged are compared all the same.

    Raises:
        UserError: if the difference is more than rounding explains.
    """
    beside = _paired(found, expected) if ranked else zip(found, expected, strict=True)
    pairs = [(a.double(), b.double()) for a, b in beside]
    apart = [(a - b).abs().flatten() for a, b in pairs if a.shape == b.shape]
    known = torch.cat([apart[0].new_zeros(1), *apart]) if len(apart) == len(pairs) else torch.tensor([math.inf])
    difference = known.max().item()  # of numbers with a NaN among them it is that
    scale = max((b.abs().max().item() for _, b in pairs if b.numel()), default=0.0)
    if not difference <= 1e-4 * max(scale, 1.0):
        path.unlink(missing_ok=True)
        raise UserError(
            f"{path.name} answers otherwise than the student: {difference:.2g} apart at a scale of {scale:.2g}; "
            f"it was removed{UNLEARNED * ranked}"
        )
    return difference


def _paired(found: Sequence[Tensor], expected: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return answers beside each other: each expected row with the found row most like it, and the other way round.

    Rows are compared in everything but what is larger than a row: masks follow.
    """
    if any(a.shape != b.shape for a, b in zip(found, expected, strict=True)):
        return [*zip(found, expected, strict=True)]
    one, other = (
        torch.cat([part.double() if part.ndim == 2 else part.double()[:, None] for part in row], dim=1)
        for row in ([part for part in whole if part.ndim < 3] for whole in (found, expected))
    )
    far = torch.cdist(other, one, p=math.inf)
    near, back = far.argmin(dim=1), far.argmin(dim=0)
    return [
        *((a[near], b) for a, b in zip(found, expected, strict=True)),
        *((a, b[back]) for a, b in zip(found, expected, strict=True)),
    ]
