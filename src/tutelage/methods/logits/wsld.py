# SPDX-License-Identifier: Apache-2.0
"""Match the teacher's softened probabilities, less on samples where the student is already ahead of it.

The text subtracts the teacher's entropy, the released code does not: the same gradient, another value. The
default follows the code.
"""

from typing import Literal, final

import torch
from torch import Tensor
from torch.nn import functional as F

from tutelage.core import Batch, Card, Signals, Term
from tutelage.core.error import UserError
from tutelage.core.labels import check_classes, check_logits, class_target
from tutelage.functional.divergence import cross_entropy, kl_divergence
from tutelage.functional.precision import full_precision
from tutelage.functional.target import class_index

CARD = Card(
    name="WSLD",
    title="Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff Perspective",
    authors="Zhou, Song, Chen, Zhou, Wang, Yuan, Zhang",
    year=2021,
    venue="ICLR",
    paper="arxiv:2102.00650",
    code="github:bellymonster/Weighted-Soft-Label-Distillation@67820dd",
    claims="Weighing each sample's soft label by how much the student trails its teacher improves KD.",
    reads={"student": ("logits",), "teacher": ("logits",)},
    labels=("hard",),
    averages="samples",
    batch="independent",
    zero_at_teacher=False,
    golden=("core/wsld", "classic/wsld"),
)

OBJECTIVE = {"task": 1.0, "wsld": {"weight": 2.25, "temperature": 4.0}}

Form = Literal["cross_entropy", "kl"]


@full_precision
def wsld(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    labelled: Tensor | None = None,
    *,
    temperature: float = 4.0,
    form: Form = "cross_entropy",
    eps: float = 1e-7,
) -> Tensor:
    """Return the weighted soft cross-entropy.

        L   = T^2 / B * sum_b w_b sum_k - softmax(t_b / T)_k log softmax(s_b / T)_k
        w_b = 1 - exp( - log softmax(s_b)_y / (log softmax(t_b)_y - eps) )

    Convention:
        - the weight is a constant, taken at temperature 1; it is 1 where the teacher is sure, small where the
          student is surer than the teacher
        - multiplied by T^2; summed over classes, averaged over the batch (not over the weights)
        - alpha of the paper is the weight of the whole term in the objective
        - y is the label, or the teacher's class where a row has no label

    Args:
        student_logits: `[B, K]`, any float dtype; compared in float32 or wider.
        teacher_logits: `[B, K]`.
        target: `[B]` int64 classes (anything where unlabelled).
        labelled: `[B]` bool, all by default.
        temperature: softening of the soft labels, > 0.
        form: `cross_entropy` (the released code), or `kl` (the text: the teacher's entropy is subtracted).
        eps: added to the teacher's cross-entropy.

    Returns:
        Scalar, float32 or wider; a batch without rows gives a connected zero.

    Raises:
        UserError: if the shapes do not fit, or the target is not made of classes.

    Example:
        >>> import torch
        >>> wsld(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0]), temperature=1.0)
        tensor(0.4382)

    Reference: Zhou et al., Rethinking Soft Labels for Knowledge Distillation, ICLR 2021.
    """
    check_logits(student_logits, teacher_logits, "wsld")
    check_classes(target, student_logits, "wsld")
    index = class_index(target, labelled, teacher_logits)
    student_loss, teacher_loss = (
        F.cross_entropy(logits.detach(), index, reduction="none") for logits in (student_logits, teacher_logits)
    )
    weight = -torch.expm1(-student_loss / (teacher_loss + eps))
    compare = kl_divergence if form == "kl" else cross_entropy
    rows = compare(student_logits / temperature, teacher_logits / temperature)
    return temperature**2 * (weight * rows).sum() / max(len(student_logits), 1)


@final
class WSLD(Term):
    """Term form of :func:`wsld`. Reads the logits of both models and the batch's labels."""

    def __init__(self, *, temperature: float = 4.0, form: Form = "cross_entropy") -> None:
        super().__init__()
        if temperature <= 0:
            raise UserError(f"temperature must be > 0, not {temperature}")
        if form not in ("cross_entropy", "kl"):
            raise UserError(f"form {form!r} is not known; valid: cross_entropy, kl")
        self.temperature = temperature
        self.form: Form = form

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> Tensor:  # type: ignore[override]
        """Return the weighted comparison of the two models' logits.

        Raises:
            UserError: if the targets of the data are no classes.
        """
        return wsld(
            student.logits,
            teacher.logits,
            class_target(batch, "wsld"),
            batch.labelled,
            temperature=self.temperature,
            form=self.form,
        )
