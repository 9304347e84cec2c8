# SPDX-License-Identifier: Apache-2.0
"""Let a Gaussian around what the student's map predicts explain the teacher's: maximise shared information.

The variance is one trained number a channel. One toolkit keeps these numbers outside its optimizer, so that they
stay at their first value; that is a defect and not offered.
"""

import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tutelage.core import Batch, Card, Facts, Reads, Signals, Term
from tutelage.core.bridge import check_maps
from tutelage.core.error import UserError
from tutelage.core.ignored import known
from tutelage.core.layers import Layers, Places
from tutelage.functional.precision import full_precision
from tutelage.functional.spatial import match_kept, over_kept

CARD = Card(
    name="VID",
    title="Variational Information Distillation for Knowledge Transfer",
    authors="Ahn, Hu, Damianou, Lawrence, Dai",
    year=2019,
    venue="CVPR",
    paper="arxiv:1904.05835",
    code="github:HobbitLong/RepDistiller@b84f547",
    code_licence="BSD-2-Clause",
    claims="Maximising the mutual information of both networks' maps transfers knowledge across architectures.",
    reads={"student": ("stages[*]",), "teacher": ("stages[*]",)},
    labels=("none",),
    averages="samples",
    batch="independent",
    zero_at_teacher=False,
    golden=("classic/vid",),
)

OBJECTIVE = {"task": 1.0, "vid": {"weight": 1.0}}


@full_precision
def vid(
    means: Sequence[Tensor],
    log_scales: Sequence[Tensor],
    teacher_maps: Sequence[Tensor],
    *,
    eps: float = 1e-5,
    keep: Sequence[Tensor | None] = (),
) -> Tensor:
    """Return the negative log-likelihood of the teacher's maps, summed over layers.

        L = sum_l 1 / (B C H W) * sum_{b,c,h,w} 1/2 [ (mu - t)^2 / v_c + log v_c ],   v_c = softplus(a_c) + eps

    Convention:
        - averaged over everything, summed over layers; in nats
        - 1/2 log 2 pi is left out: the loss can be negative

    Args:
        means: mu of each layer, `[B, C, H, W]`: the student's map through the regressor.
        log_scales: a of each layer, `[C]`.
        teacher_maps: `[B, C, H, W]` of each layer.
        eps: smallest variance.
        keep: `[B, H, W]` bool of each layer, the places that are compared; None, or nothing at all, keeps all.

    Returns:
        Scalar, float32 or wider; a batch without rows gives a connected zero.

    Raises:
        UserError: if the shapes of a pair differ: they would broadcast.

    Example:
        >>> one = torch.zeros(1, 1, 1, 1)
        >>> vid([one], [torch.full((1,), math.log(math.e - 1))], [one + 2], eps=0.0)
        tensor(2.)

    Reference: Ahn et al., Variational Information Distillation for Knowledge Transfer, CVPR 2019, eq. 3-5.
    """
    layers, places = [], keep or [None] * len(means)
    for mean, log_scale, teacher_map, left in zip(means, log_scales, teacher_maps, places, strict=True):
        if mean.shape != teacher_map.shape:
            raise UserError(
                f"vid compares maps of one shape: the predicted one is {list(mean.shape)}, "
                f"the teacher's {list(teacher_map.shape)}"
            )
        variance = (F.softplus(log_scale) + eps)[:, None, None]
        likelihood = (mean - teacher_map).square() / variance + variance.log()
        rows = over_kept(likelihood, None if left is None else left[:, None])
        layers.append(rows.sum() / max(2 * mean.numel(), 1))
    return torch.stack(layers).sum()


@final
class VID(Term):
    """Term form of :func:`vid`: three 1x1 convolutions and a variance a channel, for each stage of both models.

    Args:
        initial_variance: of every channel.
        eps: see :func:`vid`.
        student_taps: maps of the student, from shallow to deep.
        teacher_taps: maps of the teacher.
    """

    def __init__(
        self,
        *,
        initial_variance: float = 5.0,
        eps: float = 1e-5,
        student_taps: Places = ("stages[*]",),
        teacher_taps: Places = ("stages[*]",),
    ) -> None:
        super().__init__()
        if eps < 0 or initial_variance <= eps:
            raise UserError(f"the variance begins above eps >= 0: not at {initial_variance} with eps {eps}")
        self.initial_variance, self.eps = initial_variance, eps
        self.layers = Layers.parse(student_taps, teacher_taps)

    @property
    def reads(self) -> Reads:
        """The maps of both models."""
        return Reads(self.layers.student, self.layers.teacher)

    def build(self, student: Signals, teacher: Signals | None, facts: Facts) -> None:
        """Create the regressors and the variances.

        Raises:
            UserError: if a tap is no map.
        """
        assert teacher is not None
        self.names = self.layers.pairs(student, teacher)
        self.regressors, self.log_scales = nn.ModuleList(), nn.ParameterList()
        above = self.initial_variance - self.eps
        begin = above + math.log(-math.expm1(-above))  # softplus gives the wanted variance
        for one, other in self.names:
            source, goal = student[one], teacher[other]
            check_maps(source, goal, "vid")
            width = goal.shape[1]
            steps = [nn.Conv2d(n, width, 1, bias=False) for n in (source.shape[1], width, width)]
            network = nn.Sequential(steps[0], nn.ReLU(), steps[1], nn.ReLU(), steps[2])
            self.regressors.append(network.to(source.device))
            self.log_scales.append(nn.Parameter(torch.full((width,), begin, device=source.device)))

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> Tensor:  # type: ignore[override]
        """Return the negative log-likelihood of the teacher's maps."""
        means, maps, places = [], [], []
        for regressor, (one, other) in zip(self.regressors, self.names, strict=True):
            ours, theirs = student[one], teacher[other]
            source, goal, left = match_kept(ours, theirs, known(batch, ours), known(batch, theirs))
            means.append(regressor(source))
            maps.append(goal)
            places.append(left)
        return vid(means, list(self.log_scales), maps, eps=self.eps, keep=places)
