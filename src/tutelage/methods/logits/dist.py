# SPDX-License-Identifier: Apache-2.0
"""Match the teacher's predictions up to scale and shift: their correlation across classes, and across samples.

A stronger teacher is often surer in absolute terms; what a correlation keeps is the ranking. The released code
gives the term the weight 2 and both parts the coefficient 1, the paper coefficients of 2: the same loss.
"""

from typing import Literal, final

import torch
from torch import Tensor
from torch.nn import functional as F

from tutelage.core import Batch, Card, Signals, Term
from tutelage.core.error import UserError
from tutelage.core.labels import check_logits
from tutelage.functional.collective import gather_rows
from tutelage.functional.precision import full_precision

CARD = Card(
    name="DIST",
    title="Knowledge Distillation from A Stronger Teacher",
    authors="Huang, You, Wang, Qian, Xu",
    year=2022,
    venue="NeurIPS",
    paper="arxiv:2205.10536",
    code="github:hunto/image_classification_sota@6f7a70a",
    code_licence="Apache-2.0",
    claims="Correlation in the place of a divergence lets students gain from much stronger teachers.",
    reads={"student": ("logits",), "teacher": ("logits",)},
    labels=("none",),
    averages="samples",
    batch="coupled",
    zero_at_teacher=False,
    golden=("classic/dist",),
)

OBJECTIVE = {"task": 1.0, "dist": {"weight": 2.0}}

Form = Literal["product", "clamped"]


def pearson(student: Tensor, teacher: Tensor, dim: int, *, form: Form = "product", eps: float = 1e-8) -> Tensor:
    """Return the correlation coefficients along a dimension; 0 where a side is constant.

    Args:
        student: any shape.
        teacher: of the same shape.
        dim: which is centred and summed away.
        form: `product` adds eps to the product of the norms, `clamped` raises each norm to eps.
        eps: keeps the quotient finite.

    Example:
        >>> pearson(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([5.0, 3.0, 1.0]), 0)
        tensor(-1.0000)
    """
    ours, theirs = (side - side.mean(dim, keepdim=True) for side in (student, teacher))
    one, other = (torch.linalg.vector_norm(side, dim=dim) for side in (ours, theirs))
    # of a constant side rounding alone is left, and its slope would be as steep as 1 / eps
    least = 8 * torch.finfo(student.dtype).eps
    constant = (one <= least * torch.linalg.vector_norm(student, dim=dim)) | (
        other <= least * torch.linalg.vector_norm(teacher, dim=dim)
    )
    scale = one.clamp(min=eps) * other.clamp(min=eps) if form == "clamped" else one * other + eps
    rho: Tensor = (ours * theirs).sum(dim) / scale
    return rho.where(~constant, 0.0)


@full_precision
def dist(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
    form: Form = "product",
    gather: bool = False,
    eps: float = 1e-8,
) -> dict[str, Tensor]:
    """Return the inter-class and the intra-class part.

        L = beta L_inter + gamma L_intra
        L_inter = T^2 * ( 1 - 1/B sum_b rho(p_b, q_b) )
        L_intra = T^2 * ( 1 - 1/K sum_k rho(p_:k, q_:k) )

    with p and q the softmax of the student's and the teacher's logits at temperature T, as `[B, K]` matrices
    with rows p_b and columns p_:k, and rho the correlation coefficient.

    Convention:
        - multiplied by T^2; each part lies in [0, 2 T^2]
        - a constant row or column correlates with nothing and teaches nothing: rho = 0, so one row alone has
          L_intra = T^2
        - where the student is the teacher eps leaves a remainder of about 1e-7
        - where probabilities of a column are all about 1e-8, eps damps its gradient

    Args:
        student_logits: `[B, K]`, any float dtype; compared in float32 or wider.
        teacher_logits: `[B, K]`.
        beta: coefficient of the inter-class part.
        gamma: coefficient of the intra-class part.
        temperature: softening, > 0 (1 on ImageNet, 4 on CIFAR-100).
        form: see :func:`pearson`: `product` (the authors' code) or `clamped` (a public toolkit).
        gather: correlate columns over the samples of all processes instead of this process's own.
        eps: see :func:`pearson`.

    Returns:
        `inter` and `intra`: scalars with their coefficients, float32 or wider; their sum is the loss. A batch
        without rows gives connected zeros.

    Raises:
        UserError: if the shapes do not fit.

    Example:
        >>> flat, sharp = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[9.0, 0.0], [0.0, 9.0]])
        >>> float(dist(flat, sharp)["inter"]) < 1e-6, float(dist(flat, -sharp)["intra"]) > 1.99
        (True, True)

    Reference: Huang et al., Knowledge Distillation from A Stronger Teacher, NeurIPS 2022.
    """
    check_logits(student_logits, teacher_logits, "dist")
    p, q = (F.softmax(logits / temperature, dim=1) for logits in (student_logits, teacher_logits))
    columns = [gather_rows(side)[0] for side in (p, q)] if gather else [p, q]
    inter = 1 - pearson(p, q, 1, form=form, eps=eps)
    intra = 1 - pearson(columns[0], columns[1], 0, form=form, eps=eps)
    rows, seen = len(p), min(len(columns[0]), 1)
    return {
        "inter": beta * temperature**2 * inter.sum() / max(rows, 1),
        "intra": gamma * temperature**2 * seen * intra.mean(),
    }


@final
class DIST(Term):
    """Term form of :func:`dist`. Reads the logits of both models; labels and their absence do not matter.

    Columns are correlated over the rows at hand: those of one micro-batch, and unless `gather` of one process.
    """

    def __init__(
        self,
        *,
        beta: float = 1.0,
        gamma: float = 1.0,
        temperature: float = 1.0,
        form: Form = "product",
        gather: bool = False,
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise UserError(f"temperature must be > 0, not {temperature}")
        if form not in ("product", "clamped"):
            raise UserError(f"form {form!r} is not known; valid: clamped, product")
        self.beta, self.gamma, self.temperature = beta, gamma, temperature
        self.form: Form = form
        self.gather = gather

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> dict[str, Tensor]:  # type: ignore[override]
        """Return the parts `inter` and `intra`."""
        return dist(
            student.logits,
            teacher.logits,
            beta=self.beta,
            gamma=self.gamma,
            temperature=self.temperature,
            form=self.form,
            gather=self.gather,
        )
