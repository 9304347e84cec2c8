# SPDX-License-Identifier: Apache-2.0
"""Match the distribution of neuron selectivity patterns: what each channel responds to, over positions.

Compared are sets of channels, not channels one by one, so widths may differ and no layer is added. Of the paper's
kernels the polynomial is the default, as in every released code; its maximum mean discrepancy is a distance of
mean outer products, that of the linear one a distance of means.
"""

from collections.abc import Sequence
from typing import Literal, final

import torch
from torch import Tensor
from torch.nn import functional as F

from tutelage.core import Batch, Card, Facts, Reads, Signals, Term
from tutelage.core.bridge import check_maps
from tutelage.core.error import UserError
from tutelage.core.layers import Layers, Places
from tutelage.functional.precision import full_precision
from tutelage.functional.spatial import match

CARD = Card(
    name="NST",
    title="Like What You Like: Knowledge Distill via Neuron Selectivity Transfer",
    authors="Huang, Wang",
    year=2017,
    venue="arXiv",
    paper="arxiv:1707.01219",
    code="github:megvii-research/mdistiller@a08d46f",
    code_licence="MIT",
    claims="Matching the distributions of neuron selectivity patterns improves students, beside KD or alone.",
    reads={"student": ("stages[*]",), "teacher": ("stages[*]",)},
    labels=("none",),
    averages="samples",
    batch="independent",
    zero_at_teacher=True,
    golden=("classic/nst",),
)

OBJECTIVE = {"task": 1.0, "nst": {"weight": 50.0}}


Kernel = Literal["polynomial", "linear"]


@full_precision
def nst(student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor], *, kernel: Kernel = "polynomial") -> Tensor:
    """Return the squared maximum mean discrepancy of channels, summed over layers.

        L = sum_l 1 / B * sum_b [ mean k(t, t') + mean k(s, s') - 2 mean k(s, t) ]
        k(x, y) = (x . y)^2, or x . y
        x a channel of the sample, flattened over positions and divided by its norm

    Convention:
        - means over pairs of channels and over samples; the teacher's own part, a constant, is in
        - maps of two sizes meet at the lower one's, the other averaged over cells
        - a channel that is zero everywhere stays zero

    Args:
        student_maps: `[B, C, H, W]` of each layer, from shallow to deep.
        teacher_maps: `[B, C', H', W']` of the same layers.
        kernel: `polynomial` or `linear`.

    Returns:
        Scalar, float32 or wider; a batch without rows gives a connected zero.

    Example:
        >>> one, two = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 1.0]]]])
        >>> nst([one], [two])
        tensor(2.)

    Reference: Huang and Wang, Like What You Like: Knowledge Distill via Neuron Selectivity Transfer, 2017.
    """
    layers = []
    for student_map, teacher_map in zip(student_maps, teacher_maps, strict=True):
        student, teacher = (F.normalize(side.flatten(2), dim=2, eps=1e-12) for side in match(student_map, teacher_map))
        layers.append(_discrepancy(student, teacher, kernel).sum() / max(len(student), 1))
    return torch.stack(layers).sum()


def _discrepancy(student: Tensor, teacher: Tensor, kernel: Kernel) -> Tensor:
    """Return `[B]` from unit channels `[B, C, N]`, by the smaller of two Gram matrices."""
    if kernel == "linear":
        return (student.mean(1) - teacher.mean(1)).square().sum(1)
    if student.shape[2] <= max(student.shape[1], teacher.shape[1]):
        # k is the inner product of outer products: the distance of their means over channels cannot cancel
        means = [side.mT @ side / side.shape[1] for side in (student, teacher)]
        return (means[0] - means[1]).square().sum((1, 2))
    pairs = ((teacher, teacher, 1), (student, student, 1), (student, teacher, -2))
    return torch.stack([sign * (one @ other.mT).square().mean((1, 2)) for one, other, sign in pairs]).sum(0)


@final
class NST(Term):
    """Term form of :func:`nst`, over all stages that both models have.

    Args:
        kernel: see :func:`nst`.
        student_taps: maps of the student, from shallow to deep.
        teacher_taps: maps of the teacher.
    """

    def __init__(
        self,
        *,
        kernel: Kernel = "polynomial",
        student_taps: Places = ("stages[*]",),
        teacher_taps: Places = ("stages[*]",),
    ) -> None:
        super().__init__()
        if kernel not in ("polynomial", "linear"):
            raise UserError(f"kernel {kernel!r} is not known; valid: linear, polynomial")
        self.kernel: Kernel = kernel
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
            check_maps(student[one], teacher[other], "nst")

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> Tensor:  # type: ignore[override]
        """Return the discrepancy of channels."""
        one, other = self.names
        return nst([student[name] for name in one], [teacher[name] for name in other], kernel=self.kernel)
