# SPDX-License-Identifier: Apache-2.0
"""Match how the teacher's maps flow into one another: the inner products of two layers' channels.

The paper pools to the smaller map by maxima and sums squares; the toolkits average both, which is the default here
and what the published weight of 50 belongs to. It is meant to run first and alone: the objective switches from it
to the task after 30 of 270 epochs.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, final

import torch
from torch import Tensor
from torch.nn import functional as F

from tutelage.core import Batch, Card, Facts, Reads, Signals, Term
from tutelage.core.bridge import check_maps
from tutelage.core.error import UserError
from tutelage.core.layers import Layers, Places
from tutelage.functional.precision import full_precision

CARD = Card(
    name="FSP",
    title="A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer Learning",
    authors="Yim, Joo, Bae, Kim",
    year=2017,
    venue="CVPR",
    paper="doi:10.1109/CVPR.2017.754",
    code="github:HobbitLong/RepDistiller@b84f547",
    code_licence="BSD-2-Clause",
    claims="A student that starts from the teacher's flow between layers trains faster and ends better.",
    reads={"student": ("stem", "stages[*]"), "teacher": ("stem", "stages[*]")},
    labels=("none",),
    averages="samples",
    batch="independent",
    zero_at_teacher=True,
    golden=("classic/fsp",),
)

OBJECTIVE = {
    "task": {"step": [0.0, 1.0], "until": 0.111},
    "fsp": {"weight": {"step": [50.0, 0.0], "until": 0.111}},
}

Form = Literal["mean", "paper", "columns"]
FORMS: tuple[Form, ...] = ("columns", "mean", "paper")


@full_precision
def fsp(student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor], *, form: Form = "mean") -> Tensor:
    """Return the distance of flow matrices, summed over consecutive layers.

        L = sum_l 1 / (B C C') * sum_b || G(s_l, s_l+1) - G(t_l, t_l+1) ||_F^2
        L = sum_l 1 / B * sum_b || G(s_l, s_l+1) - G(t_l, t_l+1) ||_F^2               (paper, eq. 2)
        G(f, g)_cd = 1 / (H W) * sum_hw f_chw g_dhw                                    (eq. 1)

    Convention:
        - of two maps the larger is pooled to the smaller's size: by averages in `mean`, else by maxima
        - no layer's weight but 1

    Args:
        student_maps: `[B, C, H, W]` of at least two layers, from shallow to deep.
        teacher_maps: of the same layers and widths; sizes may differ.
        form: `mean`, `paper`, or `columns` (the norms of the columns of the difference, un-squared, summed).

    Returns:
        Scalar, float32 or wider; a batch without rows gives a connected zero.

    Raises:
        UserError: if widths differ, or there is one layer only.

    Example:
        >>> one, two = torch.ones(1, 1, 2, 2), torch.full((1, 1, 2, 2), 3.0)
        >>> fsp([one, one], [one, two])
        tensor(4.)

    Reference: Yim et al., A Gift from Knowledge Distillation, CVPR 2017, eq. 1-2.
    """
    if len(student_maps) < 2 or len(student_maps) != len(teacher_maps):
        raise UserError(
            f"fsp compares pairs of layers: {len(student_maps)} of the student and {len(teacher_maps)} of the "
            "teacher were given"
        )
    pairs = []
    sides = zip(pairwise(student_maps), pairwise(teacher_maps), strict=True)
    for student, teacher in ((flow(*one, form=form), flow(*other, form=form)) for one, other in sides):
        if student.shape != teacher.shape:
            raise UserError(
                f"fsp compares networks of equal widths: the student's are {list(student.shape[1:])}, the "
                f"teacher's {list(teacher.shape[1:])}; choose such a pair, or tap such layers"
            )
        rows = max(len(student), 1)
        if form == "columns":
            pairs.append(torch.linalg.vector_norm(student - teacher, dim=1).sum() / rows)
        else:
            squares = (student - teacher).square().sum((1, 2)).sum() / rows
            pairs.append(squares / (student.shape[1] * student.shape[2] if form == "mean" else 1))
    return torch.stack(pairs).sum()


@full_precision
def flow(first: Tensor, second: Tensor, *, form: Form = "mean") -> Tensor:
    """Return the flow matrix of two maps, `[B, C, C']`.

    Args:
        first: `[B, C, H, W]`.
        second: `[B, C', H', W']`.
        form: decides how the larger one is pooled, see :func:`fsp`.
    """
    pool = F.adaptive_avg_pool2d if form == "mean" else F.adaptive_max_pool2d
    (height, width), (rows, columns) = first.shape[2:], second.shape[2:]
    if (height, width) > (rows, columns):
        first = pool(first, (rows, columns))
    elif (height, width) < (rows, columns):
        second = pool(second, (height, width))
    one, other = first.flatten(2), second.flatten(2)
    return one @ other.mT / one.shape[2]


@final
class FSP(Term):
    """Term form of :func:`fsp`: stem and stages, as many as both models have.

    Args:
        form: see :func:`fsp`.
        student_taps: maps of the student, from shallow to deep.
        teacher_taps: maps of the teacher, of the same widths.
    """

    def __init__(
        self,
        *,
        form: Form = "mean",
        student_taps: Places = ("stem", "stages[*]"),
        teacher_taps: Places = ("stem", "stages[*]"),
    ) -> None:
        super().__init__()
        if form not in FORMS:
            raise UserError(f"form {form!r} is not known; valid: {', '.join(FORMS)}")
        self.form: Form = form
        self.layers = Layers.parse(student_taps, teacher_taps)

    @property
    def reads(self) -> Reads:
        """The maps of both models."""
        return Reads(self.layers.student, self.layers.teacher)

    def build(self, student: Signals, teacher: Signals | None, facts: Facts) -> None:
        """Pair the layers.

        Raises:
            UserError: if a tap is no map, widths differ, or there is one layer only.
        """
        assert teacher is not None
        self.names = self.layers.aligned(student, teacher)
        for one, other in zip(*self.names, strict=True):
            check_maps(student[one], teacher[other], "fsp")
        self._compare(student, teacher)

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> Tensor:  # type: ignore[override]
        """Return the distance of flow matrices."""
        return self._compare(student, teacher)

    def _compare(self, student: Signals, teacher: Signals) -> Tensor:
        one, other = self.names
        return fsp([student[name] for name in one], [teacher[name] for name in other], form=self.form)
