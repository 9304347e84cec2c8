# SPDX-License-Identifier: Apache-2.0
"""Two stages for top-down pose: the last map and the logits of both axes, then a new head on the frozen backbone.

The second stage is the same term with `alpha=0, beta=1`, no decay, and task weight 0: the student's backbone is
inherited from the first stage and frozen, its head starts anew and reads the first stage's answers.
"""

from collections.abc import Mapping
from typing import Any, Literal, final

import torch
from torch import Tensor

from tutelage.core import Batch, Card, Facts, Reads, Signals, Tap, Term
from tutelage.core.bridge import bridge, check_grid, check_maps
from tutelage.core.error import UserError
from tutelage.functional.divergence import kl_divergence
from tutelage.functional.precision import full_precision

CARD = Card(
    name="DWPose",
    title="Effective Whole-body Pose Estimation with Two-stages Distillation",
    authors="Yang, Zeng, Yuan, Li",
    year=2023,
    venue="ICCV Workshops",
    paper="arxiv:2307.15880",
    code="github:IDEA-Research/DWPose@3dca5db",
    code_licence="Apache-2.0",
    claims="Features and logits of all keypoints, also invisible ones, then a second head taught by the first.",
    reads={"student": ("map", "logits.x", "logits.y"), "teacher": ("map", "logits.x", "logits.y")},
    labels=("none",),
    averages="samples",
    batch="independent",
    zero_at_teacher=True,
    golden=("core/dwpose_fea", "core/dwpose_kd", "core/dwpose_stage1", "core/dwpose_stage2", "core/dwpose_schedule"),
)

OBJECTIVE = {"task": 1.0, "dwpose": {"weight": {"linear": [1, 0], "by": "epochs"}}}

Form = Literal["code", "paper"]
AXES = ("logits.x", "logits.y")


@full_precision
def dwpose(
    student_logits: tuple[Tensor, Tensor],
    teacher_logits: tuple[Tensor, Tensor],
    student_map: Tensor | None = None,
    teacher_map: Tensor | None = None,
    *,
    alpha: float = 7e-5,
    beta: float = 0.1,
    sharpness: float = 10.0,
    form: Form = "code",
) -> dict[str, Tensor]:
    """Return the feature and the logit part.

        L = alpha / N * sum_{n,c,h,w} (A(F_s) - F_t)^2
          + beta / K * sum_{x,y} mean_n sum_k KL( softmax(g t_nk) || softmax(g s_nk) )

    Convention:
        - the feature part is a **sum** over channels and positions, a mean over samples; `form="paper"` divides by them
        - the divergence is summed over bins and axes, averaged over samples and keypoints; g is not compensated
        - every keypoint counts, whatever its visibility

    Args:
        student_logits: `[B, K, Wx]` and `[B, K, Wy]`, raw.
        teacher_logits: the same.
        student_map: `[B, C, H, W]`, the student's last map at the teacher's width; None leaves the part out.
        teacher_map: `[B, C, H, W]`.
        alpha: coefficient of the feature part (the paper's, with its division: 5e-5).
        beta: coefficient of the logit part (first stage 0.1, second 1).
        sharpness: g, which multiplies all logits.
        form: `code` (the authors' code and golden numbers) or `paper`.

    Returns:
        `feature` (where there is a map) and `logits`, scalars with their coefficients, float32 or wider. A batch
        without rows gives connected zeros.

    Raises:
        UserError: if the shapes of a pair differ: they would broadcast.

    Example:
        >>> flat, peak = torch.zeros(1, 1, 2), torch.tensor([[[0.0, 0.1]]])
        >>> parts = dwpose((flat, flat), (peak, flat), torch.zeros(1, 2, 1, 1), torch.ones(1, 2, 1, 1), alpha=1, beta=1)
        >>> parts["feature"], parts["logits"]
        (tensor(2.), tensor(0.1109))

    Reference: Yang et al., Effective Whole-body Pose Estimation with Two-stages Distillation, ICCV Workshops 2023.
    """
    pairs = [("map", student_map, teacher_map)] if student_map is not None else []
    pairs += [*zip(AXES, student_logits, teacher_logits, strict=True)]
    for what, one, other in pairs:
        if one is None or other is None or one.shape != other.shape:
            shapes = [list(x.shape) if x is not None else "nothing" for x in (one, other)]
            raise UserError(
                f"dwpose: {what} of the student is {shapes[0]}, of the teacher {shapes[1]}; they must agree"
            )
    parts = {}
    if student_map is not None and teacher_map is not None:
        size = student_map.numel() if form == "paper" else len(student_map)
        parts["feature"] = alpha * (student_map - teacher_map).square().sum() / max(size, 1)
    rows, keypoints = student_logits[0].shape[:2]
    total = torch.zeros((), device=student_logits[0].device, dtype=student_logits[0].dtype)
    for student, teacher in zip(student_logits, teacher_logits, strict=True):
        total = total + kl_divergence(sharpness * student, sharpness * teacher).sum()
    parts["logits"] = beta * total / max(rows * keypoints, 1)
    return parts


@final
class DWPose(Term):
    """Term form of :func:`dwpose`: a 1x1 convolution with bias brings the student's map to the teacher's width.

    The decay by epoch is the weight's: `weight: {linear: [1, 0], by: epochs}`.

    Args:
        alpha: see :func:`dwpose`; 0 reads no maps, as in the second stage.
        beta: see :func:`dwpose`.
        sharpness: see :func:`dwpose`.
        form: see :func:`dwpose`.
        student_tap: a map of the student.
        teacher_tap: a map of the teacher, of equal height and width.
    """

    def __init__(
        self,
        *,
        alpha: float = 7e-5,
        beta: float = 0.1,
        sharpness: float = 10.0,
        form: Form = "code",
        student_tap: str | Mapping[str, Any] | Tap = "map",
        teacher_tap: str | Mapping[str, Any] | Tap = "map",
    ) -> None:
        super().__init__()
        if form not in ("code", "paper"):
            raise UserError(f"form {form!r} is not known; valid: code, paper")
        if alpha < 0 or beta < 0 or not alpha + beta:
            raise UserError(f"dwpose: alpha {alpha} and beta {beta} must be >= 0, and one of them > 0")
        if not sharpness > 0:
            raise UserError(f"dwpose: sharpness must be > 0, not {sharpness}")
        self.alpha, self.beta, self.sharpness = alpha, beta, sharpness
        self.form: Form = form
        self.student_tap, self.teacher_tap = Tap.parse(student_tap), Tap.parse(teacher_tap)

    @property
    def reads(self) -> Reads:
        """The logits of both axes, and the two maps unless `alpha` is 0."""
        axes = tuple(Tap(axis) for axis in AXES)
        return Reads(
            (*([self.student_tap] if self.alpha else []), *axes), (*([self.teacher_tap] if self.alpha else []), *axes)
        )

    def build(self, student: Signals, teacher: Signals | None, facts: Facts) -> None:
        """Create the layer between the widths.

        Raises:
            UserError: if the maps are of different size, or the logits of other keypoints or bins.
        """
        assert teacher is not None
        for axis in AXES:
            if student[axis].shape[1:] != teacher[axis].shape[1:]:
                raise UserError(
                    f"dwpose: the student's {axis} are {list(student[axis].shape[1:])}, the teacher's "
                    f"{list(teacher[axis].shape[1:])}: both need the same keypoints, input size and split"
                )
        if self.alpha:
            source, goal = student[self.student_tap.name], teacher[self.teacher_tap.name]
            check_maps(source, goal, "dwpose")
            check_grid(source, goal, "dwpose")
            self.align = bridge(source, goal)

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> dict[str, Tensor]:  # type: ignore[override]
        """Return the parts `feature` (unless `alpha` is 0) and `logits`."""
        maps = (self.align(student[self.student_tap.name]), teacher[self.teacher_tap.name]) if self.alpha else ()
        return dwpose(
            (student[AXES[0]], student[AXES[1]]),
            (teacher[AXES[0]], teacher[AXES[1]]),
            *maps,
            alpha=self.alpha,
            beta=self.beta,
            sharpness=self.sharpness,
            form=self.form,
        )
