# SPDX-License-Identifier: Apache-2.0
"""Match how samples of a batch correlate, after a learned embedding of either model's vectors.

The paper correlates by a Gaussian kernel, expanded to a few orders. Public codes agree on little: one follows the
paper, one multiplies the differences of consecutive samples, one takes the norm of the kernels' difference without
squaring it. All are offered; the paper's is the default. Both embeddings are trained, the teacher's too.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from tutelage.core import Batch, Card, Facts, Reads, Signals, Tap, Term
from tutelage.core.error import UserError
from tutelage.functional.block import spans, sum_over
from tutelage.functional.collective import gather_rows
from tutelage.functional.pairwise import unit
from tutelage.functional.precision import full_precision

CARD = Card(
    name="CC",
    title="Correlation Congruence for Knowledge Distillation",
    authors="Peng, Jin, Liu, Zhou, Wu, Liu, Zhou, Zhang",
    year=2019,
    venue="ICCV",
    paper="arxiv:1904.01802",
    code="github:AberHu/Knowledge-Distillation-Zoo@65470c8",
    code_licence=None,
    claims="Correlations between instances carry knowledge beyond the instances, and improve image classifiers.",
    reads={"student": ("pooled",), "teacher": ("pooled",)},
    labels=("none",),
    averages="samples",
    batch="coupled",
    zero_at_teacher=False,
    golden=("classic/cc",),
)

OBJECTIVE = {"task": 1.0, "cc": {"weight": 100.0}}

Form = Literal["gaussian", "neighbour", "frobenius", "bilinear"]
FORMS = ("bilinear", "frobenius", "gaussian", "neighbour")


@full_precision
def cc(
    student_embedding: Tensor,
    teacher_embedding: Tensor,
    *,
    gamma: float = 0.4,
    order: int = 2,
    form: Form = "gaussian",
    gather: bool = False,
) -> Tensor:
    """Return the distance of the two correlation matrices.

        gaussian:   L = 1 / B^2 * sum_ij ( K_ij(s) - K_ij(t) )^2
                    K_ij = sum_{p=0..P} e^(-2 gamma) (2 gamma)^p / p! * < n_i, n_j >^p
                    n_i = e_i / |e_i|
        frobenius:  L = 1 / B^2 * sqrt( sum_ij ( K_ij(s) - K_ij(t) )^2 ), with e_i in the place of n_i
        bilinear:   the same with K_ij = < e_i, e_j >
        neighbour:  L = mean over i < B of sum_d |e_i(s) - e_i(t)|_d |e_{i+1}(s) - e_{i+1}(t)|_d

    Convention:
        - all pairs count, a sample with itself included
        - gradients reach both embeddings
        - beyond 2^22 pairs it is computed in blocks of rows: memory grows with B, not with B^2

    Args:
        student_embedding: `[B, D]`, e of the student; any float dtype, compared in float32 or wider.
        teacher_embedding: `[B, D]`, e of the teacher.
        gamma: of the Gaussian kernel, 1 / (2 variance).
        order: P, of the expansion.
        form: `gaussian` (the paper), `neighbour` (RepDistiller), `frobenius` and `bilinear` (torchdistill).
        gather: compare with the samples of all processes instead of this process's own; not for `neighbour`.

    Returns:
        Scalar, float32 or wider; without a pair to compare a connected zero.

    Raises:
        UserError: if the shapes differ.

    Example:
        >>> one = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> cc(one, torch.tensor([[1.0, 0.0], [1.0, 0.0]]), gamma=0.5, order=1)
        tensor(0.0677)

    Reference: Peng et al., Correlation Congruence for Knowledge Distillation, ICCV 2019.
    """
    if student_embedding.shape != teacher_embedding.shape:
        raise UserError(
            f"cc compares embeddings of one shape: the student's is {list(student_embedding.shape)}, "
            f"the teacher's {list(teacher_embedding.shape)}"
        )
    if form == "neighbour":
        apart = (student_embedding - teacher_embedding).abs()
        return (apart[1:] * apart[:-1]).sum() / max(len(apart) - 1, 1)
    student, teacher = student_embedding, teacher_embedding
    if form == "gaussian":
        student, teacher = unit(student), unit(teacher)
    students, teachers = (gather_rows(side)[0] if gather else side for side in (student, teacher))
    if form != "gaussian":  # a root does not split into rows: every process computes the whole
        student, teacher = students, teachers
    steps = [math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p) for p in range(order + 1)]

    def correlation(own: Tensor, everyone: Tensor) -> Tensor:
        products = own @ everyone.T
        if form == "bilinear":
            return products
        kernel = torch.full_like(products, steps[-1])
        for step in reversed(steps[:-1]):
            kernel = kernel * products + step
        return kernel

    def compare(start: int, stop: int, student: Tensor, teacher: Tensor, students: Tensor, teachers: Tensor) -> Tensor:
        apart = correlation(student[start:stop], students) - correlation(teacher[start:stop], teachers)
        return apart.square().sum()

    rows, columns = len(student), len(students)
    total = sum_over(spans(rows, columns) or [(0, 0)], compare, student, teacher, students, teachers)
    if form != "gaussian":  # no slope where the matrices agree
        total = torch.where(total > 0, total.where(total > 0, 1.0).sqrt(), total)
    return total / max(rows * columns, 1)


@final
class CC(Term):
    """Term form of :func:`cc`: a linear layer embeds either model's vectors.

    Without `gather` a process compares its own samples, as the released codes do.

    Args:
        gamma: see :func:`cc`.
        order: see :func:`cc`.
        width: of the embeddings.
        form: see :func:`cc`.
        gather: see :func:`cc`.
        student_tap: a vector a sample; what is more is flattened.
        teacher_tap: the same of the teacher.
    """

    def __init__(
        self,
        *,
        gamma: float = 0.4,
        order: int = 2,
        width: int = 128,
        form: Form = "gaussian",
        gather: bool = False,
        student_tap: str | Mapping[str, Any] | Tap = "pooled",
        teacher_tap: str | Mapping[str, Any] | Tap = "pooled",
    ) -> None:
        super().__init__()
        if form not in FORMS:
            raise UserError(f"form {form!r} is not known; valid: {', '.join(FORMS)}")
        if gather and form == "neighbour":
            raise UserError("form neighbour multiplies samples that follow each other; gather means nothing to it")
        if order < 1 or width < 1:
            raise UserError(f"order and width must be at least 1, not {order} and {width}")
        self.gamma, self.order, self.width, self.gather = gamma, order, width, gather
        self.form: Form = form
        self.student_tap, self.teacher_tap = Tap.parse(student_tap), Tap.parse(teacher_tap)

    @property
    def reads(self) -> Reads:
        """The two vectors."""
        return Reads((self.student_tap,), (self.teacher_tap,))

    def build(self, student: Signals, teacher: Signals | None, facts: Facts) -> None:
        """Create the two embeddings."""
        assert teacher is not None
        source, goal = (s[tap.name].flatten(1) for s, tap in ((student, self.student_tap), (teacher, self.teacher_tap)))
        self.embed_student = nn.Linear(source.shape[1], self.width).to(source.device)
        self.embed_teacher = nn.Linear(goal.shape[1], self.width).to(goal.device)

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> Tensor:  # type: ignore[override]
        """Return the distance of the two models' correlations."""
        pairs = (
            (self.embed_student, student[self.student_tap.name]),
            (self.embed_teacher, teacher[self.teacher_tap.name]),
        )
        ours, theirs = (embed(vector.flatten(1).to(embed.weight.dtype)) for embed, vector in pairs)
        return cc(
            ours,
            theirs,
            gamma=self.gamma,
            order=self.order,
            form=self.form,
            gather=self.gather,
        )
