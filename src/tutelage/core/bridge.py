# SPDX-License-Identifier: Apache-2.0
"""Small modules from the student's shape to the teacher's: trained with a term, never exported."""

from torch import Tensor, nn

from tutelage.core.error import UserError


def bridge(student: Tensor, teacher: Tensor, *, always: bool = False, bias: bool = True) -> nn.Module:
    """Return the linear map of channels from a student tensor to a teacher tensor.

    A 1x1 convolution for maps `[B, C, H, W]`, a linear layer for tokens `[B, L, D]` and vectors `[B, D]`,
    with PyTorch's default initialisation; the identity where the widths agree already.

    Args:
        student: signal of the dry run.
        teacher: signal of the dry run.
        always: build a layer even between equal widths.
        bias: of the layer.

    Raises:
        UserError: if one is a map and the other is not.
    """
    if student.ndim != teacher.ndim:
        raise UserError(
            f"no bridge from {list(student.shape)} to {list(teacher.shape)}: name taps of one kind"
        )
    dim = 1 if student.ndim == 4 else -1
    width, goal = student.shape[dim], teacher.shape[dim]
    if width == goal and not always:
        return nn.Identity()
    layer = nn.Conv2d(width, goal, 1, bias=bias) if student.ndim == 4 else nn.Linear(width, goal, bias=bias)
    return layer.to(student.device)


def check_grid(student: Tensor, teacher: Tensor, what: str) -> None:
    """Refuse maps of different height and width.

    Raises:
        UserError: naming both grids.
    """
    if student.shape[2:] != teacher.shape[2:]:
        raise UserError(
            f"{what} compares maps of one grid: the student's is {tuple(student.shape[2:])}, "
            f"the teacher's {tuple(teacher.shape[2:])}; tap layers of equal stride"
        )
