# SPDX-License-Identifier: Apache-2.0
"""Match the distances between samples and the angles that triples of them form.

Distances are divided by their own mean in each model, so the two embedding spaces may differ in scale and in
width. The released code takes distances from the Gram matrix, which loses them between near samples in float32;
here differences are taken first. One public code divides embeddings by their norm: `form="unit"`.
"""

from collections.abc import Mapping
from typing import Any, Literal, final

import torch
from torch import Tensor
from torch.nn import functional as F

from tutelage.core import Batch, Card, Reads, Signals, Tap, Term
from tutelage.core.error import UserError
from tutelage.functional.block import spans, sum_over
from tutelage.functional.collective import gather_rows
from tutelage.functional.pairwise import distances, unit
from tutelage.functional.precision import full_precision

CARD = Card(
    name="RKD",
    title="Relational Knowledge Distillation",
    authors="Park, Kim, Lu, Cho",
    year=2019,
    venue="CVPR",
    paper="arxiv:1904.05068",
    code="github:lenscloth/RKD@0a6c3c0",
    code_licence=None,
    claims="Distances and angles between samples teach embeddings, which can then surpass their teacher.",
    reads={"student": ("pooled",), "teacher": ("pooled",)},
    labels=("none",),
    averages="samples",
    batch="coupled",
    zero_at_teacher=True,
    golden=("classic/rkd",),
)

OBJECTIVE = {"task": 1.0, "rkd": {"weight": 1.0}}

Form = Literal["raw", "unit"]
EPS = 1e-12  # squared distances below it are lifted to it


@full_precision
def rkd(
    student_features: Tensor,
    teacher_features: Tensor,
    *,
    lambda_distance: float = 25.0,
    lambda_angle: float = 50.0,
    squared: bool = False,
    form: Form = "raw",
    gather: bool = False,
) -> dict[str, Tensor]:
    """Return the distance and the angle part.

        L = lambda_D / B^2 * sum_ij h( d_ij(s) - d_ij(t) )  +  lambda_A / B^3 * sum_ijk h( a_ijk(s) - a_ijk(t) )
        d_ij = |e_i - e_j| / mean of |e_i - e_j| over pairs of two samples
        a_ijk = < u(e_j - e_i), u(e_k - e_i) >, u(x) = x / |x|
        h(x) = x^2 / 2 for |x| < 1, else |x| - 1/2

    Convention:
        - means run over all B^2 pairs and all B^3 triples, those of a sample with itself (0) included
        - each model is divided by its own mean distance; no gradient is asked of the teacher
        - equal samples have distance 1e-6 before the division, angle 0 and no gradient for each other
        - beyond 2^22 numbers it is computed in blocks: memory grows with B, not with B^2 or B^3

    Args:
        student_features: `[B, ...]`, flattened; any float dtype, compared in float32 or wider.
        teacher_features: `[B, ...]`, of any other width.
        lambda_distance: coefficient of the distance part; 0 leaves it out.
        lambda_angle: coefficient of the angle part; 0 leaves it out.
        squared: compare squared distances.
        form: `raw` embeddings (the paper), or `unit`, divided by their norm first (mmrazor).
        gather: compare with the samples of all processes instead of this process's own.

    Returns:
        `distance` and `angle`: scalars with their coefficients, float32 or wider; their sum is the loss. A
        batch of one gives connected zeros.

    Raises:
        UserError: if the numbers of samples differ.

    Example:
        >>> parts = rkd(torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.0], [1.0], [5.0]]))
        >>> parts["distance"], parts["angle"]
        (tensor(1.1250), tensor(0.))

    Reference: Park et al., Relational Knowledge Distillation, CVPR 2019.
    """
    if len(student_features) != len(teacher_features):
        raise UserError(
            f"rkd compares the same samples: the student has {len(student_features)}, "
            f"the teacher {len(teacher_features)}"
        )
    student, teacher = (side.flatten(1) for side in (student_features, teacher_features))
    if form == "unit":
        student, teacher = unit(student), unit(teacher)
    students, first = gather_rows(student) if gather else (student, 0)
    teachers, _ = gather_rows(teacher) if gather else (teacher, 0)
    rows, count = len(student), len(students)
    nothing = student[:, :0].sum()
    parts = {"distance": nothing, "angle": nothing}
    if count > 1 and lambda_distance:
        pieces = spans(rows, count) or [(0, 0)]

        def apart(start: int, stop: int, own: Tensor, everyone: Tensor, first: int) -> Tensor:
            """Distances of a span of own rows to all, 0 for a row to itself."""
            found = distances(own[start:stop], everyone)
            found = found.square().clamp(min=EPS) if squared else found.clamp(min=EPS**0.5)
            itself = torch.arange(first + start, first + stop, device=own.device)[:, None]
            return found.where(itself != torch.arange(count, device=own.device), 0.0)

        def total(start: int, stop: int, everyone: Tensor) -> Tensor:
            return apart(start, stop, everyone, everyone, 0).sum()

        means = [sum_over(spans(count, count), total, side) / (count * (count - 1)) for side in (students, teachers)]

        def far(
            start: int,
            stop: int,
            s: Tensor,
            t: Tensor,
            everyone: Tensor,
            taught: Tensor,
            s_mean: Tensor,
            t_mean: Tensor,
        ) -> Tensor:
            ours, theirs = apart(start, stop, s, everyone, first), apart(start, stop, t, taught, first)
            return F.huber_loss(ours / s_mean, theirs / t_mean, reduction="sum")

        distance = sum_over(pieces, far, student, teacher, students, teachers, *means)
        parts["distance"] = lambda_distance * distance / max(rows * count, 1)
    if count > 1 and lambda_angle:
        widest = count + max(student.shape[1], teacher.shape[1])
        pairs = [
            (*anchors, *others)
            for anchors in spans(rows, count * widest) or [(0, 0)]
            for others in spans(count, (anchors[1] - anchors[0]) * widest)
        ]

        def bent(
            start: int, stop: int, low: int, high: int, s: Tensor, t: Tensor, everyone: Tensor, taught: Tensor
        ) -> Tensor:
            ours, theirs = unit(everyone - s[start:stop, None]), unit(taught - t[start:stop, None])
            return F.huber_loss(ours[:, low:high] @ ours.mT, theirs[:, low:high] @ theirs.mT, reduction="sum")

        angle = sum_over(pairs, bent, student, teacher, students, teachers)
        parts["angle"] = lambda_angle * angle / max(rows * count**2, 1)
    return parts


@final
class RKD(Term):
    """Term form of :func:`rkd`. Without `gather` a process compares its own samples, as the released code does.

    Args:
        lambda_distance: see :func:`rkd`.
        lambda_angle: see :func:`rkd`.
        squared: see :func:`rkd`.
        form: see :func:`rkd`.
        gather: see :func:`rkd`.
        student_tap: a vector a sample; what is more is flattened.
        teacher_tap: the same of the teacher.
    """

    def __init__(
        self,
        *,
        lambda_distance: float = 25.0,
        lambda_angle: float = 50.0,
        squared: bool = False,
        form: Form = "raw",
        gather: bool = False,
        student_tap: str | Mapping[str, Any] | Tap = "pooled",
        teacher_tap: str | Mapping[str, Any] | Tap = "pooled",
    ) -> None:
        super().__init__()
        if form not in ("raw", "unit"):
            raise UserError(f"form {form!r} is not known; valid: raw, unit")
        if not (lambda_distance or lambda_angle):
            raise UserError("lambda_distance and lambda_angle are both 0: nothing is compared")
        self.lambda_distance, self.lambda_angle = lambda_distance, lambda_angle
        self.squared, self.gather = squared, gather
        self.form: Form = form
        self.student_tap, self.teacher_tap = Tap.parse(student_tap), Tap.parse(teacher_tap)

    @property
    def reads(self) -> Reads:
        """The two embeddings."""
        return Reads((self.student_tap,), (self.teacher_tap,))

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> dict[str, Tensor]:  # type: ignore[override]
        """Return the parts `distance` and `angle`."""
        return rkd(
            student[self.student_tap.name],
            teacher[self.teacher_tap.name],
            lambda_distance=self.lambda_distance,
            lambda_angle=self.lambda_angle,
            squared=self.squared,
            form=self.form,
            gather=self.gather,
        )
