# SPDX-License-Identifier: Apache-2.0
"""Learn the temperature of another term against the student: it rises or falls to make the task harder.

The temperature climbs the loss while the student descends it, gently at first: its gradient is reversed and
multiplied by a strength that grows over the first epochs. The released code learns one temperature for all
samples; the network behind the paper's temperature for each sample is not part of it, only its loss.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from tutelage.core import Batch, Card, Draw, Facts, Outcome, Signals, Term
from tutelage.core.around import Around
from tutelage.core.error import UserError
from tutelage.core.labels import check_logits
from tutelage.functional.divergence import kl_divergence
from tutelage.functional.precision import full_precision

CARD = Card(
    name="CTKD",
    title="Curriculum Temperature for Knowledge Distillation",
    authors="Li, Li, Yang, Zhao, Song, Luo, Li, Yang",
    year=2023,
    venue="AAAI",
    paper="arxiv:2211.16231",
    code="github:zhengli97/CTKD@7d52522",
    code_licence="Apache-2.0",
    claims="A temperature learned adversarially, from easy to hard, improves KD and its kin at no cost.",
    reads={"student": ("logits",), "teacher": ("logits",)},
    labels=("none",),
    averages="samples",
    batch="independent",
    zero_at_teacher=True,
    adversarial=True,
    golden=("classic/ctkd",),
)

OBJECTIVE = {"task": 0.1, "ctkd": {"weight": 0.9}}

Form = Literal["global", "instance"]
Ramp = Literal["cosine", "linear"]


@full_precision
def ctkd(raw: Tensor, strength: float | Tensor = 1.0, *, start: float = 1.0, span: float = 20.0) -> Tensor:
    """Return a temperature whose gradient is reversed.

        T = start + span * sigmoid(raw),        dL/draw = - strength * dL/dT * dT/draw

    Args:
        raw: what is learned; any shape.
        strength: of the reversal: 0 lets nothing through, 1 turns the gradient round.
        start: lower end of the temperature.
        span: from there to the upper end.

    Returns:
        The temperature, float32 or wider, of the shape of `raw`.

    Example:
        >>> raw = torch.zeros((), requires_grad=True)
        >>> ctkd(raw, 0.5), torch.autograd.grad(ctkd(raw, 0.5), raw)
        (tensor(11., grad_fn=<AddBackward0>), (tensor(-2.5000),))

    Reference: Li et al., Curriculum Temperature for Knowledge Distillation, AAAI 2023.
    """
    fixed = raw.detach()
    return start + span * torch.sigmoid(fixed - strength * (raw - fixed))


def strength(epoch: int, *, ramp_epochs: int = 10, ramp: Ramp = "cosine") -> float:
    """Return how much of the gradient is reversed in an epoch.

        cosine: 1/2 (1 - cos(pi e / E)),    linear: e / E;    1 from epoch E on

    Args:
        epoch: e, counted from 1.
        ramp_epochs: E.
        ramp: how it grows.

    Example:
        >>> [round(strength(epoch), 3) for epoch in (1, 5, 12)]
        [0.024, 0.5, 1.0]
    """
    if epoch >= ramp_epochs:
        return 1.0
    return epoch / ramp_epochs if ramp == "linear" else (1 - math.cos(math.pi * epoch / ramp_epochs)) / 2


@full_precision
def kd_at(student_logits: Tensor, teacher_logits: Tensor, temperature: Tensor) -> Tensor:
    """Return KD at one temperature for all samples.

        L = T^2 / B * sum_b KL( softmax(t_b / T) || softmax(s_b / T) ),     differentiable in T

    Args:
        student_logits: `[B, K]`.
        teacher_logits: `[B, K]`.
        temperature: T, 0-d.
    """
    rows = kl_divergence(student_logits / temperature, teacher_logits / temperature)
    return temperature**2 * rows.sum() / max(len(student_logits), 1)


@full_precision
def kd_each(student_logits: Tensor, teacher_logits: Tensor, temperature: Tensor, *, eps: float = 1e-7) -> Tensor:
    """Return KD at a temperature for each sample, as the authors publish it.

        L = 1/B sum_b T_b^2 sum_k (q_k + eps) ( log(q_k + eps) - log softmax(s_b / T_b)_k ),
        q = softmax(t_b / T_b)

    Args:
        student_logits: `[B, K]`.
        teacher_logits: `[B, K]`.
        temperature: T, `[B]`.
        eps: added to the teacher's probabilities.
    """
    log_p = F.log_softmax(student_logits / temperature[:, None], dim=1)
    q = F.softmax(teacher_logits / temperature[:, None], dim=1) + eps
    rows = (q * (q.log() - log_p)).sum(dim=1)
    return (temperature**2 * rows).sum() / max(len(student_logits), 1)


@final
class CTKD(Around):
    """KD or another term at a learned temperature, which climbs the loss: see :func:`ctkd`.

    Args:
        inner: a term with a `temperature`, in whose place the learned one is put; None is KD. In a recipe
            `{method: dkd, beta: 8}`.
        form: `global` learns one number; `instance` a network of two layers on both models' logits, which gives
            each sample a temperature; it takes no `inner`.
        start: see :func:`ctkd`.
        span: see :func:`ctkd`.
        ramp_epochs: see :func:`strength`.
        ramp: see :func:`strength`.
    """

    def __init__(
        self,
        *,
        inner: Term | None = None,
        form: Form = "global",
        start: float = 1.0,
        span: float = 20.0,
        ramp_epochs: int = 10,
        ramp: Ramp = "cosine",
    ) -> None:
        super().__init__(inner)
        for word, given, valid in (("form", form, ("global", "instance")), ("ramp", ramp, ("cosine", "linear"))):
            if given not in valid:
                raise UserError(f"{word} {given!r} is not known; valid: {', '.join(valid)}")
        if start <= 0 or span < 0:
            raise UserError(f"start must be > 0 and span >= 0, not {start} and {span}")
        if inner is not None and form == "instance":
            raise UserError("form instance has a loss of its own, KD at a temperature for each sample: leave inner out")
        self.form: Form = form
        self.ramp: Ramp = ramp
        self.start, self.span, self.ramp_epochs = start, span, ramp_epochs
        if inner is not None:
            self._take_over(inner)

    @staticmethod
    def _take_over(inner: Term) -> None:
        """Make the temperature of a term a buffer, in whose place a forward can put another."""
        given = getattr(inner, "temperature", None)
        if isinstance(given, bool) or not isinstance(given, (int, float)):
            raise UserError(f"ctkd learns a temperature, and {type(inner).__name__} has none; wrap kd, dkd, ...")
        del inner.temperature
        inner.register_buffer("temperature", torch.tensor(float(given)), persistent=False)

    @property
    def card(self) -> Card:
        """This paper's card, with what the inner term says of labels, means and batches."""
        own = super().card
        assert own is not None
        return own if self.inner is not None else replace(own, zero_at_teacher=self.form == "global")

    def build(self, student: Signals, teacher: Signals | None, facts: Facts) -> None:
        """Create the number or the network that gives the temperature, and build the inner term.

        Raises:
            UserError: if the logits of the two models differ in shape.
        """
        self.steps_per_epoch = facts.steps_per_epoch
        super().build(student, teacher, facts)
        if self.inner is None and teacher is not None and student.logits.shape != teacher.logits.shape:
            raise UserError(
                f"ctkd compares logits of one shape: the student's are {list(student.logits.shape)}, "
                f"the teacher's {list(teacher.logits.shape)}"
            )
        if self.form == "global":
            self.raw = nn.Parameter(torch.ones(1))
        else:
            classes = student.logits.shape[1]
            last = nn.Linear(classes, 1)
            nn.init.ones_(last.bias)  # begins about where the one number begins
            self.network = nn.Sequential(nn.Linear(2 * classes, classes), nn.ReLU(), last)

    def draw(self, student: Signals, teacher: Signals | None, batch: Batch, draw: Draw) -> tuple[Tensor, Any]:
        """Return the strength of the reversal at this step, and the inner term's random numbers."""
        now = strength(1 + draw.step // self.steps_per_epoch, ramp_epochs=self.ramp_epochs, ramp=self.ramp)
        return torch.full((), now, device=batch.index.device), super().draw(student, teacher, batch, draw)

    def forward(  # type: ignore[override]
        self, student: Signals, teacher: Signals, batch: Batch, draws: tuple[Tensor, Any]
    ) -> Tensor | Mapping[str, Tensor] | Outcome:
        """Return what KD or the inner term says at the learned temperature.

        Raises:
            UserError: if the logits are not `[B, K]`.
        """
        check_logits(student.logits, teacher.logits, "ctkd")
        now, own = draws
        if self.form == "instance":
            # the network sees the logits, and teaches the student nothing through them
            seen = torch.cat([student.logits.detach(), teacher.logits], dim=1)
            raw = self.network(seen.to(next(self.network.parameters()).dtype))[:, 0]
            return kd_each(student.logits, teacher.logits, ctkd(raw, now, start=self.start, span=self.span))
        temperature = ctkd(self.raw, now, start=self.start, span=self.span)[0]
        if self.inner is None:
            return kd_at(student.logits, teacher.logits, temperature)
        given = (student, teacher, batch, *(() if own is None else (own,)))
        found: Tensor | Mapping[str, Tensor] | Outcome = functional_call(
            self.inner, {"temperature": temperature}, given
        )
        return found
