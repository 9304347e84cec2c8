# SPDX-License-Identifier: Apache-2.0
"""Match the teacher's confidence in the target, and the wrong classes normalised among themselves.

Paper and released code agree. From July to October 2023 the released code left the target among the wrong
classes, and the authors' pseudo-code takes the teacher's confidence from the student: neither is offered.
"""

from typing import final

from torch import Tensor
from torch.nn import functional as F

from tutelage.core import Batch, Card, Facts, Signals, Term
from tutelage.core.error import UserError
from tutelage.core.labels import check_logits, class_target, two_classes
from tutelage.functional.divergence import soft_cross_entropy
from tutelage.functional.precision import full_precision
from tutelage.functional.target import class_index, without

CARD = Card(
    name="NKD",
    title="From Knowledge Distillation to Self-Knowledge Distillation: "
    "A Unified Approach with Normalized Loss and Customized Soft Labels",
    authors="Yang, Zeng, Li, Zhang, Yuan, Li",
    year=2023,
    venue="ICCV",
    paper="arxiv:2303.13005",
    code="github:yzd-v/cls_KD@1e5d48f",
    code_licence="Apache-2.0",
    claims="Normalising the wrong classes of both models before comparing them beats KD and DKD on ImageNet.",
    reads={"student": ("logits",), "teacher": ("logits",)},
    labels=("hard", "soft"),
    averages="samples",
    batch="independent",
    zero_at_teacher=False,
    golden=("core/nkd",),
)

OBJECTIVE = {"task": 1.0, "nkd": {"weight": 1.0}}


@full_precision
def nkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    labelled: Tensor | None = None,
    *,
    gamma: float = 1.5,
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """Return the target and the non-target part.

        L   = L_t + gamma L_n
        L_t = - 1/B sum_b softmax(t)_y log softmax(s)_y
        L_n = - T^2 / B sum_b sum_{i != y} softmax(t without y / T)_i log softmax(s without y / T)_i

    Convention:
        - two cross-entropies: the floor is not 0, also where the student is the teacher
        - temperature and T^2 belong to the non-target part; the teacher's softmax(t)_y is a constant
        - y is the label, the largest soft label, or the teacher's class where a row has no label

    Args:
        student_logits: `[B, K]`, any float dtype; compared in float32 or wider.
        teacher_logits: `[B, K]`.
        target: `[B]` int64 classes (anything where unlabelled) or `[B, K]` soft labels.
        labelled: `[B]` bool, all by default.
        gamma: coefficient of the non-target part (ImageNet 1.5, between transformers 1.0, CIFAR-100 3.5).
        temperature: of the non-target part, > 0 (1 on ImageNet, 3 on CIFAR-100).

    Returns:
        `target` and `nontarget`: scalars with their coefficients, float32 or wider; their sum is the loss. A
        batch without rows gives connected zeros; with two classes the non-target part is 0.

    Raises:
        UserError: if the shapes do not fit.

    Example:
        >>> import torch
        >>> parts = nkd(torch.zeros(1, 3), torch.zeros(1, 3), torch.tensor([0]), gamma=1.0)
        >>> parts["target"], parts["nontarget"]
        (tensor(0.3662), tensor(0.6931))

    Reference: Yang et al., From Knowledge Distillation to Self-Knowledge Distillation, ICCV 2023, section 3.
    """
    check_logits(student_logits, teacher_logits, "nkd", classes=2)
    rows, classes = student_logits.shape
    if target.shape not in ((rows,), (rows, classes)):
        raise UserError(
            f"nkd takes [B] classes or [B, K] soft labels for logits {list(student_logits.shape)}, "
            f"not a target of shape {list(target.shape)}"
        )
    index = class_index(target, labelled, teacher_logits)
    log_prob = F.log_softmax(student_logits, dim=1).gather(1, index[:, None])[:, 0]
    confidence = F.softmax(teacher_logits, dim=1).gather(1, index[:, None])[:, 0].detach()
    others = F.softmax(without(teacher_logits, index) / temperature, dim=1)
    nontarget = soft_cross_entropy(without(student_logits, index) / temperature, others)
    count = max(rows, 1)
    return {
        "target": -(confidence * log_prob).sum() / count,
        "nontarget": gamma * temperature**2 * nontarget.sum() / count,
    }


@final
class NKD(Term):
    """Term form of :func:`nkd`. Reads the logits of both models and the batch's labels."""

    def __init__(self, *, gamma: float = 1.5, temperature: float = 1.0) -> None:
        super().__init__()
        if temperature <= 0:
            raise UserError(f"temperature must be > 0, not {temperature}")
        self.gamma, self.temperature = gamma, temperature

    def caveats(self, facts: Facts) -> tuple[str, ...]:
        """Return what two classes leave of the method."""
        return two_classes(facts)

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> dict[str, Tensor]:  # type: ignore[override]
        """Return the parts `target` and `nontarget`.

        Raises:
            UserError: if the targets of the data are no classes.
        """
        return nkd(
            student.logits,
            teacher.logits,
            class_target(batch, "nkd"),
            batch.labelled,
            gamma=self.gamma,
            temperature=self.temperature,
        )
