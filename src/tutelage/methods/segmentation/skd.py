# SPDX-License-Identifier: Apache-2.0
"""Match the class probabilities of every pixel, which regions the teacher finds alike, and score maps as wholes.

For the last a discriminator learns along to tell the two models' score maps apart. In the paper it is shown the
image too, in the released code it is not. The released pixel part is a sum over the images of one device; the default
is its mean, `form="sum"` the released value. There ignored pixels count like others; here they take no part where
class maps say which they are.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp
from torch.nn import functional as F

from tutelage.core import Batch, Card, Draw, Facts, Reads, Signals, Tap, Term
from tutelage.core.bridge import check_maps
from tutelage.core.error import UserError
from tutelage.core.ignored import known
from tutelage.functional.block import spans, sum_over
from tutelage.functional.divergence import cross_entropy
from tutelage.functional.precision import full_precision
from tutelage.functional.spatial import match, match_kept, over_kept

CARD = Card(
    name="SKD",
    title="Structured Knowledge Distillation for Semantic Segmentation",
    authors="Liu, Chen, Liu, Qin, Luo, Wang",
    year=2019,
    venue="CVPR",
    paper="arxiv:1903.04197",
    code="github:irfanICMLL/structure_knowledge_distillation@ce208e1",
    code_licence="BSD-2-Clause",
    claims="Pixel-wise, pair-wise and holistic distillation together improve compact segmentation networks.",
    reads={"student": ("logits", "map"), "teacher": ("logits", "map")},
    labels=("none",),
    averages="samples",
    batch="independent",
    zero_at_teacher=False,
    adversarial=True,
    golden=("classic/skd",),
)

OBJECTIVE = {"task": 1.0, "skd": {"weight": 1.0}}

Form = Literal["mean", "sum"]
Judge = Callable[[Tensor], Tensor]
KERNEL = 4  # of every convolution of the discriminator
DEEPEST = 4  # convolutions of stride 2, at most
IMAGE_CHANNELS = 3


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


@full_precision
def adversary(
    student_logits: Tensor,
    teacher_logits: Tensor,
    share: Tensor,
    fixed: Judge,
    learning: Judge,
    *,
    lambda_holistic: float = 0.1,
    lambda_penalty: float = 10.0,
) -> dict[str, Tensor]:
    """Return what the student loses to the discriminator, and what the discriminator learns by.

        holistic      = - lambda_ho / B * sum_b D(s_b)
        discriminator = lambda_ho / B * sum_b [ D(s_b) - D(t_b) + lambda_gp ( | grad D(x_b) |_2 - 1 )^2 ]
        x_b = u_b t_b + (1 - u_b) s_b

    Convention:
        - D is high for the teacher's score maps: the student climbs what the discriminator descends
        - in the second part the student's scores are constants, in the first the discriminator's weights
        - the length of the gradient runs over all scores of an image; averaged over images

    Args:
        student_logits: `[B, K, H, W]`, any float dtype; float32 or wider inside.
        teacher_logits: `[B, K, H, W]`.
        share: u, `[B, 1]` in [0, 1).
        fixed: D whose weights are constants: score maps to `[B]`.
        learning: D whose weights learn.
        lambda_holistic: lambda_ho.
        lambda_penalty: lambda_gp.

    Returns:
        `holistic` and `discriminator`: scalars with their coefficients, float32 or wider. Without rows connected
        zeros.

    Example:
        >>> flat = torch.ones(1, 1, 2, 2)
        >>> parts = adversary(flat, 3 * flat, torch.zeros(1, 1), *[lambda x: x.sum((1, 2, 3))] * 2, lambda_holistic=1.0)
        >>> parts["holistic"], parts["discriminator"]
        (tensor(-4.), tensor(2.))

    Reference: Liu et al., CVPR 2019; the penalty by Gulrajani et al., NeurIPS 2017.
    """
    images = max(len(student_logits), 1)
    constant = student_logits.detach()
    between = teacher_logits.lerp(constant, 1 - share.to(constant.dtype)[..., None, None])
    scores, back, *_ = vjp(learning, between)
    length = torch.linalg.vector_norm(back(torch.ones_like(scores))[0].flatten(1), dim=1)
    rows = learning(constant) - learning(teacher_logits) + lambda_penalty * (length - 1).square()
    return {
        "holistic": -lambda_holistic * fixed(student_logits).sum() / images,
        "discriminator": lambda_holistic * rows.sum() / images,
    }


class SelfAttention(nn.Module):
    """Adds to each place what all places say, times a number that starts at 0.

    Args:
        width: of the map.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        narrow = max(width // 8, 1)
        self.query, self.key = nn.Conv2d(width, narrow, 1), nn.Conv2d(width, narrow, 1)
        self.value = nn.Conv2d(width, width, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, values: Tensor) -> Tensor:
        """Return a map of the same shape."""
        query, key, value = (layer(values).flatten(2) for layer in (self.query, self.key, self.value))
        # written out: the fused kernels cannot be differentiated twice, as the penalty is
        seen = value @ (query.mT @ key).softmax(2).mT
        mixed: Tensor = self.gamma * seen.unflatten(2, values.shape[2:]) + values
        return mixed


class Discriminator(nn.Module):
    """Five convolutions, of which four halve the grid, and self-attention between the last three: one score an image.

    Smaller grids are halved less often, down to the last kernel. There is no batch norm, which would judge an image
    by its neighbours.

    Args:
        channels: classes, and those of the image if it is shown.
        grid: (height, width) of the score maps.
        width: of the first convolution; each further one has twice as many channels.
    """

    def __init__(self, channels: int, grid: tuple[int, int], width: int = 64) -> None:
        super().__init__()
        side, turns = min(grid), 0
        while turns < DEEPEST and side // 2 >= KERNEL:
            side, turns = side // 2, turns + 1
        last = min(KERNEL, side)
        self.smallest = last << turns
        layers: list[nn.Module] = []
        for turn in range(turns):
            layers += [nn.Conv2d(channels, width << turn, KERNEL, 2, 1), nn.LeakyReLU(0.1)]
            channels = width << turn
            if turn >= turns - 2:
                layers.append(SelfAttention(channels))
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, last))

    def forward(self, scores: Tensor, image: Tensor | None = None) -> Tensor:
        """Return `[B]`, the mean over what is left of the grid.

        Args:
            scores: `[B, K, H, W]`, of which the hyperbolic tangent is judged.
            image: `[B, 3, H, W]` in [-1, 1], or None.

        Raises:
            UserError: if the maps are smaller than those it was made for allow.
        """
        if min(scores.shape[2:]) < self.smallest:
            raise UserError(
                f"skd: the discriminator was made for score maps of at least {self.smallest} places a side, and meets "
                f"{scores.shape[2]}x{scores.shape[3]}; give images one size, or set lambda_holistic to 0"
            )
        seen = scores.tanh()
        found: Tensor = self.layers(seen if image is None else torch.cat([seen, image], 1))
        return found.mean((1, 2, 3))

    def judge(self, image: Tensor | None, *, learns: bool) -> Judge:
        """Return the map from scores to `[B]`, in the precision of the scores; its weights are constants or learn."""
        weights = {name: one if learns else one.detach() for name, one in self.named_parameters()}

        def judged(scores: Tensor) -> Tensor:
            alike = {name: one.to(scores.dtype) for name, one in weights.items()}
            shown = None if image is None else image.to(scores.dtype)
            found: Tensor = functional_call(self, alike, (scores, shown))
            return found

        return judged


@final
class SKD(Term):
    """Term form of :func:`skd` and :func:`adversary`; the discriminator is trained along and dropped.

    Of score maps of two sizes the larger one is averaged to the smaller. The discriminator's step and the student's
    are one, each with what the other was before.

    Args:
        lambda_pixel: see :func:`skd`.
        lambda_pair: see :func:`skd`.
        pool_scale: see :func:`skd`.
        form: see :func:`skd`.
        lambda_holistic: see :func:`adversary`; 0 leaves the discriminator out.
        lambda_penalty: see :func:`adversary`.
        conditional: show the discriminator the image beside the scores, as in the paper.
        discriminator_width: channels of its first convolution.
        discriminator_lr: its learning rate; None takes the optimizer's.
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
        lambda_holistic: float = 0.1,
        lambda_penalty: float = 10.0,
        conditional: bool = True,
        discriminator_width: int = 64,
        discriminator_lr: float | None = 4e-4,
        student_tap: str | Mapping[str, Any] | Tap = "map",
        teacher_tap: str | Mapping[str, Any] | Tap = "map",
    ) -> None:
        super().__init__()
        if form not in ("mean", "sum"):
            raise UserError(f"form {form!r} is not known; valid: mean, sum")
        if not 0 < pool_scale <= 1:
            raise UserError(f"pool_scale is a share in (0, 1], not {pool_scale}")
        for name, given in (("lambda_holistic", lambda_holistic), ("lambda_penalty", lambda_penalty)):
            if given < 0:
                raise UserError(f"{name} is at least 0, not {given}")
        if discriminator_width < 1:
            raise UserError(f"discriminator_width is at least 1, not {discriminator_width}")
        if discriminator_lr is not None and discriminator_lr <= 0:
            raise UserError(f"discriminator_lr must be > 0, not {discriminator_lr}")
        self.lambda_pixel, self.lambda_pair, self.pool_scale = lambda_pixel, lambda_pair, pool_scale
        self.form: Form = form
        self.lambda_holistic, self.lambda_penalty, self.conditional = lambda_holistic, lambda_penalty, conditional
        self.discriminator_width, self.discriminator_lr = discriminator_width, discriminator_lr
        self.student_tap, self.teacher_tap = Tap.parse(student_tap), Tap.parse(teacher_tap)

    @property
    def reads(self) -> Reads:
        """The score maps and the features."""
        return Reads((Tap("logits"), self.student_tap), (Tap("logits"), self.teacher_tap))

    def build(self, student: Signals, teacher: Signals | None, facts: Facts) -> None:
        """Look at the shapes, and create the discriminator.

        Raises:
            UserError: if logits or taps are no maps.
        """
        assert teacher is not None
        check_maps(student.logits, teacher.logits, "skd")
        check_maps(student[self.student_tap.name], teacher[self.teacher_tap.name], "skd")
        if self.lambda_holistic:
            scores, _ = match(student.logits, teacher.logits)
            channels = scores.shape[1] + (IMAGE_CHANNELS if self.conditional else 0)
            grid = (scores.shape[2], scores.shape[3])
            self.discriminator = Discriminator(channels, grid, self.discriminator_width).to(scores.device)

    def param_groups(self) -> list[dict[str, Any]]:
        """Return the discriminator, at its own learning rate."""
        own = {} if self.discriminator_lr is None else {"lr": self.discriminator_lr}
        return [{**group, **own} for group in super().param_groups()]

    def draw(self, student: Signals, teacher: Signals | None, batch: Batch, draw: Draw) -> Tensor | None:
        """Return where between the two models' score maps the discriminator's gradient is looked at, `[B, 1]`."""
        return draw.uniform(batch.index, (1,)) if self.lambda_holistic else None

    def forward(  # type: ignore[override]
        self, student: Signals, teacher: Signals, batch: Batch, share: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the parts `pixel` and `pair`, and those of :func:`adversary`.

        Raises:
            UserError: if the discriminator is to be shown images and the data has none.
        """
        logits = student.logits, teacher.logits
        ours, theirs, places = match_kept(*logits, known(batch, logits[0]), known(batch, logits[1]))
        maps = student[self.student_tap.name], teacher[self.teacher_tap.name]
        parts = skd(
            ours,
            theirs,
            *maps,
            lambda_pixel=self.lambda_pixel,
            lambda_pair=self.lambda_pair,
            pool_scale=self.pool_scale,
            form=self.form,
            keep=(places, known(batch, maps[0]), known(batch, maps[1])),
        )
        if share is None:
            return parts
        if places is not None:
            ours, theirs = (side.where(places[:, None], 0.0) for side in (ours, theirs))
        image = self.shown(batch, ours) if self.conditional else None
        return parts | adversary(
            ours,
            theirs,
            share,
            self.discriminator.judge(image, learns=False),
            self.discriminator.judge(image, learns=True),
            lambda_holistic=self.lambda_holistic,
            lambda_penalty=self.lambda_penalty,
        )

    @staticmethod
    def shown(batch: Batch, scores: Tensor) -> Tensor:
        """Return the images in [-1, 1], averaged to the grid of the score maps.

        Raises:
            UserError: if the batch has no images of three channels.
        """
        image = batch.inputs
        if not (isinstance(image, Tensor) and image.ndim == 4 and image.shape[1] == IMAGE_CHANNELS):
            given = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise UserError(
                f"skd shows its discriminator images [B, 3, H, W], and the batch has {given}; set conditional to false"
            )
        return 2 * F.adaptive_avg_pool2d(image, (scores.shape[2], scores.shape[3])) - 1
