# SPDX-License-Identifier: Apache-2.0
"""Mimic the teacher's first blocks, and rebuild its last tokens from a randomly masked student.

Shallow and deep layers of a transformer want different treatment: the first two are matched directly, the last
is generated. The generation counts at masked tokens only, unlike MGD, which counts everywhere; the authors say
"unmasked" in discussions of their code, and the code does this. The preprint's first figure draws the mask on
the wrong branch.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from tutelage.core import Batch, Card, Draw, Facts, Reads, Signals, Tap, Term
from tutelage.core.bridge import bridge
from tutelage.core.error import UserError
from tutelage.core.layers import Layers, Places
from tutelage.functional.precision import full_precision

CARD = Card(
    name="ViTKD",
    title="ViTKD: Feature-based Knowledge Distillation for Vision Transformers",
    authors="Yang, Li, Zeng, Li, Yuan, Li",
    year=2024,
    venue="CVPR Workshops",
    paper="arxiv:2209.02432",
    code="github:yzd-v/cls_KD@1e5d48f",
    code_licence="Apache-2.0",
    claims="Mimicking shallow and generating deep tokens lifts vision transformers, on top of logit methods.",
    reads={"student": ("blocks[0]", "blocks[1]", "tokens"), "teacher": ("blocks[0]", "blocks[1]", "tokens")},
    labels=("none",),
    averages="samples",
    batch="independent",
    zero_at_teacher=False,
    golden=("core/vitkd",),
)

OBJECTIVE = {"task": 1.0, "vitkd": {"weight": 1.0, "alpha": 3e-5, "beta": 3e-6, "mask_ratio": 0.5}}


@full_precision
def vitkd(
    student_low: Sequence[Tensor],
    teacher_low: Sequence[Tensor],
    generated: Tensor,
    teacher_high: Tensor,
    removed: Tensor,
    *,
    alpha: float = 3e-5,
    beta: float = 3e-6,
    mask_ratio: float = 0.5,
) -> dict[str, Tensor]:
    """Return the mimicking and the generation part.

        L = alpha / B * sum_l sum_{b,n,d} (s_l - t_l)^2  +  beta / (lambda B) * sum_{b,n,d} m (G - t)^2
        G = generator( tokens of the last layer, the removed ones replaced by a mask token )

    Convention:
        - summed over layers, tokens and channels, averaged over the batch
        - m is 1 on removed tokens; the sum over them is divided by their share lambda

    Args:
        student_low: first layers' patch tokens `[B, L, D]` at the teacher's width, from shallow to deep.
        teacher_low: the same of the teacher.
        generated: `[B, L, D]`, what the generator made.
        teacher_high: `[B, L, D]`, the teacher's last patch tokens after the final norm.
        removed: `[B, L]`, 1 where a token was removed.
        alpha: coefficient of the mimicking part.
        beta: coefficient of the generation part.
        mask_ratio: lambda, in (0, 1].

    Returns:
        `mimic` and `generation`, scalars with their coefficients; their sum is the loss. A batch without rows
        gives connected zeros.

    Example:
        >>> one, two = torch.zeros(1, 2, 1), torch.ones(1, 2, 1)
        >>> parts = vitkd([one], [two], one, two, torch.tensor([[1.0, 0.0]]), alpha=1.0, beta=1.0)
        >>> parts["mimic"], parts["generation"]
        (tensor(2.), tensor(2.))

    Reference: Yang et al., ViTKD, CVPR Workshops 2024, eq. 1-5.
    """
    rows = max(len(generated), 1)
    low = [(s - t).square().sum() for s, t in zip(student_low, teacher_low, strict=True)]
    high = (removed[:, :, None] * (generated - teacher_high).square()).sum()
    return {"mimic": alpha / rows * torch.stack(low).sum(), "generation": beta / mask_ratio / rows * high}


def removed_mask(noise: Tensor, mask_ratio: float) -> Tensor:
    """Return 1 where a token is removed: all but the int(L (1 - ratio)) tokens of smallest noise.

    Args:
        noise: `[B, L]`, uniform.
        mask_ratio: share that is removed (lambda); the number kept is rounded down.
    """
    kept = int(noise.shape[1] * (1 - mask_ratio))
    rank = noise.argsort(dim=1, stable=True).argsort(dim=1)
    return (rank >= kept).to(noise.dtype)


@final
class ViTKD(Term):
    """Term form of :func:`vitkd`: linear maps where widths differ, a mask token, two 3x3 convolutions.

    Args:
        alpha: see :func:`vitkd`.
        beta: see :func:`vitkd`.
        mask_ratio: see :func:`vitkd`.
        student_taps: patch tokens of the student's first layers.
        teacher_taps: of the teacher's.
        student_tap: the student's last patch tokens.
        teacher_tap: the teacher's.
    """

    def __init__(
        self,
        *,
        alpha: float = 3e-5,
        beta: float = 3e-6,
        mask_ratio: float = 0.5,
        student_taps: Places = ("blocks[0]", "blocks[1]"),
        teacher_taps: Places = ("blocks[0]", "blocks[1]"),
        student_tap: str | Mapping[str, Any] | Tap = "tokens",
        teacher_tap: str | Mapping[str, Any] | Tap = "tokens",
    ) -> None:
        super().__init__()
        if not 0 < mask_ratio <= 1:
            raise UserError(f"mask_ratio is a fraction in (0, 1], not {mask_ratio}")
        self.alpha, self.beta, self.mask_ratio = alpha, beta, mask_ratio
        self.layers = Layers.parse(student_taps, teacher_taps)
        self.student_tap, self.teacher_tap = Tap.parse(student_tap), Tap.parse(teacher_tap)

    @property
    def reads(self) -> Reads:
        """The first layers and the last of both models."""
        return Reads((*self.layers.student, self.student_tap), (*self.layers.teacher, self.teacher_tap))

    def build(self, student: Signals, teacher: Signals | None, facts: Facts) -> None:
        """Create the alignments, where widths differ, the mask token and the generator.

        Raises:
            UserError: if a tap holds no tokens, or the tokens differ in number or form no square.
        """
        assert teacher is not None
        self.pairs = self.layers.pairs(student, teacher)
        for one, other in (*self.pairs, (self.student_tap.name, self.teacher_tap.name)):
            source, goal = student[one], teacher[other]
            if source.ndim != 3 or goal.ndim != 3:
                raise UserError(
                    f"vitkd compares patch tokens [B, L, D], not {list(source.shape)} and {list(goal.shape)}"
                )
            if source.shape[1] != goal.shape[1]:
                raise UserError(
                    f"vitkd compares tokens of one grid: the student has {source.shape[1]}, the teacher "
                    f"{goal.shape[1]}; choose models of equal patch and image size"
                )
        tokens, width = goal.shape[1:]
        self.side = math.isqrt(tokens)
        if self.side**2 != tokens:
            raise UserError(f"vitkd needs a square grid of patch tokens, not {tokens}")
        self.align_low = nn.ModuleList(bridge(student[one], teacher[other]) for one, other in self.pairs)
        self.align_high = bridge(source, goal)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width, device=source.device))
        self.generation = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)
        )

    def draw(self, student: Signals, teacher: Signals | None, batch: Batch, draw: Draw) -> Tensor:
        """Return the noise that decides which tokens are removed, a function of each sample's id."""
        return draw.uniform(batch.index, (student[self.student_tap.name].shape[1],))

    def forward(  # type: ignore[override]
        self, student: Signals, teacher: Signals, batch: Batch, noise: Tensor
    ) -> dict[str, Tensor]:
        """Return the parts `mimic` and `generation`."""
        low = [align(student[one]) for align, (one, _) in zip(self.align_low, self.pairs, strict=True)]
        removed = removed_mask(noise, self.mask_ratio)
        aligned = self.align_high(student[self.student_tap.name])
        masked = torch.where(removed[:, :, None] > 0, self.mask_token.to(aligned.dtype), aligned)
        grid = masked.transpose(1, 2).unflatten(2, (self.side, self.side))
        return vitkd(
            low,
            [teacher[other] for _, other in self.pairs],
            self.generation(grid).flatten(2).transpose(1, 2),
            teacher[self.teacher_tap.name],
            removed,
            alpha=self.alpha,
            beta=self.beta,
            mask_ratio=self.mask_ratio,
        )
