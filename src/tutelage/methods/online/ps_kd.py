# SPDX-License-Identifier: Apache-2.0
"""Soften the labels with what the student itself said about a sample the last time it saw it.

The share of its own answer grows from epoch to epoch. Answers are those of the training pass, on the augmented
image, as in the released code; nothing is computed twice.
"""

import math
from collections.abc import Mapping
from typing import Literal, final

import torch
from torch import Tensor
from torch.nn import functional as F

from tutelage.core import Batch, Card, Draw, Facts, Outcome, Signals, Term
from tutelage.core.error import UserError
from tutelage.core.labels import class_target
from tutelage.functional.bank import write
from tutelage.functional.divergence import soft_cross_entropy
from tutelage.functional.precision import full_precision

CARD = Card(
    name="PS-KD",
    title="Self-Knowledge Distillation with Progressive Refinement of Targets",
    authors="Kim, Ji, Yoon, Hwang",
    year=2021,
    venue="ICCV",
    paper="arxiv:2006.12000",
    code="github:lgcnsai/PS-KD-Pytorch@9aa0828",
    code_licence="MIT",
    claims="Labels softened by one's own past answers improve accuracy and calibration without a teacher.",
    reads={"student": ("logits",)},
    labels=("hard",),
    averages="labelled",
    batch="independent",
    zero_at_teacher=False,
    golden=("classic/ps_kd",),
)

OBJECTIVE = {"task": 0.0, "ps_kd": {"weight": 1.0}}  # the labels are in the term

Storage = Literal["float32", "float16"]


def mixing(epoch: int, epochs: int, alpha: float = 0.8) -> float:
    """Return the share of the past answer at an epoch: a line that ends at alpha with the last epoch.

    Args:
        epoch: counted from 0.
        epochs: of the run.
        alpha: share at the end.

    Example:
        >>> mixing(0, 4), mixing(3, 4)
        (0.2, 0.8)
    """
    return alpha * (epoch + 1) / epochs


def soft_targets(target: Tensor, past: Tensor, share: Tensor) -> Tensor:
    """Return labels mixed with past answers, (1 - share) onehot + share past.

    Args:
        target: `[B]` int64 classes.
        past: `[B, K]` probabilities.
        share: `[B]`, or one for all, `[]`: of the past answer; 0 where there is none.
    """
    share = share.reshape(-1, 1)
    return share * past + (1 - share) * F.one_hot(target, past.shape[1]).to(past.dtype)


@full_precision
def ps_kd(
    student_logits: Tensor, target: Tensor, past: Tensor, share: Tensor, labelled: Tensor | None = None
) -> Tensor:
    """Return the cross-entropy with labels that past answers have softened.

        L_e = - 1/B sum_b sum_k [ (1 - a_e) y_bk + a_e p_bk^(e-1) ] log softmax(s_b)_k,  a_e = alpha (e + 1) / E

    Convention:
        - y is the label, p^(e-1) the network's own answer of the previous epoch, a constant
        - at epoch 0, and for a sample not met before, the label alone: share 0
        - averaged over labelled rows

    Args:
        student_logits: `[B, K]`, any float dtype; computed in float32 or wider.
        target: `[B]` int64 classes (anything where unlabelled).
        past: `[B, K]` probabilities.
        share: a_e, `[B]` or `[]`.
        labelled: `[B]` bool, all by default.

    Returns:
        Scalar, float32 or wider; without labelled rows a connected zero.

    Raises:
        UserError: if the shapes do not fit.

    Example:
        >>> past = torch.tensor([[0.5, 0.5]])
        >>> ps_kd(torch.tensor([[0.0, 1.0]]), torch.tensor([0]), past, torch.tensor(0.8))
        tensor(0.9133)

    Reference: Kim et al., Self-Knowledge Distillation with Progressive Refinement of Targets, ICCV 2021.
    """
    if past.shape != student_logits.shape or target.shape != student_logits.shape[:1]:
        raise UserError(
            f"ps_kd takes one class and one past answer a row: logits are {list(student_logits.shape)}, "
            f"past answers {list(past.shape)}, targets {list(target.shape)}"
        )
    if labelled is None:
        labelled = torch.ones_like(target, dtype=torch.bool)
    mixed = soft_targets(target.where(labelled, 0), past.to(student_logits.dtype), share.to(student_logits.dtype))
    rows = soft_cross_entropy(student_logits, mixed)
    return rows.where(labelled, 0.0).sum() / labelled.sum().clamp(min=1)


@final
class PSKD(Term):
    """Term form of :func:`ps_kd`: remembers the student's last answer to every training sample.

    It holds N x K numbers, which are part of the checkpoint. A sample that is met several times an epoch is
    compared with the answer before, whenever that was.

    Args:
        alpha: share of the past answer at the end of the run, in [0, 1].
        storage: type of the remembered answers: `float32` or `float16`, half the memory.
    """

    past: Tensor
    seen: Tensor

    def __init__(self, *, alpha: float = 0.8, storage: Storage = "float32") -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise UserError(f"alpha is a share in [0, 1], not {alpha}")
        if storage not in ("float16", "float32"):
            raise UserError(f"storage {storage!r} is not known; valid: float16, float32")
        self.alpha = alpha
        self.storage: Storage = storage
        self.steps_per_epoch, self.epochs = 1, 1

    def build(self, student: Signals, teacher: Signals | None, facts: Facts) -> None:
        """Create the memory.

        Raises:
            UserError: if the number of samples is not known, or the logits are not `[B, K]`.
        """
        logits = student.logits
        if logits.ndim != 2:
            raise UserError(f"ps_kd remembers answers [B, K], and the logits are {list(logits.shape)}")
        if not facts.num_samples:
            raise UserError("ps_kd remembers every training sample, and needs a data set of known size")
        self.steps_per_epoch = facts.steps_per_epoch
        self.epochs = math.ceil(facts.total_steps / facts.steps_per_epoch)
        dtype = torch.float16 if self.storage == "float16" else torch.float32
        past = torch.zeros(facts.num_samples, logits.shape[1], dtype=dtype, device=logits.device)
        self.register_buffer("past", past)
        self.register_buffer("seen", torch.zeros(facts.num_samples, dtype=torch.bool, device=logits.device))

    def draw(self, student: Signals, teacher: Signals | None, batch: Batch, draw: Draw) -> Tensor:
        """Return the share of the past answer at this step; 0 in the first epoch."""
        epoch = min(draw.step // self.steps_per_epoch, self.epochs - 1)
        share = mixing(epoch, self.epochs, self.alpha) if draw.step >= self.steps_per_epoch else 0.0
        return torch.full((), share, dtype=torch.float64, device=batch.index.device)

    def forward(self, student: Signals, teacher: Signals | None, batch: Batch, share: Tensor) -> Outcome:
        """Return the loss, and the answers to remember.

        Raises:
            UserError: if the data has no class labels.
        """
        target = class_target(batch, "ps_kd")
        known = share * self.seen[batch.index]
        loss = ps_kd(student.logits, target, self.past[batch.index], known, batch.labelled)
        answer = student.logits.detach().float().softmax(dim=1)
        return Outcome({"ps_kd": loss}, {"index": batch.index, "answer": answer})

    def commit(self, kept: Mapping[str, Tensor]) -> None:
        """Remember the answers of this step."""
        write(self.past, kept["index"], kept["answer"])
        self.seen[kept["index"]] = True
