# SPDX-License-Identifier: Apache-2.0
"""Match, for every sample of a batch, how probable the teacher finds the others as its neighbours.

The loss is the mean over all B^2 entries, B times smaller than a divergence averaged over rows, which is why the
published weight is 30,000. One public code uses 1e-6 where the authors use 1e-7; that is an option.
"""

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from tutelage.core import Batch, Card, Reads, Signals, Tap, Term
from tutelage.core.error import UserError
from tutelage.functional.block import spans, sum_over
from tutelage.functional.collective import gather_rows
from tutelage.functional.precision import full_precision

CARD = Card(
    name="PKT",
    title="Learning Deep Representations with Probabilistic Knowledge Transfer",
    authors="Passalis, Tefas",
    year=2018,
    venue="ECCV",
    paper="arxiv:1803.10837",
    code="github:megvii-research/mdistiller@a08d46f",
    code_licence="MIT",
    claims="Matching neighbour probabilities transfers knowledge between networks of different size and task.",
    reads={"student": ("pooled",), "teacher": ("pooled",)},
    labels=("none",),
    averages="samples",
    batch="coupled",
    zero_at_teacher=True,
    golden=("classic/pkt",),
)

OBJECTIVE = {"task": 1.0, "pkt": {"weight": 30000.0}}


@full_precision
def pkt(student_features: Tensor, teacher_features: Tensor, *, eps: float = 1e-7, gather: bool = False) -> Tensor:
    """Return the divergence of the two models' neighbour probabilities.

        c_ij = ( < n_i, n_j > + 1 ) / 2, n_i = g_i / (|g_i| + eps)
        p_ij = c_ij / sum_k c_ik
        L = 1 / B^2 * sum_ij p_ij(t) log( (p_ij(t) + eps) / (p_ij(s) + eps) )

    Convention:
        - KL runs from teacher to student, row by row; the mean is over all B^2 entries
        - a sample counts among its own neighbours; no gradient is asked of the teacher
        - beyond 2^22 pairs it is computed in blocks of rows: memory grows with B, not with B^2

    Args:
        student_features: `[B, ...]`, flattened; any float dtype, compared in float32 or wider.
        teacher_features: `[B, ...]`, of any other width.
        eps: added to norms and to probabilities.
        gather: compare with the samples of all processes instead of this process's own.

    Returns:
        Scalar, float32 or wider; a batch without rows gives a connected zero.

    Raises:
        UserError: if the numbers of samples differ.

    Example:
        >>> same, opposite = torch.tensor([[1.0], [1.0]]), torch.tensor([[1.0], [-1.0]])
        >>> pkt(same, opposite)
        tensor(0.3466)

    Reference: Passalis and Tefas, Learning Deep Representations with Probabilistic Knowledge Transfer, ECCV 2018.
    """
    if len(student_features) != len(teacher_features):
        raise UserError(
            f"pkt compares the same samples: the student has {len(student_features)}, "
            f"the teacher {len(teacher_features)}"
        )
    student, teacher = (_direction(side.flatten(1), eps) for side in (student_features, teacher_features))
    students, teachers = (gather_rows(side)[0] if gather else side for side in (student, teacher))

    def compare(start: int, stop: int, student: Tensor, teacher: Tensor, students: Tensor, teachers: Tensor) -> Tensor:
        p, q = _neighbours(student[start:stop], students), _neighbours(teacher[start:stop], teachers)
        return (q * ((q + eps).log() - (p + eps).log())).sum()

    rows, columns = len(student), len(students)
    pieces = spans(rows, columns) or [(0, 0)]
    return sum_over(pieces, compare, student, teacher, students, teachers) / max(rows * columns, 1)


def _direction(vectors: Tensor, eps: float) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return vectors / (length + eps)


def _neighbours(own: Tensor, everyone: Tensor) -> Tensor:
    """Return the probabilities of all samples as neighbours of some."""
    closeness = (own @ everyone.T + 1) / 2
    return closeness / closeness.sum(dim=1, keepdim=True)


@final
class PKT(Term):
    """Term form of :func:`pkt`. Without `gather` a process compares its own samples, as the released code does.

    Args:
        eps: see :func:`pkt`.
        gather: see :func:`pkt`.
        student_tap: a vector a sample; what is more is flattened.
        teacher_tap: the same of the teacher.
    """

    def __init__(
        self,
        *,
        eps: float = 1e-7,
        gather: bool = False,
        student_tap: str | Mapping[str, Any] | Tap = "pooled",
        teacher_tap: str | Mapping[str, Any] | Tap = "pooled",
    ) -> None:
        super().__init__()
        if eps <= 0:
            raise UserError(f"eps must be > 0, not {eps}")
        self.eps, self.gather = eps, gather
        self.student_tap, self.teacher_tap = Tap.parse(student_tap), Tap.parse(teacher_tap)

    @property
    def reads(self) -> Reads:
        """The two vectors."""
        return Reads((self.student_tap,), (self.teacher_tap,))

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> Tensor:  # type: ignore[override]
        """Return the divergence of the two models' neighbour probabilities."""
        pair = student[self.student_tap.name], teacher[self.teacher_tap.name]
        return pkt(*pair, eps=self.eps, gather=self.gather)
