# SPDX-License-Identifier: Apache-2.0
"""Match the teacher's probabilities raised to a power; the student has no temperature.

Leaving the student's temperature out adds an entropy to KD's objective. The weighted form counts a sample the
more, the flatter its teacher's answer is after the power.
"""

from typing import Literal, final

from torch import Tensor
from torch.nn import functional as F

from tutelage.core import Batch, Card, Signals, Term
from tutelage.core.error import UserError
from tutelage.core.labels import check_logits
from tutelage.functional.divergence import kl_divergence
from tutelage.functional.precision import full_precision

CARD = Card(
    name="TTM",
    title="Knowledge Distillation Based on Transformed Teacher Matching",
    authors="Zheng, Yang",
    year=2024,
    venue="ICLR",
    paper="arxiv:2402.11148",
    code="github:zkxufo/TTM@fe457b3",
    code_licence="MIT",
    claims="Dropping the student's temperature regularises KD; weighing samples by their power sum helps further.",
    reads={"student": ("logits",), "teacher": ("logits",)},
    labels=("none",),
    averages="samples",
    batch="independent",
    zero_at_teacher=False,
    golden=("classic/ttm",),
)

OBJECTIVE = {"task": 1.0, "ttm": {"weight": 45.0, "gamma": 0.1}}

Form = Literal["plain", "weighted"]


@full_precision
def ttm(student_logits: Tensor, teacher_logits: Tensor, *, gamma: float = 0.1, form: Form = "plain") -> Tensor:
    """Return the divergence from the transformed teacher to the student.

        L   = 1/B sum_b KL( q_b || softmax(s_b) )                       TTM
        L   = 1/B sum_b U_b KL( q_b || softmax(s_b) )                   WTTM
        u_k = softmax(t)_k^gamma,    U = sum_k u_k,    q = u / U = softmax(gamma t)

    Convention:
        - KL runs from teacher to student: KL(teacher || student)
        - gamma is one over the teacher's temperature; the student's is 1 and there is no T^2
        - U is a constant; it lies between 1 and K^(1 - gamma), so weights do not carry over to other K
        - summed over classes, averaged over the batch

    Args:
        student_logits: `[B, K]`, any float dtype; compared in float32 or wider.
        teacher_logits: `[B, K]`.
        gamma: power, > 0.
        form: `plain` (TTM) or `weighted` (WTTM).

    Returns:
        Scalar, float32 or wider; a batch without rows gives a connected zero.

    Raises:
        UserError: if the shapes differ.

    Example:
        >>> import torch
        >>> teacher = torch.tensor([[9.0, 3.0]]).log()
        >>> ttm(torch.zeros(1, 2), teacher, gamma=0.5), ttm(torch.zeros(1, 2), teacher, gamma=0.5, form="weighted")
        (tensor(0.0363), tensor(0.0496))

    Reference: Zheng and Yang, Knowledge Distillation Based on Transformed Teacher Matching, ICLR 2024, sections 3-4.
    """
    if student_logits.shape != teacher_logits.shape:
        raise UserError(
            f"ttm compares logits of one shape: the student's are {list(student_logits.shape)}, "
            f"the teacher's {list(teacher_logits.shape)}"
        )
    rows = kl_divergence(student_logits, gamma * teacher_logits)
    if form == "weighted":
        rows = rows * (gamma * F.log_softmax(teacher_logits, dim=-1)).logsumexp(dim=-1).exp().detach()
    return rows.sum() / max(len(student_logits), 1)


@final
class TTM(Term):
    """Term form of :func:`ttm`. Reads the logits of both models; labels and their absence do not matter."""

    def __init__(self, *, gamma: float = 0.1, form: Form = "plain") -> None:
        super().__init__()
        if gamma <= 0:
            raise UserError(f"gamma must be > 0, not {gamma}")
        if form not in ("plain", "weighted"):
            raise UserError(f"form {form!r} is not known; valid: plain, weighted")
        self.gamma = gamma
        self.form: Form = form

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> Tensor:  # type: ignore[override]
        """Return the divergence of the two models' logits.

        Raises:
            UserError: if they are not `[B, K]`.
        """
        check_logits(student.logits, teacher.logits, "ttm")
        return ttm(student.logits, teacher.logits, gamma=self.gamma, form=self.form)
