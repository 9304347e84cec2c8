# SPDX-License-Identifier: Apache-2.0
"""Match maps under masks that teacher and student make together, and that change as the student learns.

There is no official code. The printed losses use each mask twice and fall to 0 with the masks; the default divides by
the mask's mass instead, `form="printed"` takes the formulas at their word.
"""

from typing import Literal, final, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tutelage.core import Batch, Card, Facts, Reads, Signals, Term
from tutelage.core.bridge import bridge, check_grid, check_maps
from tutelage.core.error import UserError, nearest
from tutelage.core.ignored import known
from tutelage.core.layers import Layers, Places
from tutelage.functional.precision import full_precision
from tutelage.functional.spatial import over_kept, pooled

CARD = Card(
    name="ACAM-KD",
    title="ACAM-KD: Adaptive and Cooperative Attention Masking for Knowledge Distillation",
    authors="Lan, Tian",
    year=2025,
    venue="ICCV",
    paper="arxiv:2503.06307",
    code=None,
    code_licence=None,
    claims="Masks from fused features of both models, which follow the student, beat masks that the teacher fixes.",
    reads={"student": ("fpn[*]",), "teacher": ("fpn[*]",)},
    labels=("none",),
    averages="samples",
    batch="independent",
    zero_at_teacher=False,
    golden=(),
    provenance="reconstruction",
)

OBJECTIVE = {"task": 1.0, "acam_kd": {"weight": 1.0}}

Form = Literal["normalized", "printed"]
FLOOR = 1e-12  # a mask of less mass lets nothing through


@full_precision
def acam_kd(
    student_map: Tensor,
    teacher_map: Tensor,
    channel_masks: Tensor,
    spatial_masks: Tensor,
    *,
    alpha: float = 1.0,
    lambda_div: float = 1.0,
    form: Form = "normalized",
    keep: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return the masked distances over channels and over positions, and how alike the masks are.

        channel   = alpha / M sum_m ( sum_k Mc_mk |E_k|^2 ) / ( H W sum_k Mc_mk )
        spatial   = alpha / M sum_m ( sum_p Ms_mp |E_p|^2 ) / ( C sum_p Ms_mp )
        diversity = lambda sum over both kinds of  2 sum_{i != j} < M_i, M_j > / ( sum_i |M_i|^2 + sum_j |M_j|^2 )
        printed:    channel = alpha / M sum_m 1 / (H W) sum_k Mc_mk |Mc_mk E_k|^2, spatial likewise

    with E = teacher - student.

    Convention:
        - averaged over images; the masks carry gradients, also to the student they were made from
        - the diversity of M equal masks is M - 1, that of masks without common places 0

    Args:
        student_map: `[B, C, H, W]`, at the teacher's width; any float dtype, compared in float32 or wider.
        teacher_map: `[B, C, H, W]`.
        channel_masks: `[B, M, C]` in (0, 1).
        spatial_masks: `[B, M, H, W]` in (0, 1).
        alpha: coefficient of both distances.
        lambda_div: coefficient of the diversity.
        form: `normalized`, or `printed`.
        keep: `[B, H, W]` bool, the places that are compared and where masks count; None keeps all.

    Returns:
        `channel`, `spatial` and `diversity`: scalars with their coefficients, float32 or wider. Without rows
        connected zeros.

    Raises:
        UserError: if the maps differ in shape: they would broadcast.

    Example:
        >>> one, mask = torch.ones(1, 2, 1, 1), torch.tensor([[[0.25, 0.75]]])
        >>> parts = acam_kd(torch.tensor([[[[0.0]], [[1.0]]]]), one, mask, torch.ones(1, 1, 1, 1))
        >>> parts["channel"], parts["spatial"], parts["diversity"]
        (tensor(0.2500), tensor(0.5000), tensor(0.))

    Reference: Lan and Tian, ACAM-KD, ICCV 2025.
    """
    if student_map.shape != teacher_map.shape:
        raise UserError(
            f"acam_kd compares maps of one shape: the student's is {list(student_map.shape)}, "
            f"the teacher's {list(teacher_map.shape)}"
        )
    rows, width = student_map.shape[:2]
    square, places = (teacher_map - student_map).square().flatten(2), spatial_masks.flatten(2)
    if keep is not None:
        square, places = (side.where(keep.flatten(1)[:, None], 0.0) for side in (square, places))
    positions = square.shape[2] if keep is None else keep.flatten(1).sum(1).clamp(min=1)
    by_channel = _masked(square.sum(2), channel_masks, form) / positions
    by_place = _masked(square.sum(1), places, form) / width
    alike = _alike(channel_masks) + _alike(places)
    return {
        "channel": alpha * by_channel.sum() / max(rows, 1),
        "spatial": alpha * by_place.sum() / max(rows, 1),
        "diversity": lambda_div * alike.sum() / max(rows, 1),
    }


def _masked(energy: Tensor, masks: Tensor, form: Form) -> Tensor:
    """Return the mean over masks of what each lets through: `[B, N]` and `[B, M, N]` to `[B]`."""
    if form == "printed":
        return (masks.pow(3) * energy[:, None]).sum(2).mean(1)
    return _share((masks * energy[:, None]).sum(2), masks.sum(2)).mean(1)


def _alike(masks: Tensor) -> Tensor:
    """Return the Dice coefficient of the masks of each image: `[B, M, N]` to `[B]`."""
    squares = masks.square().sum((1, 2))
    shared = masks.sum(1).square().sum(1) - squares
    return _share(shared, squares)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """Return part / whole, and 0 of nothing, with a finite gradient."""
    return torch.where(whole > FLOOR, part / whole.clamp(min=FLOOR), 0.0)


class Masking(nn.Module):
    """Masks of one level: the teacher asks, the student answers, and units select.

    Args:
        width: of the teacher's map.
        masks: of each kind.
        cells: a side of the keys' and values' grid, at most.
    """

    def __init__(self, width: int, masks: int, cells: int) -> None:
        super().__init__()
        narrow = max(width // 2, 1)
        self.query, self.key = nn.Conv2d(width, narrow, 1), nn.Conv2d(width, narrow, 1)
        self.value = nn.Conv2d(width, width, 1)
        self.channel_units = nn.Parameter(torch.randn(masks, 1))
        self.spatial_units = nn.Parameter(torch.randn(masks, width) / width**0.5)
        self.cells = cells

    def fuse(self, student_map: Tensor, teacher_map: Tensor, keep: Tensor | None = None) -> Tensor:
        """Return what the student's kept places answer at each place of the teacher's map, `[B, C, H, W]`."""
        height, width = student_map.shape[2:]
        small, there = student_map, keep
        if max(height, width) > self.cells:
            small, there = pooled(small, (min(height, self.cells), min(width, self.cells)), keep)
        asked = None if there is None else there.flatten(1)[:, None]
        query, key, value = (
            layer(given).flatten(2).mT
            for layer, given in ((self.query, teacher_map), (self.key, small), (self.value, small))
        )
        answer: Tensor = F.scaled_dot_product_attention(query, key, value, asked).mT.unflatten(2, teacher_map.shape[2:])
        return answer

    def forward(self, student_map: Tensor, teacher_map: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return masks over channels `[B, M, C]` and over positions `[B, M, H, W]`, from the places that are kept."""
        fused = self.fuse(student_map, teacher_map, keep)
        mean = over_kept(fused, None if keep is None else keep[:, None]).mean((2, 3))
        channels = self.channel_units * mean[:, None]
        places = torch.einsum("mc,bchw->bmhw", self.spatial_units, fused)
        return channels.sigmoid(), places.sigmoid()


@final
class ACAMKD(Term):
    """Term form of :func:`acam_kd`, over the levels of both pyramids, each with masks of its own.

    Args:
        masks: M, of each kind: 6 for detection; for segmentation as many as classes, on the score maps
            (`student_taps: [logits]`).
        alpha: see :func:`acam_kd`.
        lambda_div: see :func:`acam_kd`.
        form: see :func:`acam_kd`.
        cells: keys and values of larger maps are averaged over a grid of so many cells a side.
        student_taps: maps of the student, from shallow to deep.
        teacher_taps: maps of the teacher, on the same grids.
    """

    knows_ignored = True

    def __init__(
        self,
        *,
        masks: int = 6,
        alpha: float = 1.0,
        lambda_div: float = 1.0,
        form: Form = "normalized",
        cells: int = 32,
        student_taps: Places = ("fpn[*]",),
        teacher_taps: Places = ("fpn[*]",),
    ) -> None:
        super().__init__()
        if form not in get_args(Form):
            raise UserError(f"form {form!r} is not known{nearest(str(form), get_args(Form))}")
        if min(masks, cells) < 1:
            raise UserError(f"masks and cells are at least 1, not {masks} and {cells}")
        self.masks, self.cells = masks, cells
        self.alpha, self.lambda_div = alpha, lambda_div
        self.form: Form = form
        self.layers = Layers.parse(student_taps, teacher_taps)

    @property
    def reads(self) -> Reads:
        """The maps of both models."""
        return Reads(self.layers.student, self.layers.teacher)

    def build(self, student: Signals, teacher: Signals | None, facts: Facts) -> None:
        """Create bridges where widths differ, and the masks of each level.

        Raises:
            UserError: if a tap is no map, or the maps of a level differ in height or width.
        """
        assert teacher is not None
        self.names = self.layers.pairs(student, teacher)
        pairs = [(student[one], teacher[other]) for one, other in self.names]
        for one, other in pairs:
            check_maps(one, other, "acam_kd")
            check_grid(one, other, "acam_kd")
        self.align = nn.ModuleList(bridge(one, other) for one, other in pairs)
        self.masking = nn.ModuleList(
            Masking(other.shape[1], self.masks, self.cells).to(other.device) for _, other in pairs
        )

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> dict[str, Tensor]:  # type: ignore[override]
        """Return the parts `channel`, `spatial` and `diversity`, summed over levels."""
        levels = []
        for (one, other), align, masking in zip(self.names, self.align, self.masking, strict=True):
            ours, theirs = align(student[one]), teacher[other]
            places = known(batch, theirs)
            over_channels, over_places = masking(ours, theirs, places)
            levels.append(
                acam_kd(
                    ours,
                    theirs,
                    over_channels,
                    over_places,
                    alpha=self.alpha,
                    lambda_div=self.lambda_div,
                    form=self.form,
                    keep=places,
                )
            )
        return {part: torch.stack([level[part] for level in levels]).sum() for part in levels[0]}
