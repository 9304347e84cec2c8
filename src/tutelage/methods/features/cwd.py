# SPDX-License-Identifier: Apache-2.0
"""Match where each channel looks: the softmax of a channel over positions, of features or of class score maps.

The official code takes the logarithm of a softmax, which fails on peaked maps; here it is a log-softmax. One code
base divides by the student's width before its 1x1 convolution instead of by that of the compared maps.
"""

from collections.abc import Mapping
from typing import Any, Literal, final

from torch import Tensor

from tutelage.core import Batch, Card, Facts, Reads, Signals, Tap, Term
from tutelage.core.bridge import bridge, check_grid, check_maps
from tutelage.core.error import UserError
from tutelage.core.ignored import known
from tutelage.functional.divergence import kl_divergence
from tutelage.functional.precision import full_precision
from tutelage.functional.spatial import channelwise_divergence, over_kept

CARD = Card(
    name="CWD",
    title="Channel-wise Knowledge Distillation for Dense Prediction",
    authors="Shu, Liu, Gao, Yan, Shen",
    year=2021,
    venue="ICCV",
    paper="arxiv:2011.13256",
    code="github:irfanICMLL/TorchDistiller@78bac7c",
    code_licence="BSD-2-Clause",
    claims="Normalising each channel over positions beats aligning features or scores place by place.",
    reads={"student": ("map",), "teacher": ("map",)},
    labels=("none",),
    averages="samples",
    batch="independent",
    zero_at_teacher=True,
    golden=("classic/cwd", "core/mgd_seg_distiller"),
)

OBJECTIVE = {"task": 1.0, "cwd": {"weight": 50.0, "temperature": 4.0}}

Form = Literal["paper", "cirkd", "pixel", "mean"]
FORMS: tuple[Form, ...] = ("cirkd", "mean", "paper", "pixel")


@full_precision
def cwd(
    student_map: Tensor,
    teacher_map: Tensor,
    *,
    temperature: float = 4.0,
    form: Form = "paper",
    student_width: int | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """Return the divergence of the channels' distributions over positions.

        L = T^2 / (B C) * sum_b sum_c KL( softmax_hw(t_c / T) || softmax_hw(s_c / T) )        (eq. 4-5)

    Convention:
        - KL runs from teacher to student: KL(teacher || student); no gradient is asked of the teacher
        - multiplied by T^2; summed over positions, averaged over channels and samples
        - positions that are not kept are in no softmax and no mean

    Args:
        student_map: `[B, C, H, W]`, features at the teacher's width, or class scores.
        teacher_map: `[B, C, H, W]`.
        temperature: softening, > 0.
        form: `paper`; `cirkd` (divided by `student_width` instead of C); or two relatives of the official
            code: `pixel` (softmax over channels at each position, T^2, averaged over positions and samples)
            and `mean` (mean squared difference of the channels' means, no temperature).
        student_width: the student's channels before its bridge, for `cirkd`; None takes C.
        keep: `[B, H, W]` bool, the positions that are compared, at least one a sample; None keeps all.

    Returns:
        Scalar, float32 or wider; a batch without rows gives a connected zero.

    Raises:
        UserError: if the shapes differ: they would broadcast.

    Example:
        >>> import torch
        >>> cwd(torch.zeros(1, 1, 1, 2), torch.tensor([[[[0.0, 1.0]]]]), temperature=1.0)
        tensor(0.1109)

    Reference: Shu et al., Channel-wise Knowledge Distillation for Dense Prediction, ICCV 2021, eq. 4-5.
    """
    if student_map.shape != teacher_map.shape:
        raise UserError(
            f"cwd compares maps of one shape: the student's is {list(student_map.shape)}, "
            f"the teacher's {list(teacher_map.shape)}"
        )
    rows, width, height, columns = student_map.shape
    if form == "pixel":
        student, teacher = (side.movedim(1, 3) / temperature for side in (student_map, teacher_map))
        apart = over_kept(kl_divergence(student, teacher), keep)
        return temperature**2 * apart.sum() / max(rows * height * columns, 1)
    if form == "mean":
        apart = over_kept(student_map - teacher_map, None if keep is None else keep[:, None]).mean((2, 3))
        return apart.square().sum() / max(rows * width, 1)
    divisor = rows * (student_width or width if form == "cirkd" else width)
    return channelwise_divergence(student_map, teacher_map, temperature, keep).sum() / max(divisor, 1)


@final
class CWD(Term):
    """Term form of :func:`cwd`: a 1x1 convolution without bias where widths differ.

    Args:
        temperature: see :func:`cwd`.
        form: see :func:`cwd`.
        student_tap: a map of the student; `logits` for the class scores of a dense task.
        teacher_tap: a map of the teacher, of the same height and width.
    """

    knows_ignored = True

    def __init__(
        self,
        *,
        temperature: float = 4.0,
        form: Form = "paper",
        student_tap: str | Mapping[str, Any] | Tap = "map",
        teacher_tap: str | Mapping[str, Any] | Tap = "map",
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise UserError(f"temperature must be > 0, not {temperature}")
        if form not in FORMS:
            raise UserError(f"form {form!r} is not known; valid: {', '.join(FORMS)}")
        self.temperature = temperature
        self.form: Form = form
        self.student_tap, self.teacher_tap = Tap.parse(student_tap), Tap.parse(teacher_tap)

    @property
    def reads(self) -> Reads:
        """The two maps."""
        return Reads((self.student_tap,), (self.teacher_tap,))

    def build(self, student: Signals, teacher: Signals | None, facts: Facts) -> None:
        """Create the convolution, where widths differ.

        Raises:
            UserError: if a tap is no map, or the maps differ in height or width.
        """
        assert teacher is not None
        source, goal = student[self.student_tap.name], teacher[self.teacher_tap.name]
        check_maps(source, goal, "cwd")
        check_grid(source, goal, "cwd")
        self.conv = bridge(source, goal, bias=False)

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> Tensor:  # type: ignore[override]
        """Return the divergence of the channels' distributions."""
        source = student[self.student_tap.name]
        return cwd(
            self.conv(source),
            teacher[self.teacher_tap.name],
            temperature=self.temperature,
            form=self.form,
            student_width=source.shape[1],
            keep=known(batch, source),
        )
