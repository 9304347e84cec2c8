# SPDX-License-Identifier: Apache-2.0
"""Match the maps of a pyramid where objects are and where they are not, and what each position sees of the whole.

Objects weigh by their cells, so that small ones count as much as large ones; the teacher's attention weighs
positions and channels. The blocks that gather the global context are trained on both sides, the teacher's too.
Paper and class default have gamma 1e-3, the released configurations of one-stage detectors 5e-4.
"""

import math
from collections.abc import Sequence
from typing import final

from torch import Tensor, nn

from tutelage.core import Batch, Card, Facts, Reads, Signals, Term
from tutelage.core.bridge import bridge, check_grid, check_maps
from tutelage.core.error import UserError
from tutelage.core.layers import Layers, Places
from tutelage.functional.boxes import coverage
from tutelage.functional.precision import full_precision

CARD = Card(
    name="FGD",
    title="Focal and Global Knowledge Distillation for Detectors",
    authors="Yang, Li, Jiang, Gong, Yuan, Zhao, Yuan",
    year=2022,
    venue="CVPR",
    paper="arxiv:2111.11837",
    code="github:yzd-v/FGD@c03a6cf",
    code_licence="Apache-2.0",
    claims="Separating objects from background, and adding their relation, lifts detectors of every kind.",
    reads={"student": ("fpn[*]",), "teacher": ("fpn[*]",)},
    labels=("hard",),
    averages="samples",
    batch="independent",
    zero_at_teacher=True,  # as built: the context blocks begin as the identity
    golden=("core/fgd",),
)

OBJECTIVE = {"task": 1.0, "fgd": {"weight": 1.0}}


@full_precision
def attention(feature_map: Tensor, temperature: float = 0.5) -> tuple[Tensor, Tensor]:
    """Return where a map is active, and in which channels.

        spatial = H W softmax over positions of mean_c |X| / T
        channel = C softmax over channels of mean_hw |X| / T

    Args:
        feature_map: `[B, C, H, W]`, any float dtype.
        temperature: T, > 0.

    Returns:
        `[B, H, W]` of mean 1 over positions, and `[B, C]` of mean 1 over channels; float32 or wider.

    Example:
        >>> import torch
        >>> places, channels = attention(torch.tensor([[[[0.0, 1.0]], [[0.0, 1.0]]]]))
        >>> places, channels
        (tensor([[[0.2384, 1.7616]]]), tensor([[1., 1.]]))
    """
    _, channels, height, width = feature_map.shape
    size = feature_map.abs()
    places = (size.mean(1).flatten(1) / temperature).softmax(dim=1) * (height * width)
    return places.unflatten(1, (height, width)), (size.mean((2, 3)) / temperature).softmax(dim=1) * channels


@full_precision
def masks(
    boxes: Tensor, box_image: Tensor, image_size: Tensor, grids: Sequence[tuple[int, int]]
) -> list[tuple[Tensor, Tensor]]:
    """Return the weights of object and background cells on each map.

    Convention:
        - foreground: one over the cells of the smallest box on a cell, see :func:`coverage`
        - background: one over the number of cells of the image without a box; 0 if there are none

    Args:
        boxes: `[M, 4]` x1, y1, x2, y2 in the pixels the network sees.
        box_image: `[M]` int64, the image of each box.
        image_size: `[B, 2]` (height, width) of each image without its padding. The map covers the padding too: as in
            the released code, boxes are stretched over it all the same.
        grids: (rows, columns) of each map.

    Returns:
        foreground and background of each map, `[B, rows, columns]` both.

    Example:
        >>> import torch
        >>> box = torch.tensor([[0.0, 0.0, 4.0, 4.0]])
        >>> for mask in masks(box, torch.tensor([0]), torch.tensor([[8, 16]]), [(2, 4)])[0]:
        ...     print(mask[0])
        tensor([[0.2500, 0.2500, 0.0000, 0.0000],
                [0.2500, 0.2500, 0.0000, 0.0000]])
        tensor([[0.0000, 0.0000, 0.2500, 0.2500],
                [0.0000, 0.0000, 0.2500, 0.2500]])
    """
    foregrounds = coverage(boxes, box_image, image_size, grids)
    empties = [(foreground == 0).to(foreground.dtype) for foreground in foregrounds]
    backgrounds = [empty / empty.sum((1, 2), keepdim=True).clamp(min=1) for empty in empties]
    return [*zip(foregrounds, backgrounds, strict=True)]


@full_precision
def fgd(
    student_map: Tensor,
    teacher_map: Tensor,
    student_related: Tensor,
    teacher_related: Tensor,
    foreground: Tensor,
    background: Tensor,
    *,
    temperature: float = 0.5,
    alpha: float = 1e-3,
    beta: float = 5e-4,
    gamma: float = 1e-3,
    lambda_relation: float = 5e-6,
) -> dict[str, Tensor]:
    """Return the four parts of one level.

        E = (s - t)^2 * spatial(t) * channel(t)
        foreground = alpha / B * sum M_fg E,  background = beta / B * sum M_bg E
        attention = gamma / B * ( sum |channel(s) - channel(t)| + sum |spatial(s) - spatial(t)| )
        relation = lambda / B * sum ( R_s(s) - R_t(t) )^2        (eq. 4-13)

    Convention:
        - summed over channels and positions, averaged over the batch: finer levels weigh more
        - the teacher's attention weighs the errors, each factor once; gradients reach the student's attention
          through the third part only

    Args:
        student_map: `[B, C, H, W]`, brought to the teacher's width; any float dtype.
        teacher_map: `[B, C, H, W]`.
        student_related: `[B, C, H, W]`, R_s: the student's map with its global context added.
        teacher_related: `[B, C, H, W]`, R_t, through a block of its own, which is trained.
        foreground: `[B, H, W]`, see :func:`masks`.
        background: `[B, H, W]`.
        temperature: T of the attention, > 0.
        alpha: of the object cells.
        beta: of the background cells.
        gamma: of the attention.
        lambda_relation: of the global context (lambda).

    Returns:
        `foreground`, `background`, `attention`, `relation`: scalars with their coefficients, float32 or wider; their
        sum is the loss. Without rows connected zeros.

    Raises:
        UserError: if the maps differ in shape.

    Example:
        >>> import torch
        >>> one, other, mask = torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, 2), torch.ones(1, 1, 2)
        >>> parts = fgd(one, other, one, other, mask, mask, alpha=1, beta=0.5, gamma=1, lambda_relation=3)
        >>> {name: value.item() for name, value in parts.items()}
        {'foreground': 2.0, 'background': 1.0, 'attention': 0.0, 'relation': 6.0}

    Reference: Yang et al., Focal and Global Knowledge Distillation for Detectors, CVPR 2022.
    """
    if student_map.shape != teacher_map.shape:
        raise UserError(
            f"fgd compares maps of one shape: the student's is {list(student_map.shape)}, "
            f"the teacher's {list(teacher_map.shape)}"
        )
    rows = max(len(student_map), 1)
    our_places, our_channels = attention(student_map, temperature)
    places, channels = attention(teacher_map, temperature)
    # channels are summed before positions are weighed: one map for both masks
    error = ((student_map - teacher_map).square() * channels[:, :, None, None]).sum(1) * places
    apart = (our_channels - channels).abs().sum() + (our_places - places).abs().sum()
    return {
        "foreground": alpha / rows * (foreground * error).sum(),
        "background": beta / rows * (background * error).sum(),
        "attention": gamma / rows * apart,
        "relation": lambda_relation / rows * (student_related - teacher_related).square().sum(),
    }


class Context(nn.Module):
    """Add to every position what the map says as a whole: R(X) = X + V2 ReLU LN V1 (sum softmax(k X) X).

    It begins as the identity.

    Args:
        width: channels of the map.

    Reference: Cao et al., GCNet, ICCV Workshops 2019.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = max(width // 2, 1)
        self.conv_mask = nn.Conv2d(width, 1, 1)
        self.reduce = nn.Conv2d(width, hidden, 1)
        self.norm = nn.LayerNorm([hidden, 1, 1])
        self.expand = nn.Conv2d(hidden, width, 1)
        nn.init.kaiming_normal_(self.conv_mask.weight, nonlinearity="relu")
        for zero in (self.conv_mask.bias, self.expand.weight, self.expand.bias):
            assert zero is not None
            nn.init.zeros_(zero)

    def forward(self, feature_map: Tensor) -> Tensor:
        """Return `[B, C, H, W]` with the context added to every position."""
        share = self.conv_mask(feature_map).flatten(2).softmax(dim=2)
        whole = (feature_map.flatten(2) * share).sum(dim=2)[:, :, None, None].to(feature_map.dtype)
        added: Tensor = self.expand(self.norm(self.reduce(whole)).relu())
        return feature_map + added


class Level(nn.Module):
    """The layers of one level: the bridge, where widths differ, and the context block of each side."""

    def __init__(self, student_map: Tensor, teacher_map: Tensor) -> None:
        super().__init__()
        width, device = teacher_map.shape[1], teacher_map.device
        self.align = bridge(student_map, teacher_map)
        self.context_student = Context(width).to(device)
        self.context_teacher = Context(width).to(device)


@final
class FGD(Term):
    """Term form of :func:`fgd`, over the levels of both feature pyramids, each with layers of its own.

    Args:
        temperature: see :func:`fgd`.
        alpha: see :func:`fgd`.
        beta: see :func:`fgd`.
        gamma: see :func:`fgd`.
        lambda_relation: see :func:`fgd`.
        base_size: (height, width) of the images the coefficients were chosen for, where the size changes while
            training: the loss of a batch is divided by its area over this one (the released code for YOLOX).
        student_taps: maps of the student, from the finest level to the coarsest.
        teacher_taps: maps of the teacher, of the same heights and widths.
    """

    def __init__(
        self,
        *,
        temperature: float = 0.5,
        alpha: float = 1e-3,
        beta: float = 5e-4,
        gamma: float = 1e-3,
        lambda_relation: float = 5e-6,
        base_size: tuple[int, int] | None = None,
        student_taps: Places = ("fpn[*]",),
        teacher_taps: Places = ("fpn[*]",),
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise UserError(f"temperature must be > 0, not {temperature}")
        if base_size is not None and (len(base_size) != 2 or min(base_size) <= 0):
            raise UserError(f"base_size is [height, width] in pixels, such as [640, 640], not {list(base_size)}")
        self.temperature, self.base_size = temperature, base_size
        self.alpha, self.beta, self.gamma, self.lambda_relation = alpha, beta, gamma, lambda_relation
        self.layers = Layers.parse(student_taps, teacher_taps)

    @property
    def reads(self) -> Reads:
        """The maps of both models."""
        return Reads(self.layers.student, self.layers.teacher)

    def build(self, student: Signals, teacher: Signals | None, facts: Facts) -> None:
        """Pair the levels and create their layers.

        Raises:
            UserError: if a tap is no map, or two maps differ in height or width.
        """
        assert teacher is not None
        self.names = self.layers.pairs(student, teacher)
        levels = []
        for one, other in self.names:
            check_maps(student[one], teacher[other], "fgd")
            check_grid(student[one], teacher[other], "fgd")
            levels.append(Level(student[one], teacher[other]))
        self.levels = nn.ModuleList(levels)

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> dict[str, Tensor]:  # type: ignore[override]
        """Return the four parts, each summed over levels.

        Raises:
            UserError: if the data has no boxes.
        """
        frame = batch.frame
        if frame is None:
            raise UserError("fgd weighs cells by the boxes on them, and this data has no boxes: use it for detection")
        total: dict[str, Tensor] = {}
        maps = [teacher[other] for _, other in self.names]
        weights = masks(frame.boxes, frame.box_image, frame.image_size, [(m.shape[2], m.shape[3]) for m in maps])
        for level, (one, _), theirs, covered in zip(self.levels, self.names, maps, weights, strict=True):
            assert isinstance(level, Level)
            ours = level.align(student[one])
            parts = fgd(
                ours,
                theirs,
                level.context_student(ours),
                level.context_teacher(theirs),
                *covered,
                temperature=self.temperature,
                alpha=self.alpha,
                beta=self.beta,
                gamma=self.gamma,
                lambda_relation=self.lambda_relation,
            )
            total = {name: total[name] + part if total else part for name, part in parts.items()}
        scale = 1.0 if self.base_size is None else math.prod(self.base_size) / math.prod(frame.size)
        return {name: scale * part for name, part in total.items()}
