# SPDX-License-Identifier: Apache-2.0
"""Match how the tokens of a text relate to each other in one layer: products of queries, of keys and of values.

Relations are of the size of the text, so that student and teacher may differ in width and number of heads: their
vectors are cut into equally many relation heads. The first paper relates queries to keys, as attention does, and
values to values, over the attention's own heads: form `attention`.
"""

from collections.abc import Mapping
from typing import Literal, final, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from tutelage.core import Batch, Card, Facts, Reads, Signals, Tap, Term
from tutelage.core.error import UserError, nearest
from tutelage.functional.attention import blanked, head_scores, pairs_of
from tutelage.functional.precision import full_precision

CARD = Card(
    name="MiniLM",
    title="MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing Pretrained Transformers",
    authors="Wang, Bao, Huang, Dong, Wei",
    year=2021,
    venue="Findings of ACL",
    paper="arxiv:2012.15828",
    code="github:bloomberg/minilmv2.bb@0d78e20",
    claims="Relations of one layer's queries, keys and values distil a smaller encoder of any width and head count.",
    reads={"student": ("q[-1]", "k[-1]", "v[-1]"), "teacher": ("q[-1]", "k[-1]", "v[-1]")},
    labels=("none",),
    averages="samples",
    batch="independent",
    zero_at_teacher=True,
    golden=("classic/minilm",),
)

OBJECTIVE = {"task": 0.0, "minilm": {"weight": 1.0, "relation_heads": 48}}

Form = Literal["self", "attention"]
RELATIONS: dict[Form, dict[str, float]] = {
    "self": {"q,q": 1 / 3, "k,k": 1 / 3, "v,v": 1 / 3},
    "attention": {"q,k": 1.0, "v,v": 1.0},
}


@full_precision
def _relation(left: Tensor, right: Tensor, mask: Tensor, heads: int) -> Tensor:
    """Return the log-probabilities `[B, A, L, L]` of a relation among the tokens that count."""
    scores = head_scores(blanked(left, mask), blanked(right, mask), heads)
    # not minus infinity: a text without a token has no softmax
    return F.log_softmax(scores.masked_fill(~mask[:, None, None, :], torch.finfo(scores.dtype).min), dim=-1)


def minilm(
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    mask: Tensor,
    *,
    relation_heads: int = 48,
    relations: Mapping[str, float] = RELATIONS["self"],
) -> Tensor:
    """Return the divergence of the two models' relations between tokens.

        L = sum_{m,n} weight_mn / B sum_b 1 / (A len_b) sum_{heads, i} KL( R_T(m,n)_i || R_S(m,n)_i )
        R(m,n)_i = softmax_j( m_i . n_j / sqrt(D / A) )                                            (eq. 3-6)

    Convention:
        - KL runs from teacher to student: KL(teacher || student); no gradient is asked of the teacher
        - averaged over heads and over the tokens of each text, then over texts
        - i and j run over the tokens that count; what stands in the others reaches neither value nor gradient

    Args:
        student: `q`, `k` and `v`, those that are related, `[B, L, D]` each, of one layer.
        teacher: the same, of any width.
        mask: `[B, L]` bool, true where a token is no padding.
        relation_heads: A; both widths are cut into so many.
        relations: weights by pair, such as `q,k`.

    Returns:
        Scalar, float32 or wider.

    Raises:
        UserError: if a width cannot be cut into so many heads, or two sides of a relation differ in width.

    Example:
        >>> given = {"v": torch.eye(2)[None]}
        >>> minilm(given, given, torch.ones(1, 2, dtype=torch.bool), relation_heads=1, relations={"v,v": 1.0})
        tensor(0.)

    Reference: Wang et al., MiniLMv2, Findings of ACL 2021; form `attention`: Wang et al., MiniLM, NeurIPS 2020.
    """
    lengths = mask.sum(1).clamp(min=1)
    pairs = pairs_of(mask)[:, None]
    losses = []
    for pair, weight in relations.items():
        left, right = pair.split(",")
        for whose, side in (("student", student), ("teacher", teacher)):
            _check(whose, pair, side[left], side[right], relation_heads)
        log_s = _relation(student[left], student[right], mask, relation_heads)
        log_t = _relation(teacher[left], teacher[right], mask, relation_heads)
        rows = (log_t.exp() * (log_t - log_s).where(pairs, 0.0)).where(pairs, 0.0).flatten(1).sum(1)
        losses.append(weight * (rows / (relation_heads * lengths)).sum() / max(len(mask), 1))
    return torch.stack(losses).sum()


def _check(whose: str, pair: str, left: Tensor, right: Tensor, heads: int) -> None:
    if left.shape[-1] != right.shape[-1]:
        raise UserError(
            f"minilm: the {whose}'s {pair} are {left.shape[-1]} and {right.shape[-1]} wide (grouped heads); relate "
            "only equals: form: self"
        )
    if left.shape[-1] % heads:
        raise UserError(
            f"minilm: the {whose}'s {pair.partition(',')[0]}, {left.shape[-1]} wide, has no {heads} equal parts: "
            "give relation_heads a divisor of both widths"
        )


@final
class MiniLM(Term):
    """Term form of :func:`minilm`: one layer of each model, by default the last.

    Args:
        relation_heads: into which the vectors are cut; 48 for base models, 64 for large ones, or the attention's
            own heads in the form `attention`.
        form: `self` relates queries to queries, keys to keys and values to values, a third each; `attention`
            relates queries to keys and values to values.
        student_layer: counted from 0, or from the end.
        teacher_layer: the last for base models; 21 of 24 for large ones.
    """

    def __init__(
        self,
        *,
        relation_heads: int = 48,
        form: Form = "self",
        student_layer: int = -1,
        teacher_layer: int = -1,
    ) -> None:
        super().__init__()
        if form not in get_args(Form):
            raise UserError(f"form {form!r} is not known{nearest(str(form), get_args(Form))}")
        if relation_heads < 1:
            raise UserError(f"relation_heads counts heads, at least 1, not {relation_heads}")
        self.relation_heads, self.relations = relation_heads, RELATIONS[form]
        self.student_layer, self.teacher_layer = student_layer, teacher_layer
        self.kinds = tuple(dict.fromkeys(kind for pair in self.relations for kind in pair.split(",")))

    @property
    def reads(self) -> Reads:
        """The vectors that are related, of one layer of each model."""
        sides = ((self.student_layer, self.kinds), (self.teacher_layer, self.kinds))
        student, teacher = (tuple(Tap(f"{kind}[{layer}]") for kind in kinds) for layer, kinds in sides)
        return Reads(student, teacher)

    def build(self, student: Signals, teacher: Signals | None, facts: Facts) -> None:
        """Refuse vectors that are no text's.

        Raises:
            UserError: naming the shape.
        """
        for kind in self.kinds:
            shape = student[f"{kind}[{self.student_layer}]"].shape
            if len(shape) != 3:
                raise UserError(f"minilm relates vectors of tokens [B, L, D], not {list(shape)}")

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> Tensor:  # type: ignore[override]
        """Return the divergence of the two layers' relations."""
        one, other = (
            {kind: signals[f"{kind}[{layer}]"] for kind in self.kinds}
            for signals, layer in ((student, self.student_layer), (teacher, self.teacher_layer))
        )
        return minilm(one, other, batch.attention_mask, relation_heads=self.relation_heads, relations=self.relations)
