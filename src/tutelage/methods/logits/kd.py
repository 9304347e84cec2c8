# SPDX-License-Identifier: Apache-2.0
"""Match the teacher's class probabilities, softened by a temperature.

Public codes differ in two ways that move the value but not the gradient's direction: some leave the teacher's
entropy out (a cross-entropy), some divide by the number of classes. The second is not the paper and is not
offered.
"""

from typing import Literal, final

from torch import Tensor

from tutelage.core import Batch, Card, Signals, Term
from tutelage.core.error import UserError
from tutelage.functional.divergence import cross_entropy, kl_divergence
from tutelage.functional.precision import full_precision

CARD = Card(
    name="KD",
    title="Distilling the Knowledge in a Neural Network",
    authors="Hinton, Vinyals, Dean",
    year=2015,
    venue="NeurIPS Deep Learning Workshop 2014",
    paper="arxiv:1503.02531",
    code="github:yzd-v/cls_KD@1e5d48f",
    code_licence="Apache-2.0",
    claims="A small network trained on a large one's softened probabilities beats one trained on labels.",
    reads={"student": ("logits",), "teacher": ("logits",)},
    labels=("none",),
    averages="samples",
    batch="independent",
    zero_at_teacher=True,
    golden=("core/kd", "classic/kd"),
)

OBJECTIVE = {"task": 0.1, "kd": {"weight": 0.9}}


@full_precision
def kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 4.0,
    form: Literal["kl", "cross_entropy"] = "kl",
) -> Tensor:
    """Return the divergence of softened class probabilities.

        L = T^2 / B * sum_b KL( softmax(t_b / T) || softmax(s_b / T) )        (section 2)

    Convention:
        - KL runs from teacher to student: KL(teacher || student); no gradient is asked of the teacher
        - multiplied by T^2; summed over classes, averaged over the batch
        - `cross_entropy` leaves the teacher's entropy in: same gradient, another value

    Args:
        student_logits: `[B, K]`, any float dtype; compared in float32 or wider.
        teacher_logits: `[B, K]`.
        temperature: softening, > 0.
        form: `kl` (the paper), or `cross_entropy` (cls_KD and early codes).

    Returns:
        Scalar, float32 or wider; a batch without rows gives a connected zero.

    Raises:
        UserError: if the logits are not `[B, K]`, or if the shapes differ.

    Example:
        >>> import torch
        >>> kd(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]]), temperature=1.0)
        tensor(0.4338)

    Reference: Hinton et al., Distilling the Knowledge in a Neural Network, 2015, section 2.
    """
    if student_logits.ndim != 2:
        raise UserError(
            f"kd compares logits [B, K], not {list(student_logits.shape)}: for texts take distillm, for maps cwd"
        )
    if student_logits.shape != teacher_logits.shape:
        raise UserError(
            f"kd compares logits of one shape: the student's are {list(student_logits.shape)}, "
            f"the teacher's {list(teacher_logits.shape)}"
        )
    compare = kl_divergence if form == "kl" else cross_entropy
    rows = compare(student_logits / temperature, teacher_logits / temperature)
    return temperature**2 * rows.sum() / max(len(student_logits), 1)


@final
class KD(Term):
    """Term form of :func:`kd`. Reads the logits of both models; labels and their absence do not matter."""

    def __init__(self, *, temperature: float = 4.0, form: Literal["kl", "cross_entropy"] = "kl") -> None:
        super().__init__()
        if temperature <= 0:
            raise UserError(f"temperature must be > 0, not {temperature}")
        if form not in ("kl", "cross_entropy"):
            raise UserError(f"form {form!r} is not known; valid: cross_entropy, kl")
        self.temperature = temperature
        self.form: Literal["kl", "cross_entropy"] = form

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> Tensor:  # type: ignore[override]
        """Return the divergence of the two models' logits."""
        return kd(student.logits, teacher.logits, temperature=self.temperature, form=self.form)
