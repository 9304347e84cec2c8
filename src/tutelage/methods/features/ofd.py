# SPDX-License-Identifier: Apache-2.0
"""Regress the teacher's maps before their activation, forgiving what the activation would forget.

Values far below zero are cut at a margin, and a student below a negative target is left alone. The official code
runs the teacher in training mode, so that its batch statistics are used and its running statistics drift; here it
is in evaluation mode unless `teacher: {mode: train}` says otherwise.
"""

import math
from collections.abc import Sequence
from typing import Literal, final

import torch
from torch import Tensor, nn

from tutelage.core import Batch, Card, Facts, Reads, Signals, Term
from tutelage.core.bridge import check_grid, check_maps, check_statistics
from tutelage.core.error import UserError
from tutelage.core.ignored import known
from tutelage.core.layers import Layers, Places
from tutelage.core.tap import expand
from tutelage.functional.precision import full_precision
from tutelage.functional.spatial import kept_sum

CARD = Card(
    name="OFD",
    title="A Comprehensive Overhaul of Feature Distillation",
    authors="Heo, Kim, Yun, Park, Kwak, Choi",
    year=2019,
    venue="ICCV",
    paper="arxiv:1904.01866",
    code="github:clovaai/overhaul-distillation@76344a8",
    code_licence="MIT",
    claims="The right place, transform and distance make feature distillation beat its teacher on ImageNet.",
    reads={
        "student": ("stages[*].pre",),
        "teacher": ("stages[*].pre",),
        "borrows": ("stages[*].norm",),
    },
    labels=("none",),
    averages="samples",
    batch="coupled",
    zero_at_teacher=False,
    golden=("classic/ofd",),
)

OBJECTIVE = {"task": 1.0, "ofd": {"weight": 1e-3}}

Margin = Literal["norm", "batch"]


@full_precision
def ofd(
    student_maps: Sequence[Tensor],
    teacher_maps: Sequence[Tensor],
    margins: Sequence[Tensor],
    *,
    keep: Sequence[Tensor | None] = (),
) -> Tensor:
    """Return the partial squared distance to the teacher's maps.

        L = sum_l 2^(l - last) / B * sum d(s, max(t, m))
        d(s, r) = 0 where s <= r and r <= 0, else (s - r)^2        (eq. 2 and 4)

    Convention:
        - summed over channels and positions, averaged over the batch; layers are summed, halved with each step
          from the last
        - the code's divisor 1000 is the weight of the term in the objective

    Args:
        student_maps: `[B, C, H, W]` of each layer, before the activation, at the teacher's width, from shallow
            to deep.
        teacher_maps: `[B, C, H, W]` of the same layers before the activation.
        margins: m of each layer, `[C]`, negative: see :func:`norm_margin` and :func:`batch_margin`.
        keep: `[B, H, W]` bool of each layer, the places that are compared; None, or nothing at all, keeps all.

    Returns:
        Scalar, float32 or wider; a batch without rows gives a connected zero.

    Raises:
        UserError: if the shapes of a pair differ: they would broadcast.

    Example:
        >>> student, teacher = torch.tensor([[[[-3.0, 1.0, 1.0]]]]), torch.tensor([[[[-2.0, -2.0, 2.0]]]])
        >>> ofd([student], [teacher], [torch.tensor([-1.0])])
        tensor(5.)

    Reference: Heo et al., A Comprehensive Overhaul of Feature Distillation, ICCV 2019, eq. 1-4.
    """
    layers, places = [], keep or [None] * len(student_maps)
    last = len(student_maps) - 1
    sides = zip(student_maps, teacher_maps, margins, places, strict=True)
    for number, (student, teacher, margin, left) in enumerate(sides):
        if student.shape != teacher.shape:
            raise UserError(
                f"ofd compares maps of one shape: the student's is {list(student.shape)}, "
                f"the teacher's {list(teacher.shape)}"
            )
        target = torch.maximum(teacher, margin[:, None, None])
        apart = torch.where((student <= target) & (target <= 0), 0.0, student - target)
        layers.append(2.0 ** (number - last) * kept_sum(apart.square(), left) / max(len(student), 1))
    return torch.stack(layers).sum()


@full_precision
def norm_margin(scale: Tensor, shift: Tensor) -> Tensor:
    """Return E[x | x < 0] of each channel for x ~ N(shift, |scale|): what a batch norm gives.

    Where x < 0 has a probability of at most 0.001 it is -3 |scale|.

    Args:
        scale: `[C]`, the batch norm's weight.
        shift: `[C]`, its bias.

    Example:
        >>> norm_margin(torch.tensor([1.0, 1.0]), torch.tensor([0.0, 4.0]))
        tensor([-0.7979, -3.0000])
    """
    deviation = scale.abs().clamp(min=1e-12)
    ratio = shift / deviation
    below = torch.special.erfc(ratio / math.sqrt(2)) / 2
    density = torch.exp(-ratio.square() / 2) / math.sqrt(2 * math.pi)
    rare = below <= 1e-3
    return torch.where(rare, -3 * deviation, shift - deviation * density / below.where(~rare, 1.0))


@full_precision
def batch_margin(teacher_map: Tensor) -> Tensor:
    """Return the mean of each channel's negative values in a batch, 0 where there are none.

    Args:
        teacher_map: `[B, C, H, W]` before the activation.

    Example:
        >>> batch_margin(torch.tensor([[[[-1.0, -3.0, 5.0]], [[1.0, 2.0, 3.0]]]]))
        tensor([-2., 0.])
    """
    negative = teacher_map < 0
    return teacher_map.where(negative, 0.0).sum((0, 2, 3)) / negative.sum((0, 2, 3)).clamp(min=1)


@final
class OFD(Term):
    """Term form of :func:`ofd`: a 1x1 convolution with batch norm for each stage of both models.

    Args:
        margin: `norm`, from the teacher's batch norms, or `batch`, the mean of the batch's negative values.
        student_taps: maps of the student before their activation, from shallow to deep.
        teacher_taps: maps of the teacher before their activation, of the same height and width.
        teacher_norms: roles or paths of the batch norms before the teacher's taps.
    """

    def __init__(
        self,
        *,
        margin: Margin = "norm",
        student_taps: Places = ("stages[*].pre",),
        teacher_taps: Places = ("stages[*].pre",),
        teacher_norms: Sequence[str] = ("stages[*].norm",),
    ) -> None:
        super().__init__()
        if margin not in ("norm", "batch"):
            raise UserError(f"margin {margin!r} is not known; valid: batch, norm")
        self.margin: Margin = margin
        self.layers = Layers.parse(student_taps, teacher_taps)
        self.norms = tuple(teacher_norms) if margin == "norm" else ()

    @property
    def reads(self) -> Reads:
        """The maps of both models, and the teacher's batch norms if margins come from them."""
        return Reads(self.layers.student, self.layers.teacher, self.norms)

    def build(self, student: Signals, teacher: Signals | None, facts: Facts) -> None:
        """Create the connectors and find the margins.

        Raises:
            UserError: if a tap is no map, grids differ, or the batch norms are not those of the taps.
        """
        assert teacher is not None
        self.names = self.layers.pairs(student, teacher)
        self.connectors = nn.ModuleList()
        for one, other in self.names:
            source, goal = student[one], teacher[other]
            check_maps(source, goal, "ofd")
            check_grid(source, goal, "ofd")
            conv = nn.Conv2d(source.shape[1], goal.shape[1], 1, bias=False)
            nn.init.normal_(conv.weight, std=(2 / goal.shape[1]) ** 0.5)
            connector = nn.Sequential(conv, nn.BatchNorm2d(goal.shape[1]))
            self.connectors.append(connector.to(source.device))
        if self.margin == "norm":
            for number, margin in enumerate(self._margins(teacher)):
                self.register_buffer(f"margin_{number}", margin)

    def _margins(self, teacher: Signals) -> list[Tensor]:
        lent = [name for role in self.norms for name in expand(role, teacher.borrowed)]
        taps = [name for tap in self.layers.teacher for name in expand(tap.name, teacher.taps)]
        if len(lent) != len(taps):
            raise UserError(
                f"ofd: {len(taps)} teacher taps and {len(lent)} batch norms before them; name them with "
                'teacher_norms, or take margin "batch"'
            )
        found = []
        for name, (_, other) in zip(lent[-len(self.names) :], self.names, strict=True):
            scale, shift = (getattr(teacher.borrowed[name], part, None) for part in ("weight", "bias"))
            width = teacher[other].shape[1]
            if scale is None or shift is None or scale.shape != (width,):
                raise UserError(
                    f"ofd: {name!r} is no batch norm with scale and shift of the {width} channels of {other!r}; "
                    'name it with teacher_norms, or take margin "batch"'
                )
            found.append(norm_margin(scale.detach(), shift.detach()))
        return found

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> Tensor:  # type: ignore[override]
        """Return the partial distance to the teacher's maps."""
        maps, goals, margins = [], [], []
        for number, (one, other) in enumerate(self.names):
            check_statistics(teacher[other], self.training, "ofd")
            maps.append(self.connectors[number](student[one]))
            goals.append(teacher[other])
            fixed = self.margin == "norm"
            margins.append(self.get_buffer(f"margin_{number}") if fixed else batch_margin(teacher[other]))
        return ofd(maps, goals, margins, keep=[known(batch, goal) for goal in goals])
