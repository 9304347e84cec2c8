# SPDX-License-Identifier: Apache-2.0
"""Give every sample's logits mean 0 and deviation 1 before another method compares them.

What is left to match is the shape of the logits, not their size, as if each sample of each model had a
temperature of its own. The text divides the variance by the number of classes, the released code by one less.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, final

from torch import Tensor

from tutelage.core import Batch, Card, Facts, Outcome, Signals, Term
from tutelage.core.around import Around
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
class LogitStd(Around):
    """Another term, on standardised logits: see :func:`logit_std`.

    The logits of both models and of every view that the term reads are standardised; whatever else it reads
    stays as it is. Labels, means and memory are the term's own.

    Args:
        inner: the term: KD, DKD, CTKD, ... in a recipe `{method: kd, temperature: 2}`.
        form: see :func:`logit_std`.
    """

    def __init__(self, *, inner: Term, form: Form = "sample") -> None:
        super().__init__(inner)
        if form not in ("sample", "population"):
            raise UserError(f"form {form!r} is not known; valid: population, sample")
        taps = (*inner.reads.student, *inner.reads.teacher)
        if not any(tap.where == "logits" for tap in taps):
            raise UserError(f"logit_std standardises logits, and {type(inner).__name__} reads none")
        self.form: Form = form

    def build(self, student: Signals, teacher: Signals | None, facts: Facts) -> None:
        """Build the inner term from standardised signals."""
        super().build(self._standardised(student), self._standardised(teacher) if teacher else None, facts)

    def forward(
        self, student: Signals, teacher: Signals | None, batch: Batch, *draws: Any
    ) -> Tensor | Mapping[str, Tensor] | Outcome:
        """Return what the inner term says of standardised signals."""
        other = self._standardised(teacher) if teacher else None
        return super().forward(self._standardised(student), other, batch, *draws)

    def _standardised(self, signals: Signals) -> Signals:
        taps = {
            name: logit_std(tensor, form=self.form) if name.partition("@")[0] == "logits" else tensor
            for name, tensor in signals.taps.items()
        }
        return replace(signals, taps=taps)
