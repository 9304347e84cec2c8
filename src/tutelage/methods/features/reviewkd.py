# SPDX-License-Identifier: Apache-2.0
"""Review: each of the teacher's levels teaches the student's deeper levels too, through a chain of fusions.

From the deepest level upward, the student's map is joined with what the deeper levels made, by a learned gate, and
compared with the teacher's map of that level at several scales.
"""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tutelage.core import Batch, Card, Facts, Reads, Signals, Term
from tutelage.core.bridge import check_statistics, fusion_layers
from tutelage.core.error import UserError
from tutelage.core.layers import Layers, Places
from tutelage.functional.precision import full_precision
from tutelage.functional.spatial import hierarchical_distance

CARD = Card(
    name="ReviewKD",
    title="Distilling Knowledge via Knowledge Review",
    authors="Chen, Liu, Zhao, Jia",
    year=2021,
    venue="CVPR",
    paper="arxiv:2104.09044",
    code="github:dvlab-research/ReviewKD@cede6ea",
    code_licence=None,
    claims="Letting deep student levels learn from shallow teacher levels lifts classifiers and detectors.",
    reads={"student": ("stages[*]", "pooled"), "teacher": ("stages[*].pre", "pooled")},
    labels=("none",),
    averages="samples",
    batch="coupled",
    zero_at_teacher=False,
    golden=("classic/reviewkd",),
)

OBJECTIVE = {"task": 1.0, "reviewkd": {"weight": {"linear": [0.0, 5.0], "until": "20 epochs", "by": "epochs"}}}


@full_precision
def reviewkd(fused_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
    """Return the hierarchical distance of each level, summed.

        L = sum_i HCL(s_i, t_i)
        HCL(s, t) = [ mse(s, t) + sum_j w_j mse( pool_{k_j}(s), pool_{k_j}(t) ) ] / ( 1 + sum_j w_j )
        k_j the sizes among 4, 2, 1 that are smaller than the map's height;  w_j = 2^-j, j = 1, 2, ...

    Convention:
        - mse is averaged over everything; pool_k averages over a k x k grid of cells
        - levels are summed

    Args:
        fused_maps: `[B, C, H, W]` of each level, what the student's fusions made.
        teacher_maps: `[B, C, H, W]` of the same levels; a pooled vector is a map of one position.

    Returns:
        Scalar, float32 or wider; a batch without rows gives a connected zero.

    Raises:
        UserError: if the shapes of a pair differ: they would broadcast.

    Example:
        >>> one = torch.zeros(1, 1, 2, 2)
        >>> reviewkd([one], [torch.tensor([[[[1.0, 1.0], [1.0, -1.0]]]])])  # (1 + 0.25 / 2) / 1.5
        tensor(0.7500)

    Reference: Chen et al., Distilling Knowledge via Knowledge Review, CVPR 2021, section 3.
    """
    levels = []
    for fused, teacher in zip(fused_maps, teacher_maps, strict=True):
        if fused.shape != teacher.shape:
            raise UserError(
                f"reviewkd compares maps of one shape: the fused one is {list(fused.shape)}, "
                f"the teacher's {list(teacher.shape)}"
            )
        levels.append(hierarchical_distance(fused, teacher))
    return torch.stack(levels).sum()


class Fusion(nn.Module):
    """One level of the review: joins the student's map with what the deeper levels made.

    Args:
        width: of the student's map.
        middle: of what is handed upward.
        goal: width of the teacher's map.
        gated: whether there is a deeper level.
    """

    def __init__(self, width: int, middle: int, goal: int, gated: bool) -> None:
        super().__init__()
        self.conv1, self.conv2 = fusion_layers(width, middle, goal)
        self.att_conv = nn.Sequential(nn.Conv2d(2 * middle, 2, 1), nn.Sigmoid()) if gated else None

    def forward(self, student_map: Tensor, residual: Tensor | None, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return the fused map at the teacher's width and size, and what is handed upward."""
        check_statistics(student_map.narrow(1, 0, 1), self.training, "reviewkd")
        joined = self.conv1(student_map)
        if residual is not None and self.att_conv is not None:
            deeper = F.interpolate(residual, joined.shape[2:], mode="nearest")
            gate = self.att_conv(torch.cat([joined, deeper], dim=1))
            joined = joined * gate[:, :1] + deeper * gate[:, 1:]
        if joined.shape[2:] != size:
            joined = F.interpolate(joined, size, mode="nearest")
        return self.conv2(joined), joined


@final
class ReviewKD(Term):
    """Term form of :func:`reviewkd`: a fusion for each level of both models, from the deepest to the first.

    Args:
        middle: width of what the fusions hand on; None takes that of the student's deepest level, at most 512.
        student_taps: levels of the student, from shallow to deep; a vector is a map of one position.
        teacher_taps: levels of the teacher.
    """

    def __init__(
        self,
        *,
        middle: int | None = None,
        student_taps: Places = ("stages[*]", "pooled"),
        teacher_taps: Places = ("stages[*].pre", "pooled"),
    ) -> None:
        super().__init__()
        if middle is not None and middle < 1:
            raise UserError(f"middle is a number of channels, not {middle}")
        self.middle = middle
        self.layers = Layers.parse(student_taps, teacher_taps)

    @property
    def reads(self) -> Reads:
        """The levels of both models."""
        return Reads(self.layers.student, self.layers.teacher)

    def build(self, student: Signals, teacher: Signals | None, facts: Facts) -> None:
        """Create the fusions.

        Raises:
            UserError: if a tap is neither a map nor a vector.
        """
        assert teacher is not None
        self.names = self.layers.pairs(student, teacher)[::-1]
        levels = [(as_map(student[one]), as_map(teacher[other])) for one, other in self.names]
        middle = self.middle or min(512, levels[0][0].shape[1])
        self.abfs = nn.ModuleList(
            Fusion(source.shape[1], middle, goal.shape[1], number > 0).to(source.device)
            for number, (source, goal) in enumerate(levels)
        )

    def fuse(self, student: Signals, teacher: Signals) -> list[Tensor]:
        """Return the student's fused maps, from the deepest level to the first."""
        residual: Tensor | None = None
        fused = []
        for fusion, (one, other) in zip(self.abfs, self.names, strict=True):
            height, width = as_map(teacher[other]).shape[2:]
            out, residual = fusion(as_map(student[one]), residual, (height, width))
            fused.append(out)
        return fused

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> Tensor:  # type: ignore[override]
        """Return the hierarchical distance of all levels."""
        goals = [as_map(teacher[other]) for _, other in self.names]
        return reviewkd(self.fuse(student, teacher), goals)


def as_map(tensor: Tensor) -> Tensor:
    """Return a map, or a vector as a map of one position.

    Raises:
        UserError: if it is neither.
    """
    if tensor.ndim not in (2, 4):
        raise UserError(f"reviewkd compares maps [B, C, H, W] and vectors [B, C], not {list(tensor.shape)}")
    return tensor[:, :, None, None] if tensor.ndim == 2 else tensor
