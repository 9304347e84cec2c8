# SPDX-License-Identifier: Apache-2.0
"""Learn from the student's own confidence in the target, smoothed over the batch; there is no teacher.

The code stands in the history of the authors' repository only: USKD took its place.
"""

from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F

from tutelage.core import Batch, Card, Signals, Term, ranks
from tutelage.core.error import UserError
from tutelage.core.labels import class_target
from tutelage.functional.precision import full_precision

CARD = Card(
    name="tf-NKD",
    title="Rethinking Knowledge Distillation via Cross-Entropy",
    authors="Yang, Li, Gong, Zhang, Lao, Yuan, Li",
    year=2022,
    venue="arXiv",
    paper="arxiv:2208.10139",
    code="github:yzd-v/cls_KD@de48db4",
    code_licence="Apache-2.0",
    claims="A student's own smoothed confidence in the target is a soft label that improves it.",
    reads={"student": ("logits",)},
    labels=("hard", "soft"),
    averages="labelled",
    batch="coupled",
    zero_at_teacher=False,
    golden=("core/tf_nkd",),
)

OBJECTIVE = {"task": 1.0, "tf_nkd": {"weight": 1.0}}


@full_precision
def tf_nkd(
    student_logits: Tensor,
    target: Tensor,
    labelled: Tensor | None = None,
    *,
    gather: bool = False,
    top: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return the cross-entropy with the smoothed target, one part for each target of a row.

        L = - 1/B sum_b sum_{j in J} (p_j + v_j - mean_b p_j) log p_j        (0 where v_j = 0)

    with p the softmax of the student and J the target classes with labels v: the label with v = 1, or the two
    largest soft labels.

    Convention:
        - the smoothed label in the bracket is a constant; it lies around v and may exceed 1
        - the mean of p_j runs over labelled rows, each target column by itself, also over rows with v_j = 0

    Args:
        student_logits: `[B, K]`, any float dtype; computed in float32 or wider.
        target: `[B]` int64 classes (anything where unlabelled), or `[B, K]` soft labels.
        labelled: `[B]` bool, all by default.
        gather: take the mean of p_j over all ranks instead of this process's rows.
        top: classes `[B, J]` and labels `[B, J]` of the targets, where they are known already.

    Returns:
        `target_0`, and for soft labels `target_1`: scalars, float32 or wider; their sum is the loss. Without
        labelled rows they are connected zeros.

    Raises:
        UserError: if the shapes do not fit.

    Example:
        >>> tf_nkd(torch.zeros(2, 2), torch.tensor([0, 1]))["target_0"]
        tensor(0.6931)

    Reference: Yang et al., Rethinking Knowledge Distillation via Cross-Entropy, 2022.
    """
    if student_logits.ndim != 2:
        raise UserError(f"tf_nkd takes logits [B, K], not {list(student_logits.shape)}")
    rows, classes = student_logits.shape
    if target.shape not in ((rows,), (rows, classes)):
        raise UserError(
            f"tf_nkd takes [B] classes or [B, K] soft labels for logits {list(student_logits.shape)}, "
            f"not a target of shape {list(target.shape)}"
        )
    if labelled is None:
        labelled = torch.ones(rows, dtype=torch.bool, device=student_logits.device)
    if top is not None:
        index, value = top[0], top[1].to(student_logits.dtype)
    elif target.ndim == 1:
        index, value = target.where(labelled, 0)[:, None], student_logits.new_ones(rows, 1)
    else:
        ranked = target.to(student_logits.dtype).sort(dim=1, descending=True, stable=True)
        index, value = ranked.indices[:, :2], ranked.values[:, :2]
    kept = labelled[:, None]
    num_labelled = labelled.sum().to(student_logits.dtype)
    log_probs = F.log_softmax(student_logits, dim=1).gather(1, index)
    probs = log_probs.detach().exp()
    totals = torch.cat([probs.where(kept, 0.0).sum(dim=0), num_labelled[None]])
    if gather:
        totals = ranks.mean(totals)
    smooth = (probs + value - totals[:-1] / totals[-1].clamp(min=1e-12)).where(value != 0, 0.0)
    parts = (-(smooth * log_probs).where(kept, 0.0).sum(dim=0) / num_labelled.clamp(min=1)).unbind()
    return {f"target_{number}": part for number, part in enumerate(parts)}


@final
class TfNKD(Term):
    """Term form of :func:`tf_nkd`. Reads the student's logits and the batch's labels; unlabelled rows are skipped.

    The mean of probabilities is taken over the rows at hand: those of one micro-batch, and unless `gather` of
    one process.
    """

    def __init__(self, *, gather: bool = False) -> None:
        super().__init__()
        self.gather = gather

    def forward(self, student: Signals, teacher: Signals | None, batch: Batch) -> dict[str, Tensor]:
        """Return the parts `target_0` and, for soft labels, `target_1`.

        Raises:
            UserError: if the targets of the data are no classes.
        """
        target = class_target(batch, "tf_nkd")
        return tf_nkd(student.logits, target, batch.labelled, gather=self.gather)
