# SPDX-License-Identifier: Apache-2.0
"""Match where the teacher's maps are active, whatever in.

The paper writes the distance of unit attention vectors, un-squared; the authors' code takes the mean of its
square over positions, which is what the published weight of 1000 belongs to.
"""

from collections.abc import Sequence
from typing import Literal, final

import torch
from torch import Tensor

from tutelage.core import Batch, Card, Facts, Reads, Signals, Term
from tutelage.core.bridge import check_maps
from tutelage.core.error import UserError
from tutelage.core.layers import Layers, Places
from tutelage.functional.precision import full_precision
from tutelage.functional.spatial import attention, match

CARD = Card(
    name="AT",
    title="Paying More Attention to Attention: Improving the Performance of Convolutional Neural Networks "
    "via Attention Transfer",
    authors="Zagoruyko, Komodakis",
    year=2017,
    venue="ICLR",
    paper="arxiv:1612.03928",
    code="github:megvii-research/mdistiller@a08d46f",
    code_licence="MIT",
    claims="A student that looks where its teacher looks is more accurate, across depths and widths.",
    reads={"student": ("stages[*]",), "teacher": ("stages[*]",)},
    labels=("none",),
    averages="samples",
    batch="independent",
    zero_at_teacher=True,
    golden=("classic/at",),
)

OBJECTIVE = {"task": 1.0, "at": {"weight": 1000.0}}

Form = Literal["code", "paper", "sum_eps"]
FORMS: tuple[Form, ...] = ("code", "paper", "sum_eps")


@full_precision
def at(
    student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor], *, power: float = 2.0, form: Form = "code"
) -> Tensor:
    """Return the distance of attention vectors, summed over layers.

        L = sum_l 1 / (B H W) * sum_b || q(s_l) - q(t_l) ||_2^2
        L = sum_l 1 / B * sum_b || q(s_l) - q(t_l) ||_2              (paper, eq. 2, without beta / 2)
        q(f) = Q / ||Q||_2,  Q = vec( mean_c |f_c|^p )

    Convention:
        - `code` is averaged over positions and samples, `paper` over samples; both are summed over layers
        - maps of two sizes meet at the lower one's, the other averaged over cells

    Args:
        student_maps: `[B, C, H, W]` of each layer, from shallow to deep.
        teacher_maps: `[B, C', H', W']` of the same layers.
        power: p, at least 1.
        form: `code` (the authors'), `paper`, or `sum_eps` (`code` with the sum over channels and 1e-6 added
            to the norm).

    Returns:
        Scalar, float32 or wider; a batch without rows gives a connected zero.

    Example:
        >>> one, two = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 1.0]]]])
        >>> at([one], [two]), at([one], [two], form="paper")
        (tensor(1.), tensor(1.4142))

    Reference: Zagoruyko and Komodakis, Paying More Attention to Attention, ICLR 2017, eq. 2.
    """
    layers = []
    for student_map, teacher_map in zip(student_maps, teacher_maps, strict=True):
        rows = max(len(student_map), 1)
        pair = match(student_map, teacher_map)
        if form == "sum_eps":
            energies = [side.abs().pow(power).sum(1).flatten(1) for side in pair]
            student, teacher = (q / (torch.linalg.vector_norm(q, dim=1, keepdim=True) + 1e-6) for q in energies)
        else:
            student, teacher = (attention(side, power) for side in pair)
        if form == "paper":
            layers.append(torch.linalg.vector_norm(student - teacher, dim=1).sum() / rows)
        else:
            layers.append((student - teacher).square().mean(1).sum() / rows)
    return torch.stack(layers).sum()


@final
class AT(Term):
    """Term form of :func:`at`, over all stages that both models have.

    Args:
        power: see :func:`at`.
        form: see :func:`at`.
        student_taps: maps of the student, from shallow to deep.
        teacher_taps: maps of the teacher.
    """

    def __init__(
        self,
        *,
        power: float = 2.0,
        form: Form = "code",
        student_taps: Places = ("stages[*]",),
        teacher_taps: Places = ("stages[*]",),
    ) -> None:
        super().__init__()
        if form not in FORMS:
            raise UserError(f"form {form!r} is not known; valid: {', '.join(FORMS)}")
        if power < 1:
            raise UserError(f"power is at least 1, not {power}")
        self.power = power
        self.form: Form = form
        self.layers = Layers.parse(student_taps, teacher_taps)

    @property
    def reads(self) -> Reads:
        """The maps of both models."""
        return Reads(self.layers.student, self.layers.teacher)

    def build(self, student: Signals, teacher: Signals | None, facts: Facts) -> None:
        """Pair the layers.

        Raises:
            UserError: if a tap is no map.
        """
        assert teacher is not None
        self.names = self.layers.aligned(student, teacher)
        for one, other in zip(*self.names, strict=True):
            check_maps(student[one], teacher[other], "at")

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> Tensor:  # type: ignore[override]
        """Return the distance of attention vectors."""
        one, other = self.names
        return at(
            [student[name] for name in one],
            [teacher[name] for name in other],
            power=self.power,
            form=self.form,
        )
