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
        raise UserError(f"no bridge from {list(student.shape)} to {list(teacher.shape)}: name taps of one kind")
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


def check_maps(student: Tensor, teacher: Tensor, what: str) -> None:
    """Refuse anything but two maps.

    Raises:
        UserError: naming both shapes.
    """
    if student.ndim != 4 or teacher.ndim != 4:
        raise UserError(f"{what} compares maps [B, C, H, W], not {list(student.shape)} and {list(teacher.shape)}")


def regressor(student: Tensor, teacher: Tensor, what: str) -> nn.Conv2d | nn.ConvTranspose2d:
    """Return the convolution, with bias, that brings a map to the width and the grid of another.

    1x1 between equal grids, 3x3 with stride 2 to half the size, transposed 4x4 with stride 2 to twice the size,
    else an unpadded kernel of the difference plus one; with PyTorch's default initialisation.

    Args:
        student: map of the dry run.
        teacher: map of the dry run.
        what: the method, for the message.

    Raises:
        UserError: if the student's map is smaller and not half as large, or a side does not follow the other.
    """
    width, goal = student.shape[1], teacher.shape[1]
    (height, across), (rows, columns) = student.shape[2:], teacher.shape[2:]
    layer: nn.Conv2d | nn.ConvTranspose2d | None = None
    if height == 2 * rows and (across + 1) // 2 == columns:
        layer = nn.Conv2d(width, goal, 3, stride=2, padding=1)
    elif 2 * height == rows and 2 * across == columns:
        layer = nn.ConvTranspose2d(width, goal, 4, stride=2, padding=1)
    elif height >= rows and across >= columns:
        layer = nn.Conv2d(width, goal, (1 + height - rows, 1 + across - columns))
    if layer is None:
        raise UserError(
            f"{what}: no convolution brings a map of {height}x{across} to {rows}x{columns}; tap layers of equal, "
            "double or half size, or a larger map of the student"
        )
    return layer.to(student.device)


def check_statistics(values: Tensor, training: bool, what: str) -> None:
    """Refuse a batch norm's training on one value a channel.

    Raises:
        UserError: saying what to do.
    """
    if training and values.numel() == values.shape[1]:
        raise UserError(
            f"{what}: batch norm cannot train on one value a channel (one sample with a 1x1 map); "
            "use a batch size of at least 2, or drop the last incomplete batch"
        )
