# SPDX-License-Identifier: Apache-2.0
"""Learn from the teacher's largest class probabilities in half precision, as a record of a few bytes an image.

Here the teacher's answers are rounded and made whole on the fly, so that a run shows what a store of them would
give; `store`, `pack`, `unpack` and `recover` are its steps. Rounded values can sum to more than 1: the released
code then gives the other classes a negative share, the default gives them none.
"""

from typing import Literal, final

import torch
from torch import Tensor
from torch.nn import functional as F

from tutelage.core import Batch, Card, Signals, Term
from tutelage.core.error import UserError
from tutelage.core.labels import check_logits
from tutelage.functional.precision import full_precision
from tutelage.functional.top import largest, spread

CARD = Card(
    name="TinyViT",
    title="TinyViT: Fast Pretraining Distillation for Small Vision Transformers",
    authors="Wu, Zhang, Peng, Liu, Xiao, Fu, Yuan",
    year=2022,
    venue="ECCV",
    paper="arxiv:2207.10666",
    code="github:wkcn/TinyViT@0389d51",
    code_licence="MIT",
    claims="A huge teacher's sparse stored answers let small transformers profit from pretraining at scale.",
    reads={"student": ("logits",), "teacher": ("logits",)},
    labels=("none",),
    averages="samples",
    batch="independent",
    zero_at_teacher=False,
    golden=("classic/tinyvit_softlabel",),
)

OBJECTIVE = {"task": 0.0, "tinyvit": {"weight": 1.0}}

Form = Literal["clamped", "released"]
MOST = 32767  # classes that an int16 can name


@full_precision
def store(teacher_logits: Tensor, *, k: int = 100) -> tuple[Tensor, Tensor]:
    """Return what is kept of the teacher's probabilities.

    Args:
        teacher_logits: `[B, K]`, any float dtype.
        k: how many are kept; all K where there are fewer.

    Returns:
        index `[B, k]` int16 and value `[B, k]` float16, in falling order; of equal values the lower class first.

    Raises:
        UserError: if there are more classes than an int16 can name.
    """
    if teacher_logits.shape[1] > MOST:
        raise UserError(f"tinyvit stores classes as int16, up to {MOST}; the teacher has {teacher_logits.shape[1]}")
    index, value = largest(F.softmax(teacher_logits, dim=1), k)
    return index.to(torch.int16), value.to(torch.float16)


@full_precision
def recover(index: Tensor, value: Tensor, num_classes: int, *, form: Form = "clamped") -> Tensor:
    """Return the dense targets of what was kept: what is missing to 1 is shared by the other classes.

    Args:
        index: `[B, k]` classes.
        value: `[B, k]` their probabilities.
        num_classes: K.
        form: where values sum to more than 1 the others get nothing (`clamped`) or a negative share (`released`).

    Returns:
        `[B, K]`, float32, or float64 from float64 values.

    Example:
        >>> recover(torch.tensor([[2, 0]]), torch.tensor([[0.5, 0.25]]), 4)
        tensor([[0.2500, 0.1250, 0.5000, 0.1250]])
    """
    return spread(index.long(), value, num_classes, clamped=form == "clamped")


def pack(seed: Tensor, index: Tensor, value: Tensor) -> Tensor:
    """Return one record an image: the seed of its augmentation, the classes, the values; little endian.

    Args:
        seed: `[B]` int32.
        index: `[B, k]` int16.
        value: `[B, k]` float16.

    Returns:
        `[B, 4 + 4 k]` uint8, on the CPU.

    Example:
        >>> one = torch.tensor([[1]], dtype=torch.int16)
        >>> pack(torch.tensor([258], dtype=torch.int32), one, one.half())
        tensor([[ 2,  1,  0,  0,  1,  0,  0, 60]], dtype=torch.uint8)
    """
    parts = (seed[:, None].to(torch.int32), index.to(torch.int16), value.to(torch.float16))
    return torch.cat([part.cpu().contiguous().view(torch.uint8) for part in parts], dim=1)


def unpack(record: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return seed `[B]`, classes `[B, k]` and values `[B, k]` of records that `pack` made.

    Args:
        record: `[B, 4 + 4 k]` uint8.

    Raises:
        UserError: if a record has another length.
    """
    k, rest = divmod(record.shape[1] - 4, 4)
    if record.dtype != torch.uint8 or rest or k < 1:
        raise UserError(f"a record is 4 + 4 k bytes; got {record.dtype} of length {record.shape[1]}")
    middle = 4 + 2 * k
    seed, index, value = (part.contiguous() for part in (record[:, :4], record[:, 4:middle], record[:, middle:]))
    return seed.view(torch.int32)[:, 0], index.view(torch.int16), value.view(torch.float16)


@full_precision
def tinyvit(student_logits: Tensor, teacher_logits: Tensor, *, k: int = 100, form: Form = "clamped") -> Tensor:
    """Return the cross-entropy with the teacher's stored soft labels.

        L = - 1/B sum_b sum_k recover(store(t_b))_k log softmax(s_b)_k

    Convention:
        - temperature 1 on both sides
        - a cross-entropy: its floor is the entropy of the targets, not 0
        - no gradient reaches the teacher

    Args:
        student_logits: `[B, K]`, any float dtype; compared in float32 or wider.
        teacher_logits: `[B, K]`.
        k: how many classes are kept; all K where there are fewer.
        form: see :func:`recover`.

    Returns:
        Scalar, float32 or wider; a batch without rows gives a connected zero.

    Raises:
        UserError: if the shapes do not fit, or there are more classes than an int16 can name.

    Example:
        >>> tinyvit(torch.zeros(1, 4), torch.zeros(1, 4), k=2)
        tensor(1.3863)

    Reference: Wu et al., TinyViT: Fast Pretraining Distillation for Small Vision Transformers, ECCV 2022.
    """
    check_logits(student_logits, teacher_logits, "tinyvit")
    index, value = store(teacher_logits.detach(), k=k)
    target = recover(index, value.to(student_logits.dtype), student_logits.shape[1], form=form)
    log_probs = F.log_softmax(student_logits, dim=1).where(target != 0, 0.0)
    return -(target * log_probs).sum() / max(len(student_logits), 1)


@final
class TinyViT(Term):
    """Term form of :func:`tinyvit`. Reads the logits of both models; labels and their absence do not matter."""

    def __init__(self, *, k: int = 100, form: Form = "clamped") -> None:
        super().__init__()
        if k < 1:
            raise UserError(f"k is the number of classes kept, at least 1, not {k}")
        if form not in ("clamped", "released"):
            raise UserError(f"form {form!r} is not known; valid: clamped, released")
        self.k = k
        self.form: Form = form

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> Tensor:  # type: ignore[override]
        """Return the cross-entropy with the teacher's rounded answers."""
        return tinyvit(student.logits, teacher.logits, k=self.k, form=self.form)
