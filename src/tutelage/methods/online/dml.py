# SPDX-License-Identifier: Apache-2.0
"""Let students of one cohort learn from each other: each matches the answers of its peers.

The term is one student's divergence from one peer; a cohort of K students has K (K - 1) of them, each with weight
1 / (K - 1). The released code adds up peers instead of averaging them, and puts 1e-8 into the logarithm.
"""

from typing import Literal, final

from torch import Tensor

from tutelage.core import Batch, Card, Signals, Term
from tutelage.core.error import UserError
from tutelage.core.labels import check_logits
from tutelage.functional.divergence import kl_divergence
from tutelage.functional.precision import full_precision

CARD = Card(
    name="DML",
    title="Deep Mutual Learning",
    authors="Zhang, Xiang, Hospedales, Lu",
    year=2018,
    venue="CVPR",
    paper="arxiv:1706.00384",
    code="github:YingZhangDUT/Deep-Mutual-Learning@34a2058",
    code_licence="MIT",
    claims="An ensemble of students that teach each other beats students distilled from a stronger static teacher.",
    reads={"student": ("logits",), "teacher": ("logits",)},
    labels=("none",),
    averages="samples",
    batch="independent",
    zero_at_teacher=True,
    golden=("classic/dml",),
)

OBJECTIVE = {
    "task": 1.0,
    "dml": {"weight": 1.0, "student": "student", "teacher": "peer"},
    "peer": {"method": "dml", "weight": 1.0, "student": "peer", "teacher": "student"},
}

Form = Literal["exact", "shifted"]
SHIFT = 1e-8  # of the released code


@full_precision
def dml(student_logits: Tensor, peer_logits: Tensor, *, form: Form = "exact") -> Tensor:
    """Return the divergence of a student from one peer.

        exact:   L = 1/B sum_b KL( softmax(z_peer) || softmax(z_own) )
        shifted: L = 1/B sum_b sum_k p_k log( p_k / (q_k + 1e-8) + 1e-8 ),  p of the peer, q of the student

    Convention:
        - KL runs from peer to student: KL(peer || student); the peer is a constant
        - no temperature; summed over classes, averaged over the batch

    Args:
        student_logits: `[B, K]`, any float dtype; compared in float32 or wider.
        peer_logits: `[B, K]`.
        form: `exact` (the paper) or `shifted` (the authors' TensorFlow code).

    Returns:
        Scalar, float32 or wider; a batch without rows gives a connected zero.

    Raises:
        UserError: if the shapes differ.

    Example:
        >>> import torch
        >>> dml(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
        tensor(0.4338)

    Reference: Zhang et al., Deep Mutual Learning, CVPR 2018.
    """
    if student_logits.shape != peer_logits.shape:
        raise UserError(
            f"dml compares logits of one shape: the student's are {list(student_logits.shape)}, "
            f"the peer's {list(peer_logits.shape)}"
        )
    if form == "exact":
        rows = kl_divergence(student_logits, peer_logits)
    else:
        own, peer = student_logits.softmax(dim=1), peer_logits.softmax(dim=1)
        rows = (peer * (peer / (own + SHIFT) + SHIFT).log()).sum(dim=1)
    return rows.sum() / max(len(student_logits), 1)


@final
class DML(Term):
    """Term form of :func:`dml`: `student` learns from the student that stands in the teacher's place.

    Args:
        form: see :func:`dml`.
    """

    def __init__(self, *, form: Form = "exact") -> None:
        super().__init__()
        if form not in ("exact", "shifted"):
            raise UserError(f"form {form!r} is not known; valid: exact, shifted")
        self.form: Form = form

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> Tensor:  # type: ignore[override]
        """Return the divergence from the peer.

        Raises:
            UserError: if the logits are not `[B, K]`.
        """
        check_logits(student.logits, teacher.logits, "dml")
        return dml(student.logits, teacher.logits, form=self.form)
