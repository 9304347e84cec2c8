# SPDX-License-Identifier: Apache-2.0
"""Match which samples of a batch the teacher finds alike.

Only products between samples are compared, so the two models may tap layers of any shape. One public code
divides the rows of the similarity matrix by their L1 norm; that is `form="l1"`, the paper's is the default.
"""

from collections.abc import Mapping
from typing import Any, Literal, final

from torch import Tensor

from tutelage.core import Batch, Card, Reads, Signals, Tap, Term
from tutelage.core.error import UserError
from tutelage.functional.block import spans, sum_over
from tutelage.functional.collective import gather_rows
from tutelage.functional.pairwise import unit
from tutelage.functional.precision import full_precision

CARD = Card(
    name="SP",
    title="Similarity-Preserving Knowledge Distillation",
    authors="Tung, Mori",
    year=2019,
    venue="ICCV",
    paper="arxiv:1907.09682",
    code="github:megvii-research/mdistiller@a08d46f",
    code_licence="MIT",
    claims="A student that finds the same samples alike as its teacher is more accurate than one trained on labels.",
    reads={"student": ("map",), "teacher": ("map",)},
    labels=("none",),
    averages="samples",
    batch="coupled",
    zero_at_teacher=True,
    golden=("classic/sp",),
)

OBJECTIVE = {"task": 1.0, "sp": {"weight": 3000.0}}

Form = Literal["l2", "l1"]


@full_precision
def sp(student_features: Tensor, teacher_features: Tensor, *, form: Form = "l2", gather: bool = False) -> Tensor:
    """Return the distance of the two similarity matrices.

        A = F F^T, each row divided by its norm; L = 1 / B^2 * || A_s - A_t ||^2

    Convention:
        - F is the batch with each sample flattened; both models see the same samples in the same order
        - squared, summed over all pairs of samples (a sample with itself included), divided by B^2
        - a row of zeros stays zero and gets no gradient; no gradient is asked of the teacher
        - beyond 2^22 pairs it is computed in blocks of rows: memory grows with B, not with B^2

    Args:
        student_features: `[B, ...]`, any float dtype; compared in float32 or wider.
        teacher_features: `[B, ...]`, of any other shape.
        form: the norm of a row: `l2` (the paper) or `l1` (torchdistill).
        gather: compare with the samples of all processes instead of this process's own.

    Returns:
        Scalar, float32 or wider; a batch without rows gives a connected zero.

    Raises:
        UserError: if the numbers of samples differ.

    Example:
        >>> import torch
        >>> sp(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0], [-1.0]]))
        tensor(1.)

    Reference: Tung and Mori, Similarity-Preserving Knowledge Distillation, ICCV 2019.
    """
    if len(student_features) != len(teacher_features):
        raise UserError(
            f"sp compares the same samples: the student has {len(student_features)}, "
            f"the teacher {len(teacher_features)}"
        )
    order = 2.0 if form == "l2" else 1.0
    student, teacher = (side.flatten(1) for side in (student_features, teacher_features))
    students, teachers = (gather_rows(side)[0] if gather else side for side in (student, teacher))

    def compare(start: int, stop: int, student: Tensor, teacher: Tensor, students: Tensor, teachers: Tensor) -> Tensor:
        own = unit(student[start:stop] @ students.T, order=order)
        return (own - unit(teacher[start:stop] @ teachers.T, order=order)).square().sum()

    rows, columns = len(student), len(students)
    pieces = spans(rows, columns) or [(0, 0)]
    return sum_over(pieces, compare, student, teacher, students, teachers) / max(rows * columns, 1)


@final
class SP(Term):
    """Term form of :func:`sp`. Without `gather` a process compares its own samples, as the released codes do.

    Args:
        form: see :func:`sp`.
        gather: see :func:`sp`.
        student_tap: any signal with one entry a sample; the last map by default.
        teacher_tap: the same of the teacher.
    """

    def __init__(
        self,
        *,
        form: Form = "l2",
        gather: bool = False,
        student_tap: str | Mapping[str, Any] | Tap = "map",
        teacher_tap: str | Mapping[str, Any] | Tap = "map",
    ) -> None:
        super().__init__()
        if form not in ("l1", "l2"):
            raise UserError(f"form {form!r} is not known; valid: l1, l2")
        self.form: Form = form
        self.gather = gather
        self.student_tap, self.teacher_tap = Tap.parse(student_tap), Tap.parse(teacher_tap)

    @property
    def reads(self) -> Reads:
        """The two signals."""
        return Reads((self.student_tap,), (self.teacher_tap,))

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> Tensor:  # type: ignore[override]
        """Return the distance of the two models' similarities."""
        pair = student[self.student_tap.name], teacher[self.teacher_tap.name]
        return sp(*pair, form=self.form, gather=self.gather)
