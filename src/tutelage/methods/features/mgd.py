# SPDX-License-Identifier: Apache-2.0
"""Let the student rebuild the teacher's whole map from a randomly masked copy of its own.

The loss runs over all positions, masked or not. The paper masks positions; the authors' classification code
masks channels. Released docstrings name other default ratios than the released configurations: the latter are
used here.
"""

from collections.abc import Mapping
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from tutelage.core import Batch, Card, Draw, Facts, Reads, Signals, Tap, Term
from tutelage.core.bridge import Across, across, grid_of
from tutelage.core.error import UserError
from tutelage.core.ignored import known
from tutelage.core.layers import Layers, Places
from tutelage.functional.precision import full_precision

CARD = Card(
    name="MGD",
    title="Masked Generative Distillation",
    authors="Yang, Li, Shao, Shi, Yuan, Yuan",
    year=2022,
    venue="ECCV",
    paper="arxiv:2205.01529",
    code="github:yzd-v/MGD@2c9da0b",
    code_licence="Apache-2.0",
    claims="Rebuilding the teacher's map from a masked one lifts classifiers, detectors and segmenters.",
    reads={"student": ("map",), "teacher": ("map",)},
    labels=("none",),
    averages="samples",
    batch="independent",
    zero_at_teacher=False,
    golden=("core/mgd_cls", "core/mgd_det", "core/mgd_seg"),
)

OBJECTIVE = {"task": 1.0, "mgd": {"weight": 7e-5, "mask": "channel", "mask_ratio": 0.15}}

Mask = Literal["pixel", "channel"]


@full_precision
def mgd(rebuilt: Tensor, teacher_map: Tensor, keep: Tensor | None = None) -> Tensor:
    """Return the squared distance between the rebuilt and the teacher's map.

        L = 1 / B * sum_{b,c,h,w} ( G( A(s) * M ) - t )^2        (eq. 4-5, without alpha)

    Convention:
        - summed over channels and positions (masked and unmasked), averaged over the batch
        - alpha of the paper is the weight of the whole term in the objective

    Args:
        rebuilt: `[B, C, H, W]`, G( A(s) * M ): the student's aligned, masked map through the generator.
        teacher_map: `[B, C, H, W]`.
        keep: `[B, H, W]` bool, the positions that are summed over; None takes all.

    Returns:
        Scalar, float32 or wider.

    Example:
        >>> mgd(torch.zeros(2, 1, 1, 2), torch.tensor([1.0, 2.0]).expand(2, 1, 1, 2))
        tensor(5.)

    Reference: Yang et al., Masked Generative Distillation, ECCV 2022.
    """
    apart = rebuilt - teacher_map
    if keep is not None:
        apart = apart.where(keep[:, None], 0.0)
    return apart.square().sum() / max(len(rebuilt), 1)


def keep_mask(noise: Tensor, mask: Mask, mask_ratio: float) -> Tensor:
    """Return 1 where the student's map is kept and 0 where it is masked.

    Convention: channels are dropped where noise < ratio, positions where noise > 1 - ratio, as in the
    released codes; both drop the fraction `mask_ratio` on average. Kept values are not rescaled.

    Args:
        noise: uniform in [0, 1): `[B, C, 1, 1]` for channels, `[B, 1, H, W]` for positions.
        mask: what is dropped.
        mask_ratio: probability of being dropped (lambda).
    """
    dropped = noise < mask_ratio if mask == "channel" else noise > 1 - mask_ratio
    return (~dropped).to(noise.dtype)


@final
class MGD(Term):
    """Term form of :func:`mgd`: aligns widths, masks, generates with two 3x3 convolutions, compares.

    Several maps are compared pair by pair, each with layers and a mask of its own, and their losses added. Positions
    of ignored pixels are always masked, and not compared.

    Args:
        mask: `pixel` drops positions (paper, detection 0.65 or 0.45, segmentation 0.75); `channel` drops
            channels (classification, 0.15).
        mask_ratio: fraction dropped.
        student_tap: a map or tokens of the student, or a list; `fpn[*]` stands for all levels of a pyramid.
        teacher_tap: as many of the teacher; the student is brought to their grids. Tokens count as maps on a grid.
    """

    knows_ignored = True

    def __init__(
        self,
        *,
        mask: Mask = "pixel",
        mask_ratio: float = 0.65,
        student_tap: str | Mapping[str, Any] | Tap | Places = "map",
        teacher_tap: str | Mapping[str, Any] | Tap | Places = "map",
    ) -> None:
        super().__init__()
        if mask not in ("pixel", "channel"):
            raise UserError(f"mask {mask!r} is not known; valid: channel, pixel")
        if not 0 <= mask_ratio <= 1:
            raise UserError(f"mask_ratio is a fraction in [0, 1], not {mask_ratio}")
        self.mask: Mask = mask
        self.mask_ratio = mask_ratio
        one, other = ([tap] if isinstance(tap, (str, Mapping, Tap)) else tap for tap in (student_tap, teacher_tap))
        self.layers = Layers.parse(one, other)

    @property
    def reads(self) -> Reads:
        """The maps of both models."""
        return Reads(self.layers.student, self.layers.teacher)

    def build(self, student: Signals, teacher: Signals | None, facts: Facts) -> None:
        """Pair the maps; create for each pair the alignment, where widths or grids differ, and the generator.

        Raises:
            UserError: if a tap is neither a map nor tokens that fill a grid.
        """
        assert teacher is not None
        self.names = self.layers.pairs(student, teacher)
        aligns, generations = [], []
        for one, other in self.names:
            source, goal = student[one], teacher[other]
            if {source.ndim, goal.ndim} - {3, 4}:
                raise UserError(
                    "mgd rebuilds maps [B, C, H, W], or tokens [B, L, D] on their grid, "
                    f"not {list(source.shape)} and {list(goal.shape)}"
                )
            goal = grid_of(goal, source)
            width = goal.shape[1]
            aligns.append(across(source, goal))
            generations.append(
                nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))
            )
        several = len(self.names) > 1
        self.align = nn.ModuleList(aligns) if several else aligns[0]
        self.generation = nn.ModuleList(generations) if several else generations[0]

    def draw(self, student: Signals, teacher: Signals | None, batch: Batch, draw: Draw) -> Tensor | tuple[Tensor, ...]:
        """Return the noise that decides what is masked, a function of each sample's id; one a map, if several."""
        assert teacher is not None
        noise = []
        for salt, (one, other) in enumerate(self.layers.pairs(student, teacher)):
            _, channels, height, width = grid_of(teacher[other], student[one]).shape
            shape = (channels, 1, 1) if self.mask == "channel" else (1, height, width)
            noise.append(draw.uniform(batch.index, shape, salt))
        return tuple(noise) if len(noise) > 1 else noise[0]

    def forward(  # type: ignore[override]
        self, student: Signals, teacher: Signals, batch: Batch, noise: Tensor | tuple[Tensor, ...]
    ) -> Tensor:
        """Return the distance between the rebuilt and the teacher's maps, summed over levels."""
        aligns = self.align if isinstance(self.align, nn.ModuleList) else [self.align]
        generations = self.generation if isinstance(self.generation, nn.ModuleList) else [self.generation]
        drawn = [noise] if isinstance(noise, Tensor) else noise
        distances = []
        for (one, other), align, generate, place in zip(self.names, aligns, generations, drawn, strict=True):
            goal = grid_of(teacher[other], student[one])
            aligned = align(student[one], goal) if isinstance(align, Across) else align(student[one])
            masked = aligned * keep_mask(place, self.mask, self.mask_ratio).to(aligned.dtype)
            places = known(batch, goal)
            if places is not None:
                masked = masked.where(places[:, None], 0.0)
            distances.append(mgd(generate(masked), goal, places))
        return torch.stack(distances).sum()
