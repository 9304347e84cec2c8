# SPDX-License-Identifier: Apache-2.0
"""Give every sample's logits mean 0 and deviation 1 before another method compares them.

What is left to match is the shape of the logits, not their size, as if each sample of each model had a
temperature of its own. The text divides the variance by the number of classes, the released code by one less.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, final

from torch import Tensor

from tutelage.core import Batch, Card, Draw, Facts, Outcome, Reads, Signals, Term
from tutelage.core.error import UserError
from tutelage.functional.precision import full_precision
from tutelage.functional.zscore import zscore

CARD = Card(
    name="Logit Standardization",
    title="Logit Standardization in Knowledge Distillation",
    authors="Sun, Ren, Li, Wang, Cao",
    year=2024,
    venue="CVPR",
    paper="arxiv:2403.01427",
    code="github:sunshangquan/logit-standardization-KD@f6e5aa5",
    claims="Standardised logits free the student from the teacher's magnitude and lift KD, CTKD, DKD and MLKD.",
    reads={"student": ("logits",), "teacher": ("logits",)},
    labels=("none",),
    averages="samples",
    batch="independent",
    zero_at_teacher=True,
    golden=("classic/logit_std",),
)

OBJECTIVE = {"task": 0.1, "logit_std": {"weight": 9.0, "inner": {"method": "kd", "temperature": 2.0}}}

Form = Literal["sample", "population"]


@full_precision
def logit_std(logits: Tensor, *, form: Form = "sample", eps: float = 1e-7) -> Tensor:
    """Return the logits of each row in units of their own deviation.

        Z(v) = (v - mean_k v_k) / (std_k v_k + eps)

    Convention:
        - mean and deviation over the classes of one sample; gradients flow through both
        - logits that are constant up to rounding become 0, without a slope
        - with a temperature T after it, the sample's own temperature is T times its deviation

    Args:
        logits: `[B, K]`, any float dtype; computed in float32 or wider.
        form: `sample` divides the variance by K - 1 (the released code), `population` by K (the text): the
            values differ by a factor sqrt(K / (K - 1)).
        eps: added to the deviation.

    Returns:
        `[B, K]`, float32 or wider.

    Raises:
        UserError: if there is no class to compare with another.

    Example:
        >>> import torch
        >>> logit_std(torch.tensor([[1.0, 2.0, 3.0]]))
        tensor([[-1.0000,  0.0000,  1.0000]])

    Reference: Sun et al., Logit Standardization in Knowledge Distillation, CVPR 2024.
    """
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise UserError(f"logit_std takes logits [B, K] of two classes or more, not {list(logits.shape)}")
    return zscore(logits, dim=1, correction=1 if form == "sample" else 0, eps=eps)


@final
class LogitStd(Term):
    """Another term, on standardised logits: see :func:`logit_std`.

    The logits of both models and of every view that the term reads are standardised; whatever else it reads
    stays as it is. Labels, means and memory are the term's own.

    Args:
        inner: the term: KD, DKD, CTKD, ... in a recipe `{method: kd, temperature: 2}`.
        form: see :func:`logit_std`.
    """

    def __init__(self, *, inner: Term, form: Form = "sample") -> None:
        super().__init__()
        if form not in ("sample", "population"):
            raise UserError(f"form {form!r} is not known; valid: population, sample")
        taps = (*inner.reads.student, *inner.reads.teacher)
        if not any(tap.where == "logits" for tap in taps):
            raise UserError(f"logit_std standardises logits, and {type(inner).__name__} reads none")
        self.inner = inner
        self.form: Form = form

    @property
    def card(self) -> Card:
        """This paper's card, with what the inner term says of labels, means and batches."""
        own = self.inner.card
        if own is None:
            return CARD
        return replace(
            CARD,
            labels=own.labels,
            averages=own.averages,
            batch=own.batch,
            zero_at_teacher=own.zero_at_teacher,
            adversarial=own.adversarial,
        )

    @property
    def reads(self) -> Reads:
        """What the inner term reads."""
        return self.inner.reads

    def build(self, student: Signals, teacher: Signals | None, facts: Facts) -> None:
        """Build the inner term from standardised signals."""
        self.inner.build(self._standardised(student), self._standardised(teacher) if teacher else None, facts)

    def draw(self, student: Signals, teacher: Signals | None, batch: Batch, draw: Draw) -> Any:
        """Return the inner term's random numbers."""
        return self.inner.draw(student, teacher, batch, draw)

    def forward(
        self, student: Signals, teacher: Signals | None, batch: Batch, *draws: Any
    ) -> Tensor | Mapping[str, Tensor] | Outcome:
        """Return what the inner term says of standardised signals."""
        found: Tensor | Mapping[str, Tensor] | Outcome = self.inner(
            self._standardised(student), self._standardised(teacher) if teacher else None, batch, *draws
        )
        return found

    def caveats(self, facts: Facts) -> tuple[str, ...]:
        """Return those of the inner term."""
        return self.inner.caveats(facts)

    def commit(self, kept: Mapping[str, Tensor]) -> None:
        """Let the inner term remember."""
        self.inner.commit(kept)

    def param_groups(self) -> list[dict[str, Any]]:
        """Return the inner term's parameters."""
        return self.inner.param_groups()

    def _standardised(self, signals: Signals) -> Signals:
        taps = {
            name: logit_std(tensor, form=self.form) if name.partition("@")[0] == "logits" else tensor
            for name, tensor in signals.taps.items()
        }
        return replace(signals, taps=taps)
