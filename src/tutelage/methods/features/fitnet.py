# SPDX-License-Identifier: Apache-2.0
"""Regress a hidden layer of the teacher from a hidden layer of the student.

The paper trains a bare convolution on half the squared distance before anything else, then distils logits. The
comparison tables that most papers cite use a convolution with batch norm and ReLU and the mean squared error,
beside the task's loss from the first step: that is the default, and what the weight of 100 belongs to.
"""

from collections.abc import Mapping
from typing import Any, Literal, final

from torch import Tensor, nn
from torch.nn import functional as F

from tutelage.core import Batch, Card, Facts, Reads, Signals, Tap, Term
from tutelage.core.bridge import check_maps, check_statistics, regressor
from tutelage.core.error import UserError
from tutelage.core.ignored import known
from tutelage.functional.precision import full_precision
from tutelage.functional.spatial import kept_sum, mean_square

CARD = Card(
    name="FitNet",
    title="FitNets: Hints for Thin Deep Nets",
    authors="Romero, Ballas, Kahou, Chassang, Gatta, Bengio",
    year=2015,
    venue="ICLR",
    paper="arxiv:1412.6550",
    code="github:HobbitLong/RepDistiller@b84f547",
    code_licence="BSD-2-Clause",
    claims="Hints from a teacher's hidden layer let thinner and deeper students train, and surpass the teacher.",
    reads={"student": ("stages[-2]",), "teacher": ("stages[-2]",)},
    labels=("none",),
    averages="samples",
    batch="coupled",
    zero_at_teacher=False,
    golden=("classic/fitnet",),
)

OBJECTIVE = {"task": 1.0, "fitnet": {"weight": 100.0}}

Form = Literal["conv_bn_relu", "conv_bn", "conv", "paper"]
FORMS: tuple[Form, ...] = ("conv", "conv_bn", "conv_bn_relu", "paper")


@full_precision
def fitnet(
    regressed: Tensor, teacher_map: Tensor, *, form: Form = "conv_bn_relu", keep: Tensor | None = None
) -> Tensor:
    """Return the distance between the regressed and the teacher's map.

        L = 1 / (B C H W) * sum_{b,c,h,w} ( r(s) - t )^2
        L = 1 / (2 B) * sum_{b,c,h,w} ( r(s) - t )^2        (paper, eq. 3)

    Convention:
        - the paper's form is summed over channels and positions and averaged over the batch, the others are
          averaged over everything
        - no gradient is asked of the teacher

    Args:
        regressed: `[B, C, H, W]`, the student's map through the regressor.
        teacher_map: `[B, C, H, W]`.
        form: `paper`, or any other form of the regressor.
        keep: `[B, H, W]` bool, the places that are compared; None keeps all.

    Returns:
        Scalar, float32 or wider; a batch without rows gives a connected zero.

    Raises:
        UserError: if the shapes differ: they would broadcast.

    Example:
        >>> import torch
        >>> fitnet(torch.zeros(1, 1, 2, 1), torch.tensor([1.0, 3.0]).view(1, 1, 2, 1))
        tensor(5.)

    Reference: Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015, eq. 3.
    """
    if regressed.shape != teacher_map.shape:
        raise UserError(
            f"fitnet compares maps of one shape: the regressed one is {list(regressed.shape)}, "
            f"the teacher's {list(teacher_map.shape)}"
        )
    if form == "paper":
        return kept_sum((regressed - teacher_map).square(), keep) / max(2 * len(regressed), 1)
    return mean_square(regressed - teacher_map, keep)


@final
class FitNet(Term):
    """Term form of :func:`fitnet`: a convolution to the teacher's width and grid, with batch norm and ReLU.

    Args:
        form: of the regressor: `conv_bn_relu` (the tables of later papers), `conv_bn` (for a teacher tapped
            before its activation), `conv`, or `paper` (`conv`, with the paper's reduction).
        student_tap: the guided layer.
        teacher_tap: the hint.
    """

    def __init__(
        self,
        *,
        form: Form = "conv_bn_relu",
        student_tap: str | Mapping[str, Any] | Tap = "stages[-2]",
        teacher_tap: str | Mapping[str, Any] | Tap = "stages[-2]",
    ) -> None:
        super().__init__()
        if form not in FORMS:
            raise UserError(f"form {form!r} is not known; valid: {', '.join(FORMS)}")
        self.form: Form = form
        self.student_tap, self.teacher_tap = Tap.parse(student_tap), Tap.parse(teacher_tap)

    @property
    def reads(self) -> Reads:
        """The two maps."""
        return Reads((self.student_tap,), (self.teacher_tap,))

    def build(self, student: Signals, teacher: Signals | None, facts: Facts) -> None:
        """Create the regressor.

        Raises:
            UserError: if a tap is no map, or no convolution brings one grid to the other.
        """
        assert teacher is not None
        source, goal = student[self.student_tap.name], teacher[self.teacher_tap.name]
        check_maps(source, goal, "fitnet")
        self.conv = regressor(source, goal, "fitnet")
        normalized = self.form in ("conv_bn", "conv_bn_relu")
        self.bn = nn.BatchNorm2d(goal.shape[1], device=goal.device) if normalized else nn.Identity()

    def regress(self, student_map: Tensor) -> Tensor:
        """Return the student's map at the teacher's width and grid."""
        regressed = self.conv(student_map)
        if isinstance(self.bn, nn.BatchNorm2d):
            check_statistics(regressed, self.training, "fitnet")
        regressed = self.bn(regressed)
        return F.relu(regressed) if self.form == "conv_bn_relu" else regressed

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> Tensor:  # type: ignore[override]
        """Return the distance between the regressed and the teacher's map."""
        regressed = self.regress(student[self.student_tap.name])
        goal = teacher[self.teacher_tap.name]
        return fitnet(regressed, goal, form=self.form, keep=known(batch, goal))
