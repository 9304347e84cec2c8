# SPDX-License-Identifier: Apache-2.0
"""Match the teacher's next-token probabilities on texts of which a share the student writes itself.

The divergence is a generalised Jensen-Shannon one. Its size falls to nothing toward either end of beta, while the
ends themselves are defined as the plain divergences: a jump, as in the public code. The temperature of that code's
settings is the one of sampling; inside the loss it is 1.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import final

import torch
from torch import Tensor

from tutelage.core import Batch, Card, Draw, Feeder, Model, Signals, Teacher, Term
from tutelage.core.error import UserError
from tutelage.core.generation import network_of, write
from tutelage.functional.divergence import generalized_js, skewed_kl, skewed_reverse_kl
from tutelage.functional.precision import full_precision
from tutelage.functional.tokens import over_tokens, token_mean

CARD = Card(
    name="GKD",
    title="On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
    authors="Agarwal, Vieillard, Zhou, Stanczyk, Ramos, Geist, Bachem",
    year=2024,
    venue="ICLR",
    paper="arxiv:2306.13649",
    code="github:huggingface/trl@f2cd577",
    code_licence="Apache-2.0",
    claims="Teaching on the student's own texts removes the mismatch between training and writing.",
    reads={"student": ("logits",), "teacher": ("logits",)},
    labels=("none",),
    averages="tokens",
    batch="independent",
    zero_at_teacher=True,
    golden=("classic/gkd",),
)

OBJECTIVE = {"task": 0.0, "gkd": {"weight": 1.0}}


@full_precision
def _rows(student: Tensor, teacher: Tensor, beta: float, temperature: float) -> Tensor:
    student, teacher = student / temperature, teacher / temperature
    if beta == 0:
        return skewed_kl(student, teacher)
    if beta == 1:
        return skewed_reverse_kl(student, teacher)
    return generalized_js(student, teacher, beta)


def gkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """Return the generalised Jensen-Shannon divergence, averaged over the tokens that count.

        L = beta KL( q || m ) + (1 - beta) KL( p || m ),    m = beta q + (1 - beta) p        (eq. 1)

    with p the student and q the teacher, both softened by the temperature.

    Convention:
        - beta 0 is KL(q || p), beta 1 is KL(p || q), both unscaled; near them the size tends to 0
        - summed over the vocabulary, averaged over the tokens of `mask`, of all rows together; no T^2
        - no gradient is asked of the teacher
        - a word that either model masks (minus infinity) counts nothing

    Args:
        student_logits: `[B, L, V]`, any float dtype; compared in float32 or wider.
        teacher_logits: `[B, L, V]`.
        mask: `[B, L]` bool, true where position i predicts a token that counts.
        beta: share of the teacher in the mixture, in [0, 1].
        temperature: softening, > 0.
        chunk: tokens compared at a time; by default as memory allows (see `functional.tokens.over_tokens`).

    Returns:
        Scalar, float32 or wider; a connected zero if no token counts.

    Raises:
        UserError: if the shapes differ.

    Example:
        >>> import torch
        >>> given = torch.tensor([[[0.0, 1.0]]]), torch.tensor([[[0.0, 0.0]]]), torch.tensor([[True]])
        >>> gkd(*given, beta=1.0)
        tensor(0.1109)

    Reference: Agarwal et al., On-Policy Distillation of Language Models, ICLR 2024.
    """
    if student_logits.shape != teacher_logits.shape:
        raise UserError(
            f"gkd compares models of one vocabulary and length: the student's logits are "
            f"{list(student_logits.shape)}, the teacher's {list(teacher_logits.shape)}"
        )
    rows = partial(_rows, beta=beta, temperature=temperature)
    return token_mean(over_tokens(rows, student_logits, teacher_logits, mask, chunk=chunk), mask)


@final
class GKD(Term):
    """Term form of :func:`gkd`. Reads the logits of both models; labels do not matter."""

    def __init__(self, *, beta: float = 0.5, temperature: float = 1.0, chunk: int | None = None) -> None:
        super().__init__()
        if not 0 <= beta <= 1:
            raise UserError(f"beta is a share in [0, 1], not {beta}")
        if temperature <= 0:
            raise UserError(f"temperature must be > 0, not {temperature}")
        if chunk is not None and chunk < 1:
            raise UserError(f"chunk counts tokens, at least 1, not {chunk}")
        self.beta, self.temperature, self.chunk = beta, temperature, chunk

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> Tensor:  # type: ignore[override]
        """Return the divergence of the two models' logits over the batch's tokens."""
        return gkd(
            student.logits,
            teacher.logits,
            batch.token_mask,
            beta=self.beta,
            temperature=self.temperature,
            chunk=self.chunk,
        )


@final
class OnPolicy(Feeder):
    """Replaces a share of the batches by texts that the student has just written.

    Whether a step learns from written texts is a function of seed and step, what is written of seed, step and
    sample id.

    Args:
        share: of the steps, in [0, 1]: the paper's lambda.
        temperature: of writing, > 0.
        new_tokens: written a text, at most; by default half of a sample. The prompt is what the data names, or
            the beginning of the text.
        seq_kd: let the teacher write the texts of the other steps, in the place of the data's.

    Raises:
        UserError: if an option makes no sense.
    """

    def __init__(
        self, *, share: float = 0.5, temperature: float = 0.9, new_tokens: int | None = None, seq_kd: bool = False
    ) -> None:
        if not 0 <= share <= 1:
            raise UserError(f"share is a share in [0, 1], not {share}")
        if temperature <= 0:
            raise UserError(f"temperature must be > 0, not {temperature}")
        self.share, self.temperature, self.new_tokens, self.seq_kd = share, temperature, new_tokens, seq_kd

    def feed(
        self, batch: Batch, students: Mapping[str, Model], teachers: Mapping[str, Teacher], draw: Draw
    ) -> Iterator[Batch]:
        """Yield the batch, or the same samples gone on with by the student or the teacher."""
        own = bool(draw.uniform(torch.zeros(1, dtype=torch.long), (), salt=-1) < self.share)
        writer = next(iter(students.values())) if own else None
        if not own and self.seq_kd:
            writer = network_of(next(iter(teachers.values())))
        if writer is None:
            yield batch
        else:
            yield write(writer, batch, draw, new_tokens=self.new_tokens, temperature=self.temperature)
