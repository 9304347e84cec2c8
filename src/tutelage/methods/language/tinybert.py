# SPDX-License-Identifier: Apache-2.0
"""Match the teacher layer by layer: attention before its softmax, hidden states, and the embeddings below them.

The released code takes means over padding too: masked scores are set to 0 in both models and still divide, and the
hidden states of padding are compared. Here padding counts nothing; without padding the numbers are the same.
"""

from collections.abc import Sequence
from typing import Literal, final, get_args

import torch
from torch import Tensor, nn

from tutelage.core import Batch, Card, Facts, Reads, Signals, Tap, Term
from tutelage.core.error import UserError, nearest
from tutelage.core.tap import expand
from tutelage.functional.attention import blanked, head_scores, mean_of_each, pairs_of
from tutelage.functional.divergence import skewed_kl
from tutelage.functional.precision import full_precision
from tutelage.functional.tokens import over_tokens

CARD = Card(
    name="TinyBERT",
    title="TinyBERT: Distilling BERT for Natural Language Understanding",
    authors="Jiao, Yin, Shang, Jiang, Chen, Li, Wang, Liu",
    year=2020,
    venue="Findings of EMNLP",
    paper="arxiv:1909.10351",
    code="github:huawei-noah/Pretrained-Language-Model@0598f02",
    claims="Matching attention and hidden states of every layer keeps most of a large encoder in a small one.",
    reads={"student": ("hidden[*]", "q[*]", "k[*]"), "teacher": ("hidden[*]", "q[*]", "k[*]")},
    labels=("none",),
    averages="samples",
    batch="independent",
    zero_at_teacher=False,
    golden=("classic/tinybert",),
)

OBJECTIVE = {"task": 0.0, "tinybert": {"weight": 1.0, "heads": 12}}

Stage = Literal["layers", "prediction"]
ROLES = ("hidden[*]", "q[*]", "k[*]")
SPREAD = 0.02  # of the first weights of the layer between the widths


def _step(student: int, teacher: int) -> int:
    """Return how many layers of the teacher one of the student stands for."""
    if not student or teacher % student:
        raise UserError(
            f"tinybert compares every k-th layer: the teacher's {teacher} are no multiple of the student's {student}"
        )
    return teacher // student


def _mean(rows: Tensor) -> Tensor:
    return rows.sum() / max(len(rows), 1)


@full_precision
def attention_distance(
    student_scores: Tensor, teacher_scores: Tensor, mask: Tensor | None = None, threshold: float | None = None
) -> Tensor:
    """Return the mean squared difference of attention scores of each text.

    Args:
        student_scores: `[B, A, L, L]` before the softmax.
        teacher_scores: `[B, A, L, L]`.
        mask: `[B, L]` bool; pairs with a token that does not count are left out. None: every pair counts.
        threshold: scores up to it are masked, and become 0 in both; None for scores without a mask in them.

    Returns:
        `[B]`, each a mean over heads and pairs.
    """
    if threshold is not None:
        student_scores, teacher_scores = (
            scores.where(scores > threshold, 0.0) for scores in (student_scores, teacher_scores)
        )
    squares = (student_scores - teacher_scores).square()
    return squares.flatten(1).mean(1) if mask is None else mean_of_each(squares, pairs_of(mask)[:, None])


@full_precision
def hidden_distance(fitted: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean squared difference of hidden states of each text.

    Args:
        fitted: `[B, L, D]`, the student's, brought to the teacher's width.
        teacher: `[B, L, D]`.
        mask: `[B, L]` bool, the tokens that count; None for all.

    Returns:
        `[B]`, each a mean over tokens and width.
    """
    if mask is None:
        return (fitted - teacher).square().flatten(1).mean(1)
    squares = (blanked(fitted, mask) - blanked(teacher, mask)).square()
    return mean_of_each(squares, mask[:, :, None])


def tinybert(
    student_scores: Sequence[Tensor],
    teacher_scores: Sequence[Tensor],
    fitted: Sequence[Tensor],
    teacher_hidden: Sequence[Tensor],
    mask: Tensor | None = None,
    *,
    threshold: float | None = None,
) -> dict[str, Tensor]:
    """Return the distances of attention and of hidden states, each summed over the student's layers.

        L_attn = sum_{m=1..M} mse( A_S,m, A_T,mk )        L_hidn = sum_{m=0..M} mse( H_S,m W, H_T,mk )        (eq. 5-10)

    with k = N / M layers of the teacher for one of the student, and m = 0 the embeddings.

    Convention:
        - scores are those before the softmax; entries are averaged, texts are averaged, layers are summed
        - pairs and tokens that do not count are left out; no gradient is asked of the teacher

    Args:
        student_scores: M of `[B, A, L, L]`.
        teacher_scores: N of `[B, A, L, L]`.
        fitted: M + 1 of `[B, L, D]`, the student's hidden states at the teacher's width, embeddings first.
        teacher_hidden: N + 1 of `[B, L, D]`.
        mask: `[B, L]` bool, true where a token is no padding; None if there is none.
        threshold: scores up to it are masked, and become 0 in both (released code: -100).

    Returns:
        `attention` and `hidden`, scalars.

    Raises:
        UserError: if the teacher's layers are no multiple of the student's, or the heads differ.

    Reference: Jiao et al., TinyBERT, Findings of EMNLP 2020, section 3.
    """
    step = _step(len(student_scores), len(teacher_scores))
    attention = []
    for m, scores in enumerate(student_scores):
        goal = teacher_scores[(m + 1) * step - 1]
        if goal.shape[1] != scores.shape[1]:
            raise UserError(f"tinybert: the student has {scores.shape[1]} heads, the teacher {goal.shape[1]}")
        attention.append(_mean(attention_distance(scores, goal, mask, threshold)))
    hidden = [_mean(hidden_distance(state, teacher_hidden[m * step], mask)) for m, state in enumerate(fitted)]
    return {"attention": torch.stack(attention).sum(), "hidden": torch.stack(hidden).sum()}


@full_precision
def _soft_rows(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    return skewed_kl(student / temperature, teacher / temperature, entropy=False) / student.shape[-1]


def prediction_distance(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None = None, *, temperature: float = 1.0
) -> Tensor:
    """Return the soft cross-entropy of the last stage, averaged over classes, over tokens, and over texts.

        L_pred = - 1 / (B C) sum softmax(t / T) log softmax(s / T)        (eq. 10; the released mean)

    Convention: no T^2.

    Args:
        student_logits: `[B, C]`, or `[B, L, C]` with a mask.
        teacher_logits: of the same shape.
        mask: `[B, L]` bool, the tokens that count.
        temperature: softening, > 0.
    """
    if student_logits.shape != teacher_logits.shape:
        raise UserError(
            f"tinybert compares logits of one shape: the student's are {list(student_logits.shape)}, "
            f"the teacher's {list(teacher_logits.shape)}"
        )
    every = torch.ones(student_logits.shape[:-1], dtype=torch.bool, device=student_logits.device)
    kept = every if mask is None else mask

    def rows(student: Tensor, teacher: Tensor) -> Tensor:
        return _soft_rows(student, teacher, temperature)

    found = over_tokens(rows, student_logits, teacher_logits, kept)
    return _mean(mean_of_each(found, kept) if kept.ndim > 1 else found)


@final
class TinyBERT(Term):
    """Term form of :func:`tinybert`, with one linear layer between the widths; or its last stage.

    Args:
        heads: of the attention, in both models.
        stage: `layers` matches attention and hidden states (general distillation, and the first part of a
            task's), `prediction` the answers (the last part).
        temperature: of the answers.
    """

    def __init__(self, *, heads: int = 12, stage: Stage = "layers", temperature: float = 1.0) -> None:
        super().__init__()
        if heads < 1:
            raise UserError(f"heads counts heads, at least 1, not {heads}")
        if stage not in get_args(Stage):
            raise UserError(f"stage {stage!r} is not known{nearest(str(stage), get_args(Stage))}")
        if temperature <= 0:
            raise UserError(f"temperature must be > 0, not {temperature}")
        self.heads, self.temperature = heads, temperature
        self.stage: Stage = stage

    @property
    def reads(self) -> Reads:
        """All layers, or the answers."""
        taps = tuple(Tap(role) for role in (("logits",) if self.stage == "prediction" else ROLES))
        return Reads(taps, taps)

    def build(self, student: Signals, teacher: Signals | None, facts: Facts) -> None:
        """Create the layer between the widths.

        Raises:
            UserError: if layers or heads do not fit.
        """
        if self.stage == "prediction":
            return
        assert teacher is not None
        self.names, self.goals = ([expand(role, side.taps) for role in ROLES] for side in (student, teacher))
        one, queries, keys = ([student[name] for name in names] for names in self.names)
        other, asked, held = ([teacher[name] for name in names] for names in self.goals)
        _step(len(queries), len(asked))
        for whose, vectors in (("student", (*queries, *keys)), ("teacher", (*asked, *held))):
            for vector in vectors:
                if vector.shape[-1] % self.heads or vector.shape[-1] != vectors[0].shape[-1]:
                    raise UserError(
                        f"tinybert: the {whose}'s queries and keys, {vector.shape[-1]} wide, have no {self.heads} "
                        "heads: set heads to the number both models have"
                    )
        self.fit = nn.Linear(one[0].shape[-1], other[0].shape[-1])
        nn.init.normal_(self.fit.weight, std=SPREAD)
        nn.init.zeros_(self.fit.bias)

    def forward(  # type: ignore[override]
        self, student: Signals, teacher: Signals, batch: Batch
    ) -> Tensor | dict[str, Tensor]:
        """Return the distances of this stage."""
        if self.stage == "prediction":
            mask = batch.attention_mask if student.logits.ndim == 3 else None
            return prediction_distance(student.logits, teacher.logits, mask, temperature=self.temperature)
        mask = batch.attention_mask
        hidden, *attended = ([student[name] for name in names] for names in self.names)
        goal, *looked = ([teacher[name] for name in names] for names in self.goals)
        scores, goals = (
            [_scores(blanked(q, mask), blanked(k, mask), self.heads) for q, k in zip(*side, strict=True)]
            for side in (attended, looked)
        )
        fitted = [self.fit(blanked(state, mask)) for state in hidden]
        return tinybert(scores, goals, fitted, goal, mask)


@full_precision
def _scores(queries: Tensor, keys: Tensor, heads: int) -> Tensor:
    return head_scores(queries, keys, heads)
