# SPDX-License-Identifier: Apache-2.0
"""Learn from the teacher's few largest class probabilities, as they are stored once and read ever after.

Here the teacher's answers are reduced and made whole on the fly, so that a run shows what a store of them would
give; `store` and `recover` are the two halves. There are no hard labels and there is no T^2.
"""

from typing import Literal, final

import torch
from torch import Tensor
from torch.nn import functional as F

from tutelage.core import Batch, Card, Signals, Term
from tutelage.core.error import UserError
from tutelage.core.labels import check_logits
from tutelage.functional.divergence import soft_cross_entropy
from tutelage.functional.precision import full_precision
from tutelage.functional.top import largest, spread

CARD = Card(
    name="FKD",
    title="A Fast Knowledge Distillation Framework for Visual Recognition",
    authors="Shen, Xing",
    year=2022,
    venue="ECCV",
    paper="arxiv:2112.01528",
    code="github:szq0214/FKD@afd5294",
    code_licence="MIT",
    claims="Soft labels of crops, stored once as a few numbers each, train students faster and at least as well.",
    reads={"student": ("logits",), "teacher": ("logits",)},
    labels=("none",),
    averages="samples",
    batch="independent",
    zero_at_teacher=False,
    golden=("classic/fkd_softlabel",),
)

OBJECTIVE = {"task": 0.0, "fkd": {"weight": 1.0}}

Form = Literal["marginal_smoothing", "marginal_renorm", "smoothing", "hard"]
FORMS = ("hard", "marginal_renorm", "marginal_smoothing", "smoothing")


@full_precision
def store(teacher_logits: Tensor, *, form: Form = "marginal_smoothing", k: int = 5) -> tuple[Tensor, Tensor]:
    """Return what is kept of the teacher's probabilities.

    Args:
        teacher_logits: `[B, K]`, any float dtype.
        form: see :func:`recover`; `hard` and `smoothing` keep the largest alone.
        k: how many are kept; all K where there are fewer.

    Returns:
        index `[B, k]` int64 and value `[B, k]`, in falling order; of equal values the lower class first.
    """
    return largest(F.softmax(teacher_logits, dim=1), 1 if form in ("hard", "smoothing") else k)


@full_precision
def recover(index: Tensor, value: Tensor, num_classes: int, *, form: Form = "marginal_smoothing") -> Tensor:
    """Return the dense targets of what was kept.

    Args:
        index: `[B, k]` classes.
        value: `[B, k]` their probabilities.
        num_classes: K.
        form: `marginal_smoothing` and `smoothing` share what is missing to 1 among the other classes;
            `marginal_renorm` divides by the sum and leaves the others 0; `hard` is the class itself.

    Returns:
        `[B, K]`, float32 or wider; each row sums to 1.

    Example:
        >>> recover(torch.tensor([[2, 0]]), torch.tensor([[0.6, 0.2]]), 4, form="marginal_renorm")
        tensor([[0.2500, 0.0000, 0.7500, 0.0000]])
    """
    if form == "hard":
        value = torch.ones_like(value)
    elif form == "marginal_renorm":
        value = value / value.sum(dim=1, keepdim=True)
    else:
        return spread(index, value, num_classes)
    return torch.zeros_like(value[:, :1]).expand(-1, num_classes).scatter(1, index, value)


@full_precision
def fkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    form: Form = "marginal_smoothing",
    k: int = 5,
    temperature: float = 1.0,
) -> Tensor:
    """Return the cross-entropy with the teacher's stored soft labels.

        L = - 1/B sum_b sum_k recover(store(t_b))_k log softmax(s_b / T)_k

    Convention:
        - the teacher's temperature is 1; T is the student's, and there is no T^2
        - a cross-entropy: its floor is the entropy of the targets, not 0
        - no gradient reaches the teacher

    Args:
        student_logits: `[B, K]`, any float dtype; compared in float32 or wider.
        teacher_logits: `[B, K]`.
        form: what is kept: see :func:`recover`.
        k: how many classes are kept; all K where there are fewer.
        temperature: of the student, > 0.

    Returns:
        Scalar, float32 or wider; a batch without rows gives a connected zero.

    Raises:
        UserError: if the shapes do not fit.

    Example:
        >>> fkd(torch.zeros(1, 4), torch.zeros(1, 4), k=2)
        tensor(1.3863)

    Reference: Shen and Xing, A Fast Knowledge Distillation Framework for Visual Recognition, ECCV 2022.
    """
    check_logits(student_logits, teacher_logits, "fkd")
    index, value = store(teacher_logits.detach(), form=form, k=k)
    target = recover(index, value, student_logits.shape[1], form=form)
    return soft_cross_entropy(student_logits / temperature, target).sum() / max(len(student_logits), 1)


@final
class FKD(Term):
    """Term form of :func:`fkd`. Reads the logits of both models; labels and their absence do not matter."""

    def __init__(self, *, form: Form = "marginal_smoothing", k: int = 5, temperature: float = 1.0) -> None:
        super().__init__()
        if form not in FORMS:
            raise UserError(f"form {form!r} is not known; valid: {', '.join(FORMS)}")
        if k < 1:
            raise UserError(f"k is the number of classes kept, at least 1, not {k}")
        if temperature <= 0:
            raise UserError(f"temperature must be > 0, not {temperature}")
        self.form: Form = form
        self.k, self.temperature = k, temperature

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> Tensor:  # type: ignore[override]
        """Return the cross-entropy with the teacher's reduced answers."""
        return fkd(student.logits, teacher.logits, form=self.form, k=self.k, temperature=self.temperature)
