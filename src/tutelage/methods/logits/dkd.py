# SPDX-License-Identifier: Apache-2.0
"""Match the teacher's confidence in the target and its ranking of the wrong classes, each with its own weight.

The authors warm the whole term up over the first epochs; here that is the schedule of its weight. Their code
takes the target out by subtracting 1000 from its logit; here it is left out exactly.
"""

from typing import final

import torch
from torch import Tensor

from tutelage.core import Batch, Card, Facts, Signals, Term
from tutelage.core.error import UserError
from tutelage.core.labels import check_classes, check_logits, class_target, two_classes
from tutelage.functional.divergence import kl_divergence
from tutelage.functional.precision import full_precision
from tutelage.functional.target import class_index, without

CARD = Card(
    name="DKD",
    title="Decoupled Knowledge Distillation",
    authors="Zhao, Cui, Song, Qiu, Liang",
    year=2022,
    venue="CVPR",
    paper="arxiv:2203.08679",
    code="github:megvii-research/mdistiller@a08d46f",
    code_licence="MIT",
    claims="Weighing the wrong classes apart from the target lets logits alone rival feature distillation.",
    reads={"student": ("logits",), "teacher": ("logits",)},
    labels=("hard",),
    averages="samples",
    batch="independent",
    zero_at_teacher=True,
    golden=("core/dkd", "classic/dkd"),
)

# min(epoch / 20, 1), epochs counted from 1: the authors' warm-up on CIFAR-100
OBJECTIVE = {
    "task": 1.0,
    "dkd": {"weight": {"linear": [0.05, 1.0], "until": "19 epochs", "by": "epochs"}},
}


@full_precision
def dkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    labelled: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> dict[str, Tensor]:
    """Return the target-class and the non-target-class part.

        L      = alpha L_tckd + beta L_nckd                                  (eq. 8)
        L_tckd = T^2 / B * sum_b KL( (q_y, 1 - q_y) || (p_y, 1 - p_y) )
        L_nckd = T^2 / B * sum_b KL( softmax(t without y / T) || softmax(s without y / T) )

    with p and q the softmax of the student's and the teacher's logits at temperature T.

    Convention:
        - KL runs from teacher to student: KL(teacher || student)
        - multiplied by T^2; summed over classes, averaged over the batch
        - with alpha = 1 and beta = 1 - q_y of each sample it is KD
        - y is the label, or the teacher's class where a row has no label

    Args:
        student_logits: `[B, K]`, any float dtype; compared in float32 or wider.
        teacher_logits: `[B, K]`.
        target: `[B]` int64 classes (anything where unlabelled).
        labelled: `[B]` bool, all by default.
        alpha: coefficient of the target-class part.
        beta: coefficient of the non-target-class part.
        temperature: softening, > 0.

    Returns:
        `target` and `nontarget`: scalars with their coefficients, float32 or wider; their sum is the loss. A
        batch without rows gives connected zeros; with two classes the second part is 0.

    Raises:
        UserError: if the shapes do not fit, or the target is not made of classes.

    Example:
        >>> parts = dkd(torch.zeros(1, 3), torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([0]), temperature=1.0)
        >>> parts["target"], parts["nontarget"]
        (tensor(0.0359), tensor(0.8876))

    Reference: Zhao et al., Decoupled Knowledge Distillation, CVPR 2022, eq. 7-8.
    """
    check_logits(student_logits, teacher_logits, "dkd", classes=2)
    check_classes(target, student_logits, "dkd")
    index = class_index(target, labelled, teacher_logits)
    student, teacher = student_logits / temperature, teacher_logits / temperature
    target_part = kl_divergence(_against_others(student, index), _against_others(teacher, index))
    nontarget_part = kl_divergence(without(student, index), without(teacher, index))
    scale = temperature**2 / max(len(student_logits), 1)
    return {"target": alpha * scale * target_part.sum(), "nontarget": beta * scale * nontarget_part.sum()}


def _against_others(logits: Tensor, index: Tensor) -> Tensor:
    """Return `[B, 2]` logits of a class against all others together: no probability is formed, none underflows."""
    return torch.stack([logits.gather(1, index[:, None])[:, 0], without(logits, index).logsumexp(dim=1)], dim=1)


@final
class DKD(Term):
    """Term form of :func:`dkd`. Reads the logits of both models and the batch's labels."""

    def __init__(self, *, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0) -> None:
        super().__init__()
        if temperature <= 0:
            raise UserError(f"temperature must be > 0, not {temperature}")
        self.alpha, self.beta, self.temperature = alpha, beta, temperature

    def caveats(self, facts: Facts) -> tuple[str, ...]:
        """Return what two classes leave of the method."""
        return two_classes(facts)

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> dict[str, Tensor]:  # type: ignore[override]
        """Return the parts `target` and `nontarget`.

        Raises:
            UserError: if the targets of the data are no classes.
        """
        return dkd(
            student.logits,
            teacher.logits,
            class_target(batch, "dkd"),
            batch.labelled,
            alpha=self.alpha,
            beta=self.beta,
            temperature=self.temperature,
        )
