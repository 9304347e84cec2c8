# SPDX-License-Identifier: Apache-2.0
"""Small modules from the student's shape to the teacher's: trained with a term, never exported."""

from torch import Tensor, nn
from torch.nn import functional as F

from tutelage.core.error import UserError
from tutelage.functional.spatial import as_grid


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


class Across(nn.Module):
    """A linear map of channels on another grid: bilinear to it, then the map.

    Args:
        linear: from width to width, of maps.
        grid: (height, width) of what is given, in the dry run.
        tokens: what is given are tokens, row by row.
    """

    def __init__(self, linear: nn.Module, grid: tuple[int, int], *, tokens: bool) -> None:
        super().__init__()
        self.linear, self.grid, self.tokens = linear, grid, tokens

    def forward(self, values: Tensor, like: Tensor | None = None) -> Tensor:
        """Return a map or tokens of the goal's shape, from a map or tokens.

        Args:
            values: of the student.
            like: map of the goal, where images change their size; otherwise the grid is that of the dry run.
        """
        grid = self.grid if like is None else (like.shape[2], like.shape[3])
        if values.ndim == 3:
            values = as_grid(values, grid)
        if values.shape[2:] != grid:
            values = F.interpolate(values, grid, mode="bilinear", align_corners=False)
        values = self.linear(values)
        return values.flatten(2).transpose(1, 2) if self.tokens else values


def across(student: Tensor, teacher: Tensor, *, bias: bool = True) -> nn.Module:
    """Return the layer from a student's map or tokens to the shape of a teacher's map or tokens.

    On another grid the student is brought to the teacher's (bilinear) before the linear map of channels. Tokens
    are patches alone, row by row: on a grid of the other side's proportions, or square where both are tokens.

    Args:
        student: signal of the dry run, `[B, C, H, W]` or `[B, L, D]`.
        teacher: signal of the dry run, `[B, C, H, W]` or `[B, L, D]`.
        bias: of the linear map.

    Raises:
        UserError: if one is neither, or tokens fill no such grid.
    """
    if {student.ndim, teacher.ndim} - {3, 4} or _places(student) == _places(teacher):
        return bridge(student, teacher, bias=bias)
    source, goal = grid_of(student, teacher), grid_of(teacher, student)
    return Across(bridge(source, goal, bias=bias), (goal.shape[2], goal.shape[3]), tokens=teacher.ndim == 3)


def _places(signal: Tensor) -> tuple[int, ...]:
    return tuple(signal.shape[2:] if signal.ndim == 4 else signal.shape[1:2])


def grid_of(places: Tensor, other: Tensor) -> Tensor:
    """Return a map as it is, and tokens as a map in the proportions of another signal: square if it has none.

    Raises:
        UserError: if tokens fill no such grid.
    """
    if places.ndim == 4:
        return places
    like = (other.shape[2], other.shape[3]) if other.ndim == 4 else (1, 1)
    try:
        return as_grid(places, like)
    except ValueError as error:
        raise UserError(f"{error}: name the tap with `layout: grid` and `grid: [height, width]`") from error


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


def fusion_layers(width: int, middle: int, goal: int) -> tuple[nn.Sequential, nn.Sequential]:
    """Return the two convolutions of a review: what narrows the student's map, and what gives the teacher's width.

    1x1 and 3x3 without bias, Kaiming uniform (a = 1), a batch norm behind each.

    Args:
        width: of the student's map.
        middle: of what is handed from level to level.
        goal: width of the teacher's map.

    Reference: Chen et al., Distilling Knowledge via Knowledge Review, CVPR 2021.
    """
    down = nn.Conv2d(width, middle, 1, bias=False)
    out = nn.Conv2d(middle, goal, 3, padding=1, bias=False)
    for conv in (down, out):
        nn.init.kaiming_uniform_(conv.weight, a=1)
    return nn.Sequential(down, nn.BatchNorm2d(middle)), nn.Sequential(out, nn.BatchNorm2d(goal))
