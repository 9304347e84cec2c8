# SPDX-License-Identifier: Apache-2.0
"""Match the teacher's next-token probabilities, measured against a mixture of both models.

Mixing a little of the other distribution into the reference keeps the ratio of probabilities bounded, and with
it the gradient: this is the skew divergence. The family the paper compares it with is here too, for they differ
in one word. The released code leaves the teacher's entropy in the forward divergences, which moves the value and
not the gradient, and forgets -inf logits in the reverse ones, which makes their gradient no number.
"""

from functools import partial
from typing import Literal, final, get_args

from torch import Tensor

from tutelage.core import Batch, Card, Signals, Term
from tutelage.core.error import UserError, nearest
from tutelage.functional.divergence import generalized_js, skewed_kl, skewed_reverse_kl, total_variation
from tutelage.functional.precision import full_precision
from tutelage.functional.tokens import over_tokens, token_mean

CARD = Card(
    name="DistiLLM",
    title="DistiLLM: Towards Streamlined Distillation for Large Language Models",
    authors="Ko, Kim, Chen, Yun",
    year=2024,
    venue="ICML",
    paper="arxiv:2402.03898",
    code="github:jongwooko/distillm@d47e77f",
    claims="Skew divergences distil generative language models better and faster than KL and Jensen-Shannon.",
    reads={"student": ("logits",), "teacher": ("logits",)},
    labels=("none",),
    averages="tokens",
    batch="independent",
    zero_at_teacher=True,
    golden=("classic/lm_distillm",),
)

OBJECTIVE = {"task": 1.0, "distillm": {"weight": 1.0}}

Divergence = Literal[
    "skewed_reverse_kl", "skewed_kl", "forward_kl", "reverse_kl", "symmetric_kl", "js", "total_variation"
]
Form = Literal["kl", "cross_entropy"]


@full_precision
def _rows(student: Tensor, teacher: Tensor, divergence: Divergence, skew: float, share: float, form: Form) -> Tensor:
    entropy = form == "kl"
    if divergence == "skewed_reverse_kl":
        return skewed_reverse_kl(student, teacher, skew)
    if divergence == "skewed_kl":
        return skewed_kl(student, teacher, skew, entropy=entropy)
    if divergence == "reverse_kl":
        return skewed_reverse_kl(student, teacher)
    if divergence == "js":
        return generalized_js(student, teacher, 1 - share)
    if divergence == "total_variation":
        return total_variation(student, teacher)
    forward = skewed_kl(student, teacher, entropy=entropy)
    if divergence == "forward_kl":
        return forward
    return (1 - share) * forward + share * skewed_reverse_kl(student, teacher)


def distillm(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor,
    *,
    divergence: Divergence = "skewed_reverse_kl",
    skew: float = 0.1,
    share: float = 0.9,
    form: Form = "kl",
    chunk: int | None = None,
) -> Tensor:
    """Return a divergence of the next token's probabilities, averaged over the tokens that count.

        skewed_reverse_kl:  KL( p || a p + (1 - a) q )        skewed_kl:  KL( q || a q + (1 - a) p )
        reverse_kl, forward_kl:  the same with a = 0
        symmetric_kl:  (1 - b) KL( q || p ) + b KL( p || q )
        js:  b KL( p || m ) + (1 - b) KL( q || m ),  m = b p + (1 - b) q
        total_variation:  1/2 sum |p - q|

    with p the student, q the teacher, a the skew and b the share.

    Convention:
        - summed over the vocabulary, averaged over the tokens of `mask`, of all rows together
        - no temperature; no gradient is asked of the teacher
        - a word that either model masks (minus infinity) counts nothing
        - `cross_entropy` leaves the teacher's entropy in the forward parts: same gradient, another value

    Args:
        student_logits: `[B, L, V]`, any float dtype; compared in float32 or wider.
        teacher_logits: `[B, L, V]`.
        mask: `[B, L]` bool, true where position i predicts a token that counts.
        divergence: which.
        skew: of the skewed divergences, in [0, 1).
        share: of the student in `js`, of the reverse part in `symmetric_kl`; in (0, 1).
        form: `kl` (the paper), or `cross_entropy` (the released code).
        chunk: tokens compared at a time; by default as memory allows (see `functional.tokens.over_tokens`).

    Returns:
        Scalar, float32 or wider; a connected zero if no token counts.

    Raises:
        UserError: if the shapes differ.

    Example:
        >>> import torch
        >>> given = torch.tensor([[[0.0, 1.0]]]), torch.tensor([[[0.0, 0.0]]]), torch.tensor([[True]])
        >>> distillm(*given, divergence="reverse_kl")
        tensor(0.1109)

    Reference: Ko et al., DistiLLM, ICML 2024, section 3.1.
    """
    if student_logits.shape != teacher_logits.shape:
        raise UserError(
            f"distillm compares models of one vocabulary and length: the student's logits are "
            f"{list(student_logits.shape)}, the teacher's {list(teacher_logits.shape)}"
        )
    rows = partial(_rows, divergence=divergence, skew=skew, share=share, form=form)
    return token_mean(over_tokens(rows, student_logits, teacher_logits, mask, chunk=chunk), mask)


@final
class DistiLLM(Term):
    """Term form of :func:`distillm`. Reads the logits of both models; labels do not matter."""

    def __init__(
        self,
        *,
        divergence: Divergence = "skewed_reverse_kl",
        skew: float = 0.1,
        share: float = 0.9,
        form: Form = "kl",
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        for word, given, valid in (
            ("divergence", divergence, get_args(Divergence)),
            ("form", form, get_args(Form)),
        ):
            if given not in valid:
                raise UserError(f"{word} {given!r} is not known{nearest(str(given), valid)}")
        if not 0 <= skew < 1:
            raise UserError(f"skew is a share in [0, 1), not {skew}")
        if not 0 < share < 1:
            raise UserError(f"share is a share in (0, 1), not {share}")
        if chunk is not None and chunk < 1:
            raise UserError(f"chunk counts tokens, at least 1, not {chunk}")
        self.divergence: Divergence = divergence
        self.form: Form = form
        self.skew, self.share, self.chunk = skew, share, chunk

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> Tensor:  # type: ignore[override]
        """Return the divergence of the two models' logits over the batch's tokens."""
        return distillm(
            student.logits,
            teacher.logits,
            batch.token_mask,
            divergence=self.divergence,
            skew=self.skew,
            share=self.share,
            form=self.form,
            chunk=self.chunk,
        )
