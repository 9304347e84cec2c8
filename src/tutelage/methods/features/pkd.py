# SPDX-License-Identifier: Apache-2.0
"""Match maps up to the mean and scale of each channel: half the squared distance of standardised values.

For standardised maps this is one minus Pearson's correlation, so that detectors of any kind can teach each other
whatever the size of their features. The published code is mmrazor's; paper and code agree.
"""

from collections.abc import Sequence
from typing import Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tutelage.core import Batch, Card, Facts, Reads, Signals, Term
from tutelage.core.bridge import bridge, check_maps
from tutelage.core.error import UserError
from tutelage.core.layers import Layers, Places
from tutelage.functional.collective import gather_rows
from tutelage.functional.precision import full_precision

CARD = Card(
    name="PKD",
    title="PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient",
    authors="Cao, Zhang, Gao, Cheng, Cheng, Liu",
    year=2022,
    venue="NeurIPS",
    paper="arxiv:2207.02039",
    code="github:open-mmlab/mmrazor@90c7af1",
    code_licence="Apache-2.0",
    claims="Standardised features let any detector teach any other, and beat methods made for one kind.",
    reads={"student": ("fpn[*]",), "teacher": ("fpn[*]",)},
    labels=("none",),
    averages="samples",
    batch="coupled",
    zero_at_teacher=True,
    golden=("classic/pkd",),
)

OBJECTIVE = {"task": 1.0, "pkd": {"weight": 6.0}}  # two-stage detectors; 10 for one-stage ones

Resize = Literal["student", "teacher"]


def standardized(feature_map: Tensor, eps: float = 1e-6, everyone: Tensor | None = None) -> Tensor:
    """Return a map whose channels have mean 0 and deviation 1 over samples and positions.

    Args:
        feature_map: `[B, C, H, W]`.
        eps: added to the deviation, whose divisor is the number of values minus one. A single value, and a
            channel of equal values, become 0.
        everyone: the map of all processes, whose statistics count; the map itself by default.
    """
    given = feature_map if everyone is None else everyone
    several = given.numel() > given.shape[1]
    mean = given.mean((0, 2, 3), keepdim=True)
    deviation = given.std((0, 2, 3), keepdim=True, correction=int(several))
    return (feature_map - mean) / (deviation + eps)


@full_precision
def pkd(
    student_maps: Sequence[Tensor],
    teacher_maps: Sequence[Tensor],
    *,
    eps: float = 1e-6,
    resize: Resize = "student",
    gather: bool = False,
) -> Tensor:
    """Return half the mean squared distance of standardised maps, summed over levels.

        L = sum over levels of 1/2 mean( ( n(s) - n(t) )^2 ),  n(x) = (x - mean) / (std + eps)

    Convention:
        - mean and std of each channel run over all samples and positions of the batch; std has divisor n - 1
        - averaged over all elements of a level, summed over levels; no gradient is asked of the teacher
        - 0 for equal maps up to scale and shift, 1 for maps that are not correlated, 2 for opposite ones

    Args:
        student_maps: one `[B, C, H, W]` a level, any float dtype; compared in float32 or wider.
        teacher_maps: one `[B, C, H', W']` a level, of the same widths.
        eps: added to the deviation.
        resize: where sizes differ, which side is brought to the other's size (bilinear).
        gather: take the statistics over the samples of all processes.

    Returns:
        Scalar, float32 or wider; without rows a connected zero.

    Raises:
        UserError: if the levels are not equally many, or widths or numbers of samples differ.

    Example:
        >>> one = torch.tensor([[[[1.0, 2.0, 3.0]]]])
        >>> pkd([one], [5 * one + 7]).abs() < 1e-6, pkd([one], [-one])
        (tensor(True), tensor(1.3333))

    Reference: Cao et al., PKD, NeurIPS 2022.
    """
    if len(student_maps) != len(teacher_maps) or not student_maps:
        raise UserError(
            f"pkd compares level by level: the student has {len(student_maps)}, the teacher {len(teacher_maps)}"
        )
    levels = []
    for student, teacher in zip(student_maps, teacher_maps, strict=True):
        if student.shape[:2] != teacher.shape[:2]:
            raise UserError(
                f"pkd compares maps of the same samples and widths: the student's is {list(student.shape)}, "
                f"the teacher's {list(teacher.shape)}"
            )
        if not len(student):
            levels.append(student.sum())
            continue
        if student.shape != teacher.shape and resize == "student":
            student = F.interpolate(student, teacher.shape[2:], mode="bilinear", align_corners=False)
        elif student.shape != teacher.shape:
            teacher = F.interpolate(teacher, student.shape[2:], mode="bilinear", align_corners=False)
        one, other = (standardized(x, eps, gather_rows(x)[0] if gather else None) for x in (student, teacher))
        levels.append(F.mse_loss(one, other) / 2)
    return torch.stack(levels).sum()


@final
class PKD(Term):
    """Term form of :func:`pkd`, over the levels of both feature pyramids; a 1x1 convolution where widths differ.

    Without `gather` a process takes its own samples' statistics, as the released code does.

    Args:
        eps: see :func:`pkd`.
        resize: see :func:`pkd`.
        gather: see :func:`pkd`.
        student_taps: maps of the student, from shallow to deep.
        teacher_taps: maps of the teacher.
    """

    def __init__(
        self,
        *,
        eps: float = 1e-6,
        resize: Resize = "student",
        gather: bool = False,
        student_taps: Places = ("fpn[*]",),
        teacher_taps: Places = ("fpn[*]",),
    ) -> None:
        super().__init__()
        if resize not in ("student", "teacher"):
            raise UserError(f"resize {resize!r} is not known; valid: student, teacher")
        if eps <= 0:
            raise UserError(f"eps must be > 0, not {eps}")
        self.eps, self.gather = eps, gather
        self.resize: Resize = resize
        self.layers = Layers.parse(student_taps, teacher_taps)

    @property
    def reads(self) -> Reads:
        """The maps of both models."""
        return Reads(self.layers.student, self.layers.teacher)

    def build(self, student: Signals, teacher: Signals | None, facts: Facts) -> None:
        """Pair the levels, and create a bridge where their widths differ.

        Raises:
            UserError: if a tap is no map.
        """
        assert teacher is not None
        self.names = self.layers.aligned(student, teacher)
        pairs = [(student[one], teacher[other]) for one, other in zip(*self.names, strict=True)]
        for one, other in pairs:
            check_maps(one, other, "pkd")
        self.align = nn.ModuleList(bridge(one, other) for one, other in pairs)

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> Tensor:  # type: ignore[override]
        """Return the distance of the standardised maps."""
        ours, theirs = self.names
        maps = [align(student[name]) for align, name in zip(self.align, ours, strict=True)]
        return pkd(maps, [teacher[name] for name in theirs], eps=self.eps, resize=self.resize, gather=self.gather)
