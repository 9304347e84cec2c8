# SPDX-License-Identifier: Apache-2.0
"""Learn from one labelled pixel an object: what is where, and what belongs together, teach each other.

A weak map of classes (the teacher's, among the classes that an image's points name) says which positions the points'
objects may cover; the instances found in it say which positions are alike; and along that likeness the student's
scores are refined. The released code takes a second sigmoid of the likeness and treats refined probabilities as
logits: `form="code"`.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, final, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tutelage.core import Batch, Card, Facts, Reads, Signals, Tap, Term
from tutelage.core.bridge import check_maps
from tutelage.core.error import UserError, nearest
from tutelage.functional.affinity import affinity, affinity_loss, random_walk
from tutelage.functional.precision import full_precision
from tutelage.functional.spatial import at_grid

CARD = Card(
    name="P2Seg",
    title="P2Seg: Pointly-supervised Segmentation via Mutual Distillation",
    authors="Wang, Yu, Han, Yu, Huang, Jiao, Han",
    year=2024,
    venue="ICLR",
    paper="arxiv:2401.09709",
    code="github:ucas-vg/P2Seg-Public@1a8dbfb",
    code_licence="MIT",
    claims="Semantic regions and instances, learned from points, improve each other.",
    reads={"student": ("map", "logits"), "teacher": ("logits",)},
    labels=("hard",),
    averages="samples",
    batch="independent",
    zero_at_teacher=False,
    golden=("vision/p2seg_affinity",),
)

OBJECTIVE = {"task": 1.0, "p2seg": {"weight": 1.0}}

Form = Literal["paper", "code"]
FLOOR = 1e-6  # of a probability whose logarithm is taken
UNKNOWN = -1


@full_precision
def p2seg(
    scores: Tensor,
    weak: Tensor,
    points: Tensor,
    places: Tensor,
    center: Tensor,
    offset: Tensor,
    embedding: Tensor,
    *,
    background: int = 0,
    sigma: float = 6.0,
    hardest: float = 0.2,
    lambda_center: float = 200.0,
    lambda_offset: float = 0.01,
    lambda_affinity: float = 1.0,
    form: Form = "paper",
) -> dict[str, Tensor]:
    """Return what semantic regions teach instances and instances teach semantic regions.

        center   = lambda_c mean_q ( c_q - max_p exp( -|q - p|^2 / (2 sigma^2) ) )^2
        offset   = lambda_o / 2 ( D(i) + D(r) ),  D(i) = mean over assigned q of | o_q - (i_q - q) |_1
        affinity = lambda_a / 2 ( A(i) + A(r) ),  A(i) = 1/2 sum_pos (1 - a) / (n_pos + 1) + 1/2 sum_neg a / (n_neg + 1)
        semantic = mean over the hardest positions of - log R[weak_q, q] / sum_k R[k, q]
        a = sigmoid( e_i . e_j ),  R = softmax over possible classes of the scores, times a divided by its row sums

    with i_q the point of q's weak class nearest to q, r_q the one nearest to q + o_q, and pairs positive where both
    went to one point.

    Convention:
        - assignments carry no gradient; possible classes are those of an image's points, and the background
        - each part is a mean within an image, then over images; positions without a weak class count 0,
          and so do images without a point
        - distances, offsets and sigma are in pixels of the batch

    Args:
        scores: `[B, K, P]` logits of the student at P positions; any float dtype, compared in float32 or wider.
        weak: `[B, P]` int64 classes of the weak map, -1 where unknown.
        points: `[B, P]` int64 class of the point at a position, -1 where there is none.
        places: `[P, 2]` y, x of the positions.
        center: `[B, P]` how much of a centre a position is.
        offset: `[B, 2, P]` y, x from a position to its point.
        embedding: `[B, D, P]`.
        background: class that is no thing: its positions belong to no point.
        sigma: width of a centre.
        hardest: share of the positions that count in the semantic part, in (0, 1].
        lambda_center: lambda_c.
        lambda_offset: lambda_o.
        lambda_affinity: lambda_a.
        form: `paper`; `code`: a second sigmoid over a in its loss, and R in the place of the possible classes' logits.

    Returns:
        `semantic`, `center`, `offset` and `affinity`: scalars with their coefficients, float32 or wider. Without rows
        connected zeros.

    Example:
        >>> one = torch.zeros(1, 2, 2)
        >>> where, places = torch.tensor([[1, -1]]), torch.tensor([[0.0, 0.0], [0.0, 8.0]])
        >>> parts = p2seg(one, torch.ones_like(where), where, places, one[:, 0], one, one, lambda_offset=1.0)
        >>> parts["offset"], parts["semantic"]
        (tensor(4.), tensor(0.6931))

    Reference: Wang et al., P2Seg, ICLR 2024.
    """
    images = max(len(scores), 1)
    things = points.where(points != background, UNKNOWN)
    apart = (places[:, None] - places).square().sum(2)
    height = torch.exp(apart / (-2 * sigma**2)).where(things[:, None] >= 0, 0.0).amax(2)
    likeness = affinity(embedding)
    compared = likeness.sigmoid() if form == "code" else likeness
    offsets, affinities = [], []
    for moved in (torch.zeros_like(offset), offset.detach()):
        goal = assign(weak, things, places, moved)
        inside = goal >= 0
        target = (places[goal.clamp(min=0)] - places).mT
        distance = (offset - target).abs().sum(1).where(inside, 0.0)
        offsets.append(distance.sum(1) / inside.sum(1).clamp(min=1))
        alike = (goal[:, :, None] == goal[:, None]) & inside[:, None]
        affinities.append(affinity_loss(compared, alike))
    valid = possible(points, scores.shape[1], background)
    loss = _semantic(scores, weak, likeness, valid, form)
    count = math.ceil(hardest * loss.shape[1])
    by_image = {
        "semantic": loss.topk(count, dim=1).values.mean(1),
        "center": lambda_center * (center - height).square().mean(1),
        "offset": lambda_offset * torch.stack(offsets).mean(0),
        "affinity": lambda_affinity * torch.stack(affinities).mean(0),
    }
    told = (points >= 0).any(1)
    return {part: value.where(told, 0.0).sum() / images for part, value in by_image.items()}


def _semantic(scores: Tensor, weak: Tensor, likeness: Tensor, valid: Tensor, form: Form) -> Tensor:
    """Return the cross-entropy of the refined scores with the weak map, `[B, P]`, 0 where that is unknown."""
    walked = random_walk(scores, likeness, valid)
    known, label = weak >= 0, weak.clamp(min=0)[:, None]
    if form == "code":
        refined = walked.where(valid[..., None], scores).log_softmax(1).gather(1, label)[:, 0]
    else:
        share = walked / walked.sum(1, keepdim=True).clamp(min=FLOOR)
        refined = share.gather(1, label)[:, 0].clamp(min=FLOOR).log()
    return (-refined).where(known, 0.0)


def possible(points: Tensor, num_classes: int, background: int) -> Tensor:
    """Return the classes of an image's points, and the background: `[B, P]` to `[B, K]` bool."""
    there = F.one_hot(points + 1, num_classes + 1)[..., 1:].amax(1) > 0
    ground = torch.arange(num_classes, device=points.device) == background
    return there | ground


@torch.no_grad()
def assign(weak: Tensor, things: Tensor, places: Tensor, offset: Tensor) -> Tensor:
    """Return the position of the point that each position belongs to, `[B, P]`, -1 without one.

    Args:
        weak: `[B, P]` classes.
        things: `[B, P]` class of the point at a position, -1 where there is none.
        places: `[P, 2]`.
        offset: `[B, 2, P]`, added to a position before the nearest point is sought.
    """
    moved = places + offset.mT
    # |a - b|^2 multiplied out would lose the digits that decide between points
    down, across = (moved[..., axis, None] - places[:, axis] for axis in (0, 1))
    allowed = (things[:, None] == weak[..., None]) & (things[:, None] >= 0)
    distance = (down.square() + across.square()).masked_fill(~allowed, torch.inf)
    return distance.argmin(2).where(allowed.any(2), UNKNOWN)


def points_at(target: Tensor, height: int, width: int) -> Tensor:
    """Return the class of the labelled pixel in each cell of a grid, -1 without one; of several the highest class.

    Args:
        target: `[B, H, W]` int64, -1 where unknown.
        height: of the grid.
        width: of the grid.

    Returns:
        `[B, height * width]`.

    Example:
        >>> points_at(torch.tensor([[[-1, 2, -1, -1]]]), 1, 2)
        tensor([[ 2, -1]])
    """
    rows, columns = (
        torch.arange(side, device=target.device) * cells // side
        for side, cells in zip(target.shape[1:], (height, width), strict=True)
    )
    cell = (rows[:, None] * width + columns).flatten().expand(len(target), -1)
    empty = torch.full((len(target), height * width), UNKNOWN, device=target.device)
    return empty.scatter_reduce(1, cell, target.flatten(1), "amax")


def centers_of(height: int, width: int, size: tuple[int, int], like: Tensor) -> Tensor:
    """Return y, x of the middle of each cell of a grid over an image of (height, width) pixels: `[P, 2]`."""
    sides = [
        (torch.arange(cells, device=like.device, dtype=like.dtype) + 0.5) * (pixels / cells)
        for cells, pixels in zip((height, width), size, strict=True)
    ]
    return torch.cartesian_prod(*sides).view(-1, 2)


@final
class P2Seg(Term):
    """Term form of :func:`p2seg`. The batch's class maps hold points: all pixels but one an object are unknown.

    The term has heads of its own on the student's map for centres, offsets and likeness; they are trained along and
    dropped. The weak map is the teacher's choice among the classes that an image's points name, and the background.
    Images without a point teach nothing.

    Args:
        background: see :func:`p2seg`.
        sigma: see :func:`p2seg`.
        hardest: see :func:`p2seg`.
        lambda_center: see :func:`p2seg`.
        lambda_offset: see :func:`p2seg`.
        lambda_affinity: see :func:`p2seg`.
        form: see :func:`p2seg`.
        side: larger maps are averaged to so many cells a side: memory grows with its fourth power.
        width: of the heads' hidden layer, and of the embedding.
        student_tap: the map that the heads stand on.
    """

    knows_ignored = True

    def __init__(
        self,
        *,
        background: int = 0,
        sigma: float = 6.0,
        hardest: float = 0.2,
        lambda_center: float = 200.0,
        lambda_offset: float = 0.01,
        lambda_affinity: float = 1.0,
        form: Form = "paper",
        side: int = 52,
        width: int = 64,
        student_tap: str | Mapping[str, Any] | Tap = "map",
    ) -> None:
        super().__init__()
        if form not in get_args(Form):
            raise UserError(f"form {form!r} is not known{nearest(str(form), get_args(Form))}")
        if not 0 < hardest <= 1:
            raise UserError(f"hardest is a share in (0, 1], not {hardest}")
        if sigma <= 0:
            raise UserError(f"sigma must be > 0 pixels, not {sigma}")
        if min(side, width) < 1:
            raise UserError(f"side and width are at least 1, not {side} and {width}")
        self.background, self.sigma, self.hardest = background, sigma, hardest
        self.lambda_center, self.lambda_offset, self.lambda_affinity = lambda_center, lambda_offset, lambda_affinity
        self.form: Form = form
        self.side, self.width = side, width
        self.student_tap = Tap.parse(student_tap)

    @property
    def reads(self) -> Reads:
        """A map and the scores of the student, the scores of the teacher."""
        return Reads((self.student_tap, Tap("logits")), (Tap("logits"),))

    def build(self, student: Signals, teacher: Signals | None, facts: Facts) -> None:
        """Create the heads.

        Raises:
            UserError: if map or logits are no maps, or the background is no class.
        """
        assert teacher is not None
        source = student[self.student_tap.name]
        check_maps(student.logits, teacher.logits, "p2seg")
        check_maps(source, student.logits, "p2seg")
        if not 0 <= self.background < student.logits.shape[1]:
            raise UserError(f"background is one of {student.logits.shape[1]} classes, not {self.background}")
        wide = source.shape[1]
        self.instance = nn.Sequential(
            nn.Conv2d(wide, self.width, 3, padding=1), nn.ReLU(), nn.Conv2d(self.width, 3, 1)
        ).to(source.device)
        self.embed = nn.Conv2d(wide, self.width, 1).to(source.device)

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> dict[str, Tensor]:  # type: ignore[override]
        """Return the parts `semantic`, `center`, `offset` and `affinity`.

        Raises:
            UserError: if the data has no class maps.
        """
        target = batch.target
        if not (isinstance(target, Tensor) and target.ndim == 3 and not target.is_floating_point()):
            given = f"{list(target.shape)}" if isinstance(target, Tensor) else type(target).__name__
            raise UserError(f"p2seg learns from labelled pixels, and needs class maps [B, H, W], not {given}")
        source, classes = student[self.student_tap.name], student.logits.shape[1]
        height, width = (min(cells, self.side) for cells in source.shape[2:])
        size = (height, width)
        source = at_grid(source, size)
        scores, taught = (at_grid(side.logits, size).flatten(2) for side in (student, teacher))
        rows = batch.labelled if batch.labelled.ndim == 3 else batch.labelled[:, None, None]
        known = target.where(rows & (target >= 0) & (target < classes), UNKNOWN)
        points = points_at(known, height, width)
        valid = possible(points, classes, self.background)
        lowest = torch.finfo(taught.dtype).min
        weak = taught.masked_fill(~valid[..., None], lowest).argmax(1)
        weak = weak.where((points >= 0).any(1, keepdim=True), UNKNOWN)
        instance = self.instance(source).flatten(2)
        return p2seg(
            scores,
            weak,
            points,
            centers_of(height, width, (target.shape[1], target.shape[2]), scores),
            instance[:, 0],
            instance[:, 1:],
            self.embed(source).flatten(2),
            background=self.background,
            sigma=self.sigma,
            hardest=self.hardest,
            lambda_center=self.lambda_center,
            lambda_offset=self.lambda_offset,
            lambda_affinity=self.lambda_affinity,
            form=self.form,
        )
