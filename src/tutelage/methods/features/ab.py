# SPDX-License-Identifier: Apache-2.0
"""Copy which neurons of the teacher are active, before their activation, whatever their values.

The paper gives the rule for one neuron; how layers are weighted and that the whole is divided by the batch alone
comes from the released code. It is meant to run first and alone: the objective switches from it to the task after
30 of 270 epochs.
"""

from collections.abc import Sequence
from typing import Literal, final

import torch
from torch import Tensor, nn

from tutelage.core import Batch, Card, Facts, Reads, Signals, Term
from tutelage.core.bridge import check_maps, check_statistics, regressor
from tutelage.core.error import UserError
from tutelage.core.ignored import known
from tutelage.core.layers import Layers, Places
from tutelage.functional.precision import full_precision
from tutelage.functional.spatial import kept_sum, mean_square

CARD = Card(
    name="AB",
    title="Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons",
    authors="Heo, Lee, Yun, Choi",
    year=2019,
    venue="AAAI",
    paper="arxiv:1811.03233",
    code="github:bhheo/AB_distillation@a7701d3",
    code_licence=None,
    claims="Starting from the teacher's activation boundaries, a student learns faster and from less data.",
    reads={"student": ("stages[*].pre",), "teacher": ("stages[*].pre",)},
    labels=("none",),
    averages="samples",
    batch="coupled",
    zero_at_teacher=False,
    golden=("classic/ab",),
)

OBJECTIVE = {
    "task": {"step": [0.0, 1.0], "until": 0.111},
    "ab": {"weight": {"step": [3e-3, 0.0], "until": 0.111}},
}

Form = Literal["released", "sum", "mean"]
FORMS: tuple[Form, ...] = ("mean", "released", "sum")


@full_precision
def ab(
    student_maps: Sequence[Tensor],
    teacher_maps: Sequence[Tensor],
    *,
    margin: float = 1.0,
    form: Form = "released",
    keep: Sequence[Tensor | None] = (),
) -> Tensor:
    """Return how far neurons are from the teacher's side of their boundary, and the margin beyond it.

        L = sum_l 2^(l - last) / B * sum e(s, t)
        e = (s + m)^2 where s > -m and t <= 0;  (s - m)^2 where s <= m and t > 0;  else 0

    Convention:
        - `released` and `sum` are summed over channels and positions and averaged over the batch, `mean` is
          averaged over everything; layers are summed, in `released` halved with each step from the last
        - the released code's factor 3 / 1000 is the weight of the term in the objective
        - which case holds is no matter of gradients

    Args:
        student_maps: `[B, C, H, W]` of each layer before the activation, at the teacher's width and grid, from
            shallow to deep.
        teacher_maps: `[B, C, H, W]` of the same layers before the activation.
        margin: m, > 0.
        form: `released`, `sum` (without layer weights) or `mean`.
        keep: `[B, H, W]` bool of each layer, the places that are compared; None, or nothing at all, keeps all.

    Returns:
        Scalar, float32 or wider; a batch without rows gives a connected zero.

    Raises:
        UserError: if the shapes of a pair differ: they would broadcast.

    Example:
        >>> student, teacher = torch.tensor([[[[0.5, 0.5, -2.0]]]]), torch.tensor([[[[1.0, -1.0, -1.0]]]])
        >>> ab([student], [teacher])
        tensor(2.5000)

    Reference: Heo et al., Knowledge Transfer via Distillation of Activation Boundaries, AAAI 2019, eq. 5.
    """
    layers, places = [], keep or [None] * len(student_maps)
    last = len(student_maps) - 1
    for number, (student, teacher, left) in enumerate(zip(student_maps, teacher_maps, places, strict=True)):
        if student.shape != teacher.shape:
            raise UserError(
                f"ab compares maps of one shape: the student's is {list(student.shape)}, "
                f"the teacher's {list(teacher.shape)}"
            )
        too_high = torch.where((student > -margin) & (teacher <= 0), student + margin, 0.0)
        too_low = torch.where((student <= margin) & (teacher > 0), student - margin, 0.0)
        if form == "mean":
            layers.append(mean_square(too_high + too_low, left))
        else:
            total = kept_sum((too_high + too_low).square(), left)
            layers.append((2.0 ** (number - last) if form == "released" else 1.0) * total / max(len(student), 1))
    return torch.stack(layers).sum()


@final
class AB(Term):
    """Term form of :func:`ab`, over all stages that both models have.

    Where shapes differ, a convolution with batch norm brings the student's map to the teacher's width and grid.

    Args:
        margin: see :func:`ab`.
        form: see :func:`ab`.
        student_taps: maps of the student before their activation, from shallow to deep.
        teacher_taps: maps of the teacher before their activation.
    """

    def __init__(
        self,
        *,
        margin: float = 1.0,
        form: Form = "released",
        student_taps: Places = ("stages[*].pre",),
        teacher_taps: Places = ("stages[*].pre",),
    ) -> None:
        super().__init__()
        if margin <= 0:
            raise UserError(f"margin must be > 0, not {margin}")
        if form not in FORMS:
            raise UserError(f"form {form!r} is not known; valid: {', '.join(FORMS)}")
        self.margin = margin
        self.form: Form = form
        self.layers = Layers.parse(student_taps, teacher_taps)

    @property
    def reads(self) -> Reads:
        """The maps of both models."""
        return Reads(self.layers.student, self.layers.teacher)

    def build(self, student: Signals, teacher: Signals | None, facts: Facts) -> None:
        """Create the connectors, where shapes differ.

        Raises:
            UserError: if a tap is no map, or no convolution brings one grid to the other.
        """
        assert teacher is not None
        self.names = self.layers.pairs(student, teacher)
        self.connectors = nn.ModuleList()
        for one, other in self.names:
            source, goal = student[one], teacher[other]
            check_maps(source, goal, "ab")
            connector: nn.Module = nn.Identity()
            if source.shape[1:] != goal.shape[1:]:
                norm = nn.BatchNorm2d(goal.shape[1], device=goal.device)
                connector = nn.Sequential(regressor(source, goal, "ab"), norm)
            self.connectors.append(connector)

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> Tensor:  # type: ignore[override]
        """Return how far the student's neurons are from the teacher's side."""
        maps = []
        for connector, (one, other) in zip(self.connectors, self.names, strict=True):
            if isinstance(connector, nn.Sequential):
                check_statistics(teacher[other], self.training, "ab")
            maps.append(connector(student[one]))
        goals = [teacher[other] for _, other in self.names]
        return ab(maps, goals, margin=self.margin, form=self.form, keep=[known(batch, goal) for goal in goals])
