# SPDX-License-Identifier: Apache-2.0
"""Let a convolutional and a transformer student learn from each other what each is surer of; both are kept.

Early features mimic the peer's, perhaps behind the peer's next block; regions and pixels are taught by whoever does
better on them. The term is one direction: a pair has two. There is no official code, and where the paper was not at
hand the equations are our own: see the page.
"""

from collections.abc import Mapping
from typing import Any, Literal, final, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from tutelage.core import Batch, Card, Facts, Reads, Signals, Tap, Term
from tutelage.core.bridge import bridge, check_maps
from tutelage.core.error import UserError, nearest
from tutelage.functional.divergence import kl_divergence
from tutelage.functional.pairwise import unit
from tutelage.functional.precision import full_precision
from tutelage.functional.spatial import at_grid, class_maps, match_kept, small_labels, taking_part

CARD = Card(
    name="HFD+BSD",
    title="A Good Student is Cooperative and Reliable: "
    "CNN-Transformer Collaborative Learning for Semantic Segmentation",
    authors="Zhu, Luo, Zheng, Wang, Wang",
    year=2023,
    venue="ICCV",
    paper="arxiv:2307.12574",
    code=None,
    code_licence=None,
    claims="A CNN and a transformer that exchange what each is reliable on both segment better.",
    reads={"student": ("stages[0]", "map", "logits"), "teacher": ("stages[0]", "map", "logits")},
    labels=("hard",),
    averages="samples",
    batch="independent",
    zero_at_teacher=True,
    golden=(),
    provenance="reconstruction",
)

OBJECTIVE = {
    "task": 1.0,
    "hfd_bsd": {"weight": {"linear": [0.0, 1.0], "until": 0.1}, "student": "student", "teacher": "peer"},
    "peer": {
        "method": "hfd_bsd",
        "weight": {"linear": [0.0, 1.0], "until": 0.1},
        "student": "peer",
        "teacher": "student",
    },
}

Regions = Literal["class", "grid"]
Pair = tuple[Tensor, Tensor]


@full_precision
def hfd_bsd(
    logits: Pair,
    low: Pair,
    high: Pair,
    target: Tensor,
    *,
    lambda_low: float = 0.1,
    lambda_region: float = 0.1,
    lambda_pixel: float = 1.0,
    temperature: float = 1.0,
    regions: Regions = "class",
    cells: int = 4,
) -> dict[str, Tensor]:
    """Return what one student learns from its peer.

        low    = lambda_1 / B sum_b mean over places and channels of ( P f_own - f_peer )^2
        region = lambda_2 / B sum_b sum_r [ l_peer(r) < l_own(r) ] ( 1 - cos( P h_own(r), h_peer(r) ) )
        pixel  = lambda_3 / B sum_b mean over p with y_p = argmax z_peer(p) and l_peer(p) < l_own(p) of
                 T^2 KL( softmax(z_peer(p) / T) || softmax(z_own(p) / T) )

    with l the cross-entropy of a pixel, or its mean over a region, and h(r) the mean of the high features there.

    Convention:
        - the student first, its peer second in each pair; the peer is a constant, and KL runs from it to the student
        - score maps of two sizes meet on the larger (bilinear), low features on the smaller (averaged over cells),
          high features each on its own grid; class maps are made small by the nearest pixel above and left
        - regions are summed, pixels averaged within an image; images are averaged; where both do equally well nobody
          teaches; pixels without a label neither teach nor count, but for the low features of an image without any

    Args:
        logits: two `[B, K, H, W]`, of any two sizes and float dtype; compared in float32 or wider.
        low: two maps `[B, C, h, w]` of early features, the student's at the peer's width.
        high: two maps of late features, the student's at the peer's width.
        target: `[B, Y, X]` int64 classes, -1 where unknown.
        lambda_low: lambda_1.
        lambda_region: lambda_2.
        lambda_pixel: lambda_3.
        temperature: T, > 0.
        regions: the pixels of each `class`, or the cells of a `grid`.
        cells: of the grid, a side.

    Returns:
        `low`, `region` and `pixel`: scalars with their coefficients, float32 or wider. Without rows connected zeros.

    Raises:
        UserError: if the two score maps have different classes.

    Example:
        >>> one, sure = torch.zeros(1, 2, 1, 1), torch.tensor([[[[0.0]], [[1.0]]]])
        >>> hfd_bsd((one, sure), (one, one), (one, one), torch.tensor([[[1]]]))["pixel"]
        tensor(0.1109)

    Reference: Zhu et al., A Good Student is Cooperative and Reliable, ICCV 2023.
    """
    own, peer = _common(*logits)
    rows, classes, height, width = own.shape
    labels = small_labels(target, height, width)
    losses = [F.cross_entropy(scores, labels, ignore_index=-1, reduction="none") for scores in (own.detach(), peer)]
    taught = (labels >= 0) & (peer.argmax(1) == labels) & (losses[1] < losses[0])
    apart = kl_divergence(own.movedim(1, -1) / temperature, peer.movedim(1, -1) / temperature)
    by_image = apart.where(taught, 0.0).sum((1, 2)) / taught.sum((1, 2)).clamp(min=1)
    number = classes if regions == "class" else cells**2
    places = _members(labels, labels, regions, number, cells)
    ours, theirs = (_mean_of(loss[:, None], places)[0][..., 0] for loss in losses)
    count = places.sum(2)
    vectors = []
    for features in high:
        small = small_labels(target, *features.shape[2:])
        means, inside = _mean_of(
            features, _members(small, _compared(target, features).long() - 1, regions, number, cells)
        )
        vectors.append(unit(means))
        count = torch.minimum(count, inside)
    distance = 1 - (vectors[0] * vectors[1]).sum(2)
    by_region = distance.where((count > 0) & (theirs < ours), 0.0).sum(1)
    near, far, compared = match_kept(*low, _compared(target, low[0]), _compared(target, low[1]))
    assert compared is not None
    square = (near - far).square().mean(1).where(compared, 0.0).sum((1, 2)) / compared.sum((1, 2)).clamp(min=1)
    return {
        "low": lambda_low * square.sum() / max(rows, 1),
        "region": lambda_region * by_region.sum() / max(rows, 1),
        "pixel": lambda_pixel * temperature**2 * by_image.sum() / max(rows, 1),
    }


def _common(one: Tensor, other: Tensor) -> Pair:
    """Return two score maps at the size of the larger."""
    if one.shape[1] != other.shape[1]:
        raise UserError(
            f"hfd_bsd compares score maps of the same classes: the student's is {list(one.shape)}, "
            f"the peer's {list(other.shape)}"
        )
    size = max(tuple(one.shape[2:]), tuple(other.shape[2:]))
    first, second = (
        side if tuple(side.shape[2:]) == size else F.interpolate(side, size, mode="bilinear", align_corners=False)
        for side in (one, other)
    )
    return first, second


def _compared(target: Tensor, features: Tensor) -> Tensor:
    """Return the places of a map that take part, all but those of ignored pixels: `[B, H, W]` bool."""
    every = torch.ones(len(target), dtype=torch.bool, device=target.device)
    places = taking_part(target, every, *features.shape[2:])
    assert places is not None
    return places


def _members(labels: Tensor, known: Tensor, regions: Regions, number: int, cells: int) -> Tensor:
    """Return which positions lie in which region, `[B, R, P]`; positions that are not known lie in none of a grid."""
    if regions == "class":
        place = labels
    else:
        height, width = labels.shape[1:]
        rows, columns = (torch.arange(side, device=labels.device) * cells // side for side in (height, width))
        place = (rows[:, None] * cells + columns).expand_as(labels).where(known >= 0, -1)
    return F.one_hot(place.flatten(1) + 1, number + 1)[..., 1:].mT


def _mean_of(features: Tensor, members: Tensor) -> Pair:
    """Return the mean of `[B, C, H, W]` features over each region, `[B, R, C]`, and its positions, `[B, R]`."""
    count = members.sum(2)
    total = members.to(features.dtype) @ features.flatten(2).mT
    return total / count.clamp(min=1)[..., None], count


@final
class HFDBSD(Term):
    """Term form of :func:`hfd_bsd`: `student` learns from the student that stands in the teacher's place.

    Args:
        lambda_low: see :func:`hfd_bsd`.
        lambda_region: see :func:`hfd_bsd`.
        lambda_pixel: see :func:`hfd_bsd`.
        temperature: see :func:`hfd_bsd`.
        regions: see :func:`hfd_bsd`.
        cells: see :func:`hfd_bsd`.
        through: path of the module of the peer that makes its next map of its early features, such as `layer2`; the
            student's early features are passed through it too, and compared with what it made. None compares them
            before it.
        student_low: early features of the student.
        teacher_low: early features of its peer.
        student_high: late features of the student.
        teacher_high: late features of its peer.
    """

    knows_ignored = True

    def __init__(
        self,
        *,
        lambda_low: float = 0.1,
        lambda_region: float = 0.1,
        lambda_pixel: float = 1.0,
        temperature: float = 1.0,
        regions: Regions = "class",
        cells: int = 4,
        through: str | None = None,
        student_low: str | Mapping[str, Any] | Tap = "stages[0]",
        teacher_low: str | Mapping[str, Any] | Tap = "stages[0]",
        student_high: str | Mapping[str, Any] | Tap = "map",
        teacher_high: str | Mapping[str, Any] | Tap = "map",
    ) -> None:
        super().__init__()
        if regions not in get_args(Regions):
            raise UserError(f"regions {regions!r} is not known{nearest(str(regions), get_args(Regions))}")
        if temperature <= 0:
            raise UserError(f"temperature must be > 0, not {temperature}")
        if cells < 1:
            raise UserError(f"cells is at least 1, not {cells}")
        self.lambda_low, self.lambda_region, self.lambda_pixel = lambda_low, lambda_region, lambda_pixel
        self.temperature, self.cells = temperature, cells
        self.regions: Regions = regions
        self.low = Tap.parse(student_low), Tap.parse(teacher_low)
        self.high = Tap.parse(student_high), Tap.parse(teacher_high)
        self.through = through

    @property
    def reads(self) -> Reads:
        """Early and late features, and score maps; of the peer what the next block made, and the block."""
        behind = () if self.through is None else (self.through,)
        return Reads(
            (self.low[0], self.high[0], Tap("logits")),
            (self.low[1], self.high[1], Tap("logits"), *map(Tap, behind)),
            calls=behind,
        )

    def build(self, student: Signals, teacher: Signals | None, facts: Facts) -> None:
        """Create the two convolutions to the peer's widths.

        Raises:
            UserError: if a tap or the logits are no maps, or the block does not make its map of the early features.
        """
        assert teacher is not None
        check_maps(student.logits, teacher.logits, "hfd_bsd")
        pairs = [(student[one.name], teacher[other.name]) for one, other in (self.low, self.high)]
        for one, other in pairs:
            check_maps(one, other, "hfd_bsd")
        self.project_low, self.project_high = (bridge(one, other) for one, other in pairs)
        if self.through is not None:
            with torch.no_grad():
                made = self.passed(teacher, teacher[self.low[1].name])
            if made.shape != teacher[self.through].shape:
                raise UserError(
                    f"through: {self.through!r} makes {list(made.shape)} of the peer's early features, and "
                    f"{list(teacher[self.through].shape)} of what the peer gives it; name the block behind teacher_low"
                )
            check_maps(made, made, "hfd_bsd")

    def passed(self, teacher: Signals, features: Tensor) -> Tensor:
        """Return what the peer's next block makes of features at the peer's width and grid.

        Raises:
            UserError: if it does not take them.
        """
        assert self.through is not None
        try:
            made = teacher.borrowed[self.through](features)
        except (RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"through: {self.through!r} takes no {list(features.shape)} ({str(error).splitlines()[0]}); "
                "name the block behind teacher_low"
            ) from error
        return made if isinstance(made, Tensor) else next(one for one in made if isinstance(one, Tensor))

    def early(self, student: Signals, teacher: Signals, target: Tensor) -> Pair:
        """Return the early features that are compared, the student's at the peer's width."""
        own, peer = self.project_low(student[self.low[0].name]), teacher[self.low[1].name]
        if self.through is None:
            return own, peer
        places = _compared(target, own)
        there = at_grid(own.where(places[:, None], 0.0), (peer.shape[2], peer.shape[3]), places)
        return self.passed(teacher, there.where(_compared(target, peer)[:, None], 0.0)), teacher[self.through]

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> dict[str, Tensor]:  # type: ignore[override]
        """Return the parts `low`, `region` and `pixel`.

        Raises:
            UserError: if the data has no class maps.
        """
        target = batch.target
        if not (isinstance(target, Tensor) and target.ndim == 3 and not target.is_floating_point()):
            given = f"{list(target.shape)}" if isinstance(target, Tensor) else type(target).__name__
            raise UserError(f"hfd_bsd asks who is right at each pixel, and needs class maps [B, H, W], not {given}")
        labels = class_maps(target, batch.labelled, student.logits.shape[1], *target.shape[1:])
        return hfd_bsd(
            (student.logits, teacher.logits),
            self.early(student, teacher, labels),
            (self.project_high(student[self.high[0].name]), teacher[self.high[1].name]),
            labels,
            lambda_low=self.lambda_low,
            lambda_region=self.lambda_region,
            lambda_pixel=self.lambda_pixel,
            temperature=self.temperature,
            regions=self.regions,
            cells=self.cells,
        )
