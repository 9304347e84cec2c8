# SPDX-License-Identifier: Apache-2.0
"""Match the class probabilities of every pixel, and which regions of an image the teacher finds alike.

The method's third part, a discriminator that tells whole score maps apart, is not here. The released pixel part is
a sum over the images of one device; the default is its mean, `form="sum"` the released value. There ignored pixels
count like others; here they take no part where class maps say which they are.
"""

from collections.abc import Mapping
from typing import Any, Literal, final

import torch
from torch import Tensor
from torch.nn import functional as F

from tutelage.core import Batch, Card, Facts, Reads, Signals, Tap, Term
from tutelage.core.bridge import check_maps
from tutelage.core.error import UserError
from tutelage.core.ignored import known
from tutelage.functional.block import spans, sum_over
from tutelage.functional.divergence import cross_entropy
from tutelage.functional.precision import full_precision
from tutelage.functional.spatial import match_kept, over_kept

CARD = Card(
    name="SKD",
    title="Structured Knowledge Distillation for Semantic Segmentation",
    authors="Liu, Chen, Liu, Qin, Luo, Wang",
    year=2019,
    venue="CVPR",
    paper="arxiv:1903.04197",
    code="github:irfanICMLL/structure_knowledge_distillation@ce208e1",
    code_licence="BSD-2-Clause",
    claims="Pixel-wise and pair-wise distillation together improve compact segmentation networks.",
    reads={"student": ("logits", "map"), "teacher": ("logits", "map")},
    labels=("none",),
    averages="samples",
    batch="independent",
    zero_at_teacher=False,
    golden=("classic/skd",),
)

OBJECTIVE = {"task": 1.0, "skd": {"weight": 1.0}}

Form = Literal["mean", "sum"]


def regions(feature_map: Tensor, pool_scale: float, keep: Tensor | None = None) -> Tensor:
    """Return the strongest activations of each region, as vectors of length one.

    Args:
        feature_map: `[B, C, H, W]`.
        pool_scale: height and width of a region, as a share of the map's.
        keep: `[B, H, W]` bool, the places that take part; None keeps all. A region without any is zeros.

    Returns:
        `[B, P, C]`. The length is a constant, and a vector of zeros stays zero, without gradient.
    """
    size = [max(1, int(side * pool_scale)) for side in feature_map.shape[2:]]
    if keep is not None:
        feature_map = feature_map.masked_fill(~keep[:, None], -torch.inf)
    pooled = F.max_pool2d(feature_map, size, size, ceil_mode=True).flatten(2).mT
    if keep is not None:
        pooled = pooled.masked_fill(pooled == -torch.inf, 0.0)
    length = torch.linalg.vector_norm(pooled.detach(), dim=2, keepdim=True)
    return torch.where(length > 0, pooled / (length + 1e-8), 0.0)


@full_precision
def skd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_map: Tensor,
    teacher_map: Tensor,
    *,
    lambda_pixel: float = 10.0,
    lambda_pair: float = 1.0,
    pool_scale: float = 0.5,
    form: Form = "mean",
    keep: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
) -> dict[str, Tensor]:
    """Return the pixel-wise and the pair-wise part.

        pixel = lambda_pi / (B H W) * sum_b sum_p CE( softmax(t_bp), softmax(s_bp) )
        pair  = lambda_pa / B * sum_b 1 / P^2 * sum_ij ( < f_i, f_j >(s) - < f_i, f_j >(t) )^2

    with f_i the strongest activations of region i, a vector of length one.

    Convention:
        - the pixel part is a cross-entropy, the teacher's entropy left in, without a temperature
        - regions do not overlap; those at the right and lower edge may be smaller
        - the length of f is a constant, so that gradients have a part along f
        - averaged over images (`sum`: the pixel part is summed over them), within each over the places that are kept

    Args:
        student_logits: `[B, K, H, W]`, any float dtype; compared in float32 or wider.
        teacher_logits: `[B, K, H, W]`.
        student_map: `[B, C, h, w]`.
        teacher_map: `[B, C', h', w']`, which must give as many regions.
        lambda_pixel: coefficient of the pixel part.
        lambda_pair: coefficient of the pair part (0.5 in the authors' script).
        pool_scale: height and width of a region, as a share of the map's, in (0, 1].
        form: of the pixel part: `mean` over images, or `sum` (the released code).
        keep: `[B, H, W]` bool for score maps, student's and teacher's features: places that take part; None keeps
            all, as the released code does.

    Returns:
        `pixel` and `pair`: scalars with their coefficients, float32 or wider; their sum is the loss. Without
        rows connected zeros.

    Raises:
        UserError: if the score maps or the numbers of regions differ.

    Example:
        >>> scores, one = torch.zeros(1, 2, 2, 2), torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])
        >>> parts = skd(scores, scores, one, one[:, [1, 1]], lambda_pixel=1.0)
        >>> parts["pixel"], parts["pair"]
        (tensor(0.6931), tensor(0.2500))

    Reference: Liu et al., Structured Knowledge Distillation for Semantic Segmentation, CVPR 2019.
    """
    if student_logits.shape != teacher_logits.shape:
        raise UserError(
            f"skd compares score maps of one shape: the student's is {list(student_logits.shape)}, "
            f"the teacher's {list(teacher_logits.shape)}"
        )
    images, _, height, width = student_logits.shape
    rows = cross_entropy(student_logits.movedim(1, -1), teacher_logits.movedim(1, -1))
    pixel = over_kept(rows, keep[0]).sum() / (height * width)
    if form == "mean":
        pixel = pixel / max(images, 1)
    student, teacher = regions(student_map, pool_scale, keep[1]), regions(teacher_map, pool_scale, keep[2])
    if student.shape[:2] != teacher.shape[:2]:
        raise UserError(
            f"skd compares regions: the student's map {list(student_map.shape)} gives {student.shape[1]}, "
            f"the teacher's {list(teacher_map.shape)} gives {teacher.shape[1]}; tap layers of equal stride"
        )

    def compare(start: int, stop: int, s: Tensor, t: Tensor) -> Tensor:
        return (s[:, start:stop] @ s.mT - t[:, start:stop] @ t.mT).square().sum()

    count = student.shape[1]
    pair = sum_over(spans(count, images * count), compare, student, teacher) / (max(images, 1) * count**2)
    return {"pixel": lambda_pixel * pixel, "pair": lambda_pair * pair}


@final
class SKD(Term):
    """Term form of :func:`skd`; of score maps of two sizes the larger one is averaged to the smaller.

    Args:
        lambda_pixel: see :func:`skd`.
        lambda_pair: see :func:`skd`.
        pool_scale: see :func:`skd`.
        form: see :func:`skd`.
        student_tap: a map of the student: the deepest features.
        teacher_tap: a map of the teacher.
    """

    knows_ignored = True

    def __init__(
        self,
        *,
        lambda_pixel: float = 10.0,
        lambda_pair: float = 1.0,
        pool_scale: float = 0.5,
        form: Form = "mean",
        student_tap: str | Mapping[str, Any] | Tap = "map",
        teacher_tap: str | Mapping[str, Any] | Tap = "map",
    ) -> None:
        super().__init__()
        if form not in ("mean", "sum"):
            raise UserError(f"form {form!r} is not known; valid: mean, sum")
        if not 0 < pool_scale <= 1:
            raise UserError(f"pool_scale is a share in (0, 1], not {pool_scale}")
        self.lambda_pixel, self.lambda_pair, self.pool_scale = lambda_pixel, lambda_pair, pool_scale
        self.form: Form = form
        self.student_tap, self.teacher_tap = Tap.parse(student_tap), Tap.parse(teacher_tap)

    @property
    def reads(self) -> Reads:
        """The score maps and the features."""
        return Reads((Tap("logits"), self.student_tap), (Tap("logits"), self.teacher_tap))

    def build(self, student: Signals, teacher: Signals | None, facts: Facts) -> None:
        """Look at the shapes.

        Raises:
            UserError: if logits or taps are no maps.
        """
        assert teacher is not None
        check_maps(student.logits, teacher.logits, "skd")
        check_maps(student[self.student_tap.name], teacher[self.teacher_tap.name], "skd")

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> dict[str, Tensor]:  # type: ignore[override]
        """Return the parts `pixel` and `pair`."""
        logits = student.logits, teacher.logits
        ours, theirs, places = match_kept(*logits, known(batch, logits[0]), known(batch, logits[1]))
        maps = student[self.student_tap.name], teacher[self.teacher_tap.name]
        return skd(
            ours,
            theirs,
            *maps,
            lambda_pixel=self.lambda_pixel,
            lambda_pair=self.lambda_pair,
            pool_scale=self.pool_scale,
            form=self.form,
            keep=(places, known(batch, maps[0]), known(batch, maps[1])),
        )
