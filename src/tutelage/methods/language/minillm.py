# SPDX-License-Identifier: Apache-2.0
"""Match the teacher where the student itself goes: the reverse divergence of whole texts, by policy gradient.

The paper's return of a token begins with the next one, for the token's own part is in the exact single-step term.
The released code begins with the token itself, and whitens returns over padding too: form `code`. The public
library that also carries the method leaves the importance weights out; that is not offered.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal, final

import torch
from torch import Tensor
from torch.nn import functional as F

from tutelage.core import Batch, Card, Draw, Feeder, Model, Signals, Teacher, Term
from tutelage.core.error import UserError, nearest
from tutelage.core.generation import network_of, resting, write
from tutelage.functional.divergence import skewed_kl, skewed_reverse_kl
from tutelage.functional.precision import full_precision
from tutelage.functional.tokens import over_tokens, token_mean

CARD = Card(
    name="MiniLLM",
    title="MiniLLM: Knowledge Distillation of Large Language Models",
    authors="Gu, Dong, Wei, Huang",
    year=2024,
    venue="ICLR",
    paper="arxiv:2306.08543",
    code="github:microsoft/LMOps@4f2a9de",
    code_licence="MIT",
    claims="The reverse divergence, followed on the student's own texts, gives better writing than the forward one.",
    reads={"student": ("logits",), "teacher": ("logits",)},
    labels=("none",),
    averages="tokens",
    batch="coupled",
    zero_at_teacher=False,
    golden=("classic/minillm",),
)

OBJECTIVE = {"task": 0.5, "minillm": {"weight": 1.0, "kd_ratio": 0.5}}

Form = Literal["paper", "code"]
FAR = 20.0  # nats between two policies: a ratio beyond is as good as this one, and stays finite


@full_precision
def _taken_rows(logits: Tensor, taken: Tensor) -> Tensor:
    return -F.cross_entropy(logits, taken[:, 0], reduction="none")


@full_precision
def _reverse_rows(student: Tensor, teacher: Tensor) -> Tensor:
    return skewed_reverse_kl(student, teacher)


@full_precision
def _soft_rows(student: Tensor, teacher: Tensor) -> Tensor:
    return skewed_kl(student, teacher, entropy=False)


def log_probs(logits: Tensor, taken: Tensor, mask: Tensor, *, chunk: int | None = None) -> Tensor:
    """Return the log-probability of the tokens taken, 0 where they do not count.

    Args:
        logits: `[B, L, V]`.
        taken: `[B, L]` int64, the token that follows position i.
        mask: `[B, L]` bool.
        chunk: tokens at a time; by default as memory allows.

    Returns:
        `[B, L]`, in nats.
    """
    return over_tokens(_taken_rows, logits, taken[..., None], mask, chunk=chunk)


def rewards(teacher: Tensor, old: Tensor, *, scaling: float = 0.5, clip: float = 100.0) -> Tensor:
    """Return (log p - log q_old) / scaling within +-clip, from log-probabilities of the tokens taken."""
    return ((teacher - old) / scaling).clamp(-clip, clip)


def importance(teacher: Tensor, old: Tensor, share: Tensor | float = 0.2) -> Tensor:
    """Return q_old / ((1 - a) q_old + a p), the weight of a token drawn from the mixture, a the teacher's share."""
    return 1 / ((1 - share) + share * (teacher - old).clamp(max=FAR).exp())


@full_precision
def advantages(reward: Tensor, mask: Tensor, *, gamma: float = 0.95, form: Form = "paper") -> Tensor:
    """Return the whitened returns, each divided by the number of tokens it runs over.

        paper:  R_t = sum_{k > t} gamma^(k-t-1) r_k          code:  R_t = sum_{k >= t} gamma^(k-t) r_k

    Convention:
        - whitened with mean and unbiased variance over the tokens that count (`paper`), or over every position from
          the first that counts to the end of its row (`code`, padding included)

    Args:
        reward: `[B, L]`, 0 where nothing counts.
        mask: `[B, L]` bool.
        gamma: discount, in (0, 1].
        form: which.

    Returns:
        `[B, L]`, 0 outside the positions whitened over.
    """
    skip = int(form == "paper")
    place = torch.arange(reward.shape[1], device=reward.device)
    gap = place[None, :] - place[:, None] - skip  # [t, k]
    discount = (gamma ** gap.clamp(min=0).to(reward.dtype)).where(gap >= 0, 0.0)
    left = mask.to(reward.dtype) @ (gap >= 0).to(reward.dtype).T
    returns = reward @ discount.T / left.clamp(min=1)
    kept = mask if form == "paper" else mask.cumsum(1) > 0
    mean = token_mean(returns, kept)
    variance = (returns - mean).square().where(kept, 0.0).sum() / (kept.sum() - 1).clamp(min=1)
    return ((returns - mean) * torch.rsqrt(variance + 1e-8)).where(kept, 0.0)


def minillm(
    student_logits: Tensor,
    teacher_logits: Tensor,
    taken: Tensor,
    mask: Tensor,
    old_log_probs: Tensor,
    *,
    teacher_share: Tensor | float = 0.2,
    gamma: float = 0.95,
    reward_scaling: float = 0.5,
    reward_clip: float = 100.0,
    ratio_clip: float = 0.2,
    form: Form = "paper",
    chunk: int | None = None,
) -> dict[str, Tensor]:
    """Return the parts of a policy step toward the least KL(student || teacher) of whole texts.

        policy = mean max( -A rho w, -A clip(rho w, 1 - c, 1 + c) ),    rho = q / q_old        (eq. 3-7)
        single_step = mean KL( q_t || p_t )

    with q the student, p the teacher, A the advantage (see :func:`advantages`) and w the importance weight.

    Convention:
        - means over the tokens of `mask`, of all rows together
        - advantages, weights and the old probabilities are constants; no gradient is asked of the teacher
        - temperature 1; differences of log-probabilities count up to 20 nats

    Args:
        student_logits: `[B, L, V]`, any float dtype; compared in float32 or wider.
        teacher_logits: `[B, L, V]`.
        taken: `[B, L]` int64, the written token that follows position i.
        mask: `[B, L]` bool, true where position i answers for a written token.
        old_log_probs: `[B, L]` of the tokens taken, by the student that wrote them.
        teacher_share: of the mixture the tokens were drawn from; a number, or `[B]`.
        gamma: discount.
        reward_scaling: divisor of the reward.
        reward_clip: bound of the reward's size.
        ratio_clip: c.
        form: `paper`, or `code` (the released one).
        chunk: tokens compared at a time; by default as memory allows.

    Returns:
        `policy` and `single_step`, scalars; connected zeros if no token counts.

    Raises:
        UserError: if the shapes differ.

    Reference: Gu et al., MiniLLM, ICLR 2024, section 2.2.
    """
    if student_logits.shape != teacher_logits.shape:
        raise UserError(
            f"minillm compares models of one vocabulary and length: the student's logits are "
            f"{list(student_logits.shape)}, the teacher's {list(teacher_logits.shape)}"
        )
    new = log_probs(student_logits, taken, mask, chunk=chunk)
    teacher = log_probs(teacher_logits, taken, mask, chunk=chunk).detach()
    old = old_log_probs.detach().to(new.dtype).where(mask, 0.0)
    share = teacher_share[:, None].to(new.dtype) if isinstance(teacher_share, Tensor) else teacher_share
    advantage = advantages(
        rewards(teacher, old, scaling=reward_scaling, clip=reward_clip), mask, gamma=gamma, form=form
    )
    ratio = (new - old).clamp(max=FAR).exp() * importance(teacher, old, share)
    clipped = ratio.clamp(1 - ratio_clip, 1 + ratio_clip)
    exact = over_tokens(_reverse_rows, student_logits, teacher_logits, mask, chunk=chunk)
    return {
        "policy": token_mean(torch.maximum(-advantage * ratio, -advantage * clipped), mask),
        "single_step": token_mean(exact, mask),
    }


def soft_cross_entropy(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, *, chunk: int | None = None
) -> Tensor:
    """Return the cross-entropy with the teacher's probabilities, averaged over the tokens that count.

    Args:
        student_logits: `[B, L, V]`.
        teacher_logits: `[B, L, V]`.
        mask: `[B, L]` bool.
        chunk: tokens at a time; by default as memory allows.
    """
    return token_mean(over_tokens(_soft_rows, student_logits, teacher_logits, mask, chunk=chunk), mask)


@final
class MiniLLM(Term):
    """Term form of :func:`minillm`, with the teacher's part of the loss on plain text.

    The texts are written by :class:`Rollouts`, which says which rows are. Rows of plain text get `kd_ratio` times
    the cross-entropy with the teacher; the cross-entropy with the text itself is the task's loss.

    Args:
        gamma: discount.
        reward_scaling: divisor of the reward.
        reward_clip: bound of the reward's size.
        ratio_clip: of the policy's ratio around 1.
        kd_ratio: coefficient of the soft cross-entropy on plain text.
        form: `paper`, or `code` (the released one).
        chunk: tokens compared at a time; by default as memory allows.
    """

    def __init__(
        self,
        *,
        gamma: float = 0.95,
        reward_scaling: float = 0.5,
        reward_clip: float = 100.0,
        ratio_clip: float = 0.2,
        kd_ratio: float = 0.5,
        form: Form = "paper",
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        if form not in ("paper", "code"):
            raise UserError(f"form {form!r} is not known{nearest(str(form), ('paper', 'code'))}")
        if not 0 < gamma <= 1:
            raise UserError(f"gamma is a discount in (0, 1], not {gamma}")
        for word, value in (("reward_scaling", reward_scaling), ("reward_clip", reward_clip)):
            if value <= 0:
                raise UserError(f"{word} must be > 0, not {value}")
        if not 0 < ratio_clip < 1:
            raise UserError(f"ratio_clip lies in (0, 1), not {ratio_clip}")
        if kd_ratio < 0:
            raise UserError(f"kd_ratio must not be negative, as {kd_ratio} is")
        self.gamma, self.reward_scaling, self.reward_clip = gamma, reward_scaling, reward_clip
        self.ratio_clip, self.kd_ratio, self.chunk = ratio_clip, kd_ratio, chunk
        self.form: Form = form

    def forward(  # type: ignore[override]
        self, student: Signals, teacher: Signals, batch: Batch
    ) -> dict[str, Tensor]:
        """Return the policy's part and the exact one on written rows, the teacher's on the others."""
        mask, extra = batch.token_mask, batch.extra
        written = extra.get("written", torch.zeros(len(mask), dtype=torch.bool, device=mask.device))[:, None]
        nothing = torch.zeros_like(mask, dtype=torch.long)
        parts = minillm(
            student.logits,
            teacher.logits,
            extra.get("taken", nothing),
            mask & written,
            extra.get("old_log_probs", nothing),
            teacher_share=extra.get("teacher_share", 0.0),
            gamma=self.gamma,
            reward_scaling=self.reward_scaling,
            reward_clip=self.reward_clip,
            ratio_clip=self.ratio_clip,
            form=self.form,
            chunk=self.chunk,
        )
        plain = soft_cross_entropy(student.logits, teacher.logits, mask & ~written, chunk=self.chunk)
        return {**parts, "pretrain": self.kd_ratio * plain}


@final
class Rollouts(Feeder):
    """Puts texts that the student has written, with the teacher's help, before the rows of plain text.

    A set of texts is learnt from in `repeats` steps, while the rows of plain text are new at every step.

    Args:
        teacher_share: of the mixture the tokens are drawn from, in [0, 1).
        new_tokens: written a text, at most; by default half of a sample. The prompt is what the data names, or
            the beginning of the text.
        repeats: steps that learn from one set of texts.
        pretrain: keep the rows of plain text; without them give the task no weight.

    Raises:
        UserError: if an option makes no sense.
    """

    def __init__(
        self, *, teacher_share: float = 0.2, new_tokens: int | None = None, repeats: int = 4, pretrain: bool = True
    ) -> None:
        if not 0 <= teacher_share < 1:
            raise UserError(f"teacher_share is a share in [0, 1), not {teacher_share}")
        if repeats < 1:
            raise UserError(f"repeats counts steps, at least 1, not {repeats}")
        self.teacher_share, self.new_tokens = teacher_share, new_tokens
        self.repeats, self.pretrain = repeats, pretrain
        self.held: list[Batch] = []  # one for each micro-batch of a step
        self.step = self.place = -1

    def feed(
        self, batch: Batch, students: Mapping[str, Model], teachers: Mapping[str, Teacher], draw: Draw
    ) -> Iterator[Batch]:
        """Yield the written rows and the rows of the data in one batch."""
        self.place = self.place + 1 if draw.step == self.step else 0
        self.step = draw.step
        if not self.place and self.step % self.repeats == 0:
            self.held = []
        if self.place >= len(self.held):
            student, teacher = next(iter(students.values())), network_of(next(iter(teachers.values())))
            self.held.append(self._written(batch, student, teacher, draw))
        texts = self.held[self.place].to(batch.index.device)  # a checkpoint's lie on the CPU
        yield _joined(texts, batch) if self.pretrain else texts

    def _written(self, batch: Batch, student: Model, teacher: Model, draw: Draw) -> Batch:
        texts = write(student, batch, draw, new_tokens=self.new_tokens, other=teacher, other_share=self.teacher_share)
        with resting(student.module):
            logits = student(texts.inputs)
        mask = texts.token_mask
        more = {
            "old_log_probs": log_probs(getattr(logits, "logits", logits), texts.extra["taken"], mask),
            "written": torch.ones_like(mask[:, 0]),
            "teacher_share": torch.full((len(mask),), self.teacher_share, device=mask.device),
        }
        return replace(texts, extra={**texts.extra, **more})

    def state(self) -> dict[str, Tensor]:
        """Return the texts that are still to be learnt from."""
        found: dict[str, Tensor] = {}
        for number, batch in enumerate(self.held):
            rows = {"target": batch.target, "labelled": batch.labelled, "index": batch.index, "view": batch.view}
            named = {**rows, **batch.inputs, **batch.extra}
            found |= {f"{number}.{name}": tensor for name, tensor in named.items()}
        return found

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take up the texts of a checkpoint."""
        rows: dict[int, dict[str, Any]] = {}
        for key, tensor in state.items():
            number, _, name = key.partition(".")
            rows.setdefault(int(number), {})[name] = tensor
        self.held = [_batch(rows[number]) for number in sorted(rows)]


def _batch(named: dict[str, Tensor]) -> Batch:
    inputs = {name: named.pop(name) for name in ("input_ids", "attention_mask")}
    target, labelled, index, view = (named.pop(name) for name in ("target", "labelled", "index", "view"))
    return Batch(inputs, target, labelled, index, view, extra=named)


def _joined(texts: Batch, plain: Batch) -> Batch:
    """Return written rows and rows of plain text as one batch; what only one of both knows is 0 in the other."""

    def both(one: Tensor, other: Tensor) -> Tensor:
        return torch.cat([one, other])

    extra = {
        name: both(tensor, plain.extra.get(name, tensor.new_zeros((len(plain), *tensor.shape[1:]))))
        for name, tensor in texts.extra.items()
    }
    return replace(
        plain,
        inputs={name: both(texts.inputs[name], tensor) for name, tensor in plain.inputs.items()},
        target=both(texts.target, plain.target),
        labelled=both(texts.labelled, plain.labelled),
        index=both(texts.index, plain.index),
        view=both(texts.view, plain.view),
        views={},
        extra=extra,
    )
