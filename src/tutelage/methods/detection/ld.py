# SPDX-License-Identifier: Apache-2.0
"""Match the distributions over an edge's place, on the anchors that learn a box and in a ring around it.

For heads that predict each edge of a box as a distribution over bins (generalised focal loss). Which anchors learn,
and which lie in the ring, is found from the boxes of the batch as in ATSS. The released code divides the common area
of box and anchor by the anchor's where the paper's DIoU has the union; that is `form="anchor"`.
"""

from collections.abc import Sequence
from typing import Literal, final

import torch
from torch import Tensor

from tutelage.core import Batch, Card, Facts, Reads, Signals, Term
from tutelage.core.error import UserError
from tutelage.core.layers import Layers, Places
from tutelage.functional.anchors import by_image, grid_anchors, levels, nearest, on_boxes, overlaps, threshold
from tutelage.functional.divergence import kl_divergence
from tutelage.functional.precision import full_precision

CARD = Card(
    name="LD",
    title="Localization Distillation for Dense Object Detection",
    authors="Zheng, Ye, Wang, Ren, Zuo, Hou, Cheng",
    year=2022,
    venue="CVPR",
    paper="arxiv:2102.12252",
    code="github:HikariTJU/LD@4287990",
    code_licence=None,
    claims="Distilling where edges lie, in the right region, teaches a detector more than imitating its features.",
    reads={"student": ("head.box[*]", "head.cls[*]"), "teacher": ("head.box[*]", "head.cls[*]")},
    labels=("hard",),
    averages="samples",
    batch="coupled",
    zero_at_teacher=True,
    golden=("classic/ld",),
)

OBJECTIVE = {"task": 1.0, "ld": {"weight": 1.0}}

Form = Literal["union", "anchor"]
EDGES = 4
RING = 16.0  # the released divisor of the ring's part: four edges, and four more


@full_precision
def edge_distance(student: Tensor, teacher: Tensor, weight: Tensor, temperature: float = 10.0) -> Tensor:
    """Return the weighted sum over boxes of the distance of their edges' distributions.

        sum_p w_p sum over edges of T^2 / (n + 1) * KL( softmax(t / T) || softmax(s / T) )

    Args:
        student: `[..., 4, n + 1]` logits of the bins.
        teacher: `[..., 4, n + 1]`.
        weight: `[...]`, one a box.
        temperature: T, > 0.
    """
    rows = kl_divergence(student / temperature, teacher / temperature).sum(dim=-1)
    return temperature**2 / student.shape[-1] * (weight * rows).sum()


@full_precision
def class_distance(student: Tensor, teacher: Tensor, weight: Tensor, temperature: float = 2.0) -> Tensor:
    """Return the weighted sum over boxes of T^2 KL(teacher || student) of their classes, averaged over classes.

    Args:
        student: `[..., K]` logits.
        teacher: `[..., K]`.
        weight: `[...]`, one a box.
        temperature: T, > 0.
    """
    rows = kl_divergence(student / temperature, teacher / temperature)
    return temperature**2 / student.shape[-1] * (weight * rows).sum()


def valuable_region(
    boxes: Tensor,
    anchors: Tensor,
    level_sizes: Sequence[int],
    *,
    share: float = 0.25,
    count: int = 9,
    form: Form = "union",
) -> Tensor:
    """Return how valuable each anchor is for each box: its IoU in a ring around the box, else 0.

    An anchor lies in the ring if share * thr <= DIoU < thr, where thr is the box's threshold in ATSS: mean and
    deviation of the IoU of its candidates.

    Args:
        boxes: `[M, 4]`.
        anchors: `[A, 4]`, level after level.
        level_sizes: anchors of each level.
        share: of the threshold, where the ring ends.
        count: candidates of each level.
        form: what the common area is a share of in DIoU: the `union` (the paper) or the `anchor` (the code).

    Returns:
        `[M, A]`.
    """
    iou, diou = overlaps(boxes, anchors, form)
    limit = threshold(iou, nearest(boxes, anchors, level_sizes, count))[:, None]
    return iou.where((diou >= share * limit) & (diou < limit), 0.0)


@full_precision
def ld(
    student_boxes: Tensor,
    teacher_boxes: Tensor,
    student_scores: Tensor,
    teacher_scores: Tensor,
    positive: Tensor,
    value: Tensor,
    *,
    lambda_main: float = 0.25,
    lambda_vlr: float = 0.25,
    lambda_cls: float = 10.0,
    temperature: float = 10.0,
    class_temperature: float = 2.0,
) -> dict[str, Tensor]:
    """Return the main region's, the valuable region's and the class part.

        main = lambda_main / (4 B) * sum over anchors that learn a box of c * R
        vlr  = lambda_vlr / (16 B) * sum over anchors of the ring of value * R
        cls  = lambda_cls / P * sum over anchors that learn a box of T_c^2 / K * KL of their classes

    with R the sum over four edges of T^2 / (n + 1) * KL( softmax(t / T) || softmax(s / T) ), and c the
    student's largest class probability (sigmoid), a constant.

    Convention:
        - KL runs from teacher to student, averaged over bins and over classes
        - `main` and `vlr` are sums over an image's anchors, averaged over images; P are the anchors that learn a box
        - classes go through a softmax, although heads train them one by one

    Args:
        student_boxes: `[B, A, 4, n + 1]` logits of the bins, any float dtype; compared in float32 or wider.
        teacher_boxes: `[B, A, 4, n + 1]`.
        student_scores: `[B, A, K]` class logits.
        teacher_scores: `[B, A, K]`.
        positive: `[B, A]` bool, anchors that learn a box.
        value: `[B, A]` of the ring, 0 outside.
        lambda_main: coefficient; 0 leaves the part out.
        lambda_vlr: coefficient; 0 leaves the part out.
        lambda_cls: coefficient; 0 leaves the part out.
        temperature: T, > 0.
        class_temperature: T_c, > 0.

    Returns:
        `main`, `vlr` and `cls`: scalars with their coefficients, float32 or wider; their sum is the loss.
        Images without a box give connected zeros.

    Raises:
        UserError: if the two heads differ in shape.

    Example:
        >>> boxes, scores = torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 3)
        >>> taught = torch.tensor([1.0, 0.0]).expand(1, 1, 4, 2)
        >>> there = torch.ones(1, 1, dtype=torch.bool)
        >>> parts = ld(boxes, taught, scores, scores, there, torch.zeros(1, 1), temperature=1.0)
        >>> parts["main"], parts["vlr"], parts["cls"]
        (tensor(0.0069), tensor(0.), tensor(0.))

    Reference: Zheng et al., Localization Distillation for Dense Object Detection, CVPR 2022.
    """
    for what, one, other in (("boxes", student_boxes, teacher_boxes), ("scores", student_scores, teacher_scores)):
        if one.shape != other.shape:
            raise UserError(
                f"ld compares heads of one shape: the student's {what} are {list(one.shape)}, "
                f"the teacher's {list(other.shape)}"
            )
    images = max(len(student_boxes), 1)
    sure = student_scores.detach().sigmoid().amax(dim=2).where(positive, 0.0)
    ring = value.to(student_boxes.dtype)
    learned = positive.to(student_scores.dtype)
    return {
        "main": lambda_main / (EDGES * images) * edge_distance(student_boxes, teacher_boxes, sure, temperature),
        "vlr": lambda_vlr / (RING * images) * edge_distance(student_boxes, teacher_boxes, ring, temperature),
        "cls": lambda_cls
        * class_distance(student_scores, teacher_scores, learned, class_temperature)
        / learned.sum().clamp(min=1),
    }


@final
class LD(Term):
    """Term form of :func:`ld`: one square anchor a position, ATSS for which of them learn, the ring around a box.

    Both heads predict, for each level and position, K class logits and 4 (n + 1) logits of bins, those of one
    edge together, the edges in the order left, top, right, bottom.

    Args:
        lambda_main: see :func:`ld`.
        lambda_vlr: see :func:`ld`.
        lambda_cls: see :func:`ld`.
        temperature: see :func:`ld`.
        class_temperature: see :func:`ld`.
        form: see :func:`valuable_region`.
        ring_share: see :func:`valuable_region`.
        candidates: of each level, for ATSS and the ring.
        anchor_scale: side of an anchor, in strides.
        student_box_taps: maps of bins, from the finest level to the coarsest.
        teacher_box_taps: the same of the teacher.
        student_class_taps: class maps of the same levels.
        teacher_class_taps: the same of the teacher.
    """

    def __init__(
        self,
        *,
        lambda_main: float = 0.25,
        lambda_vlr: float = 0.25,
        lambda_cls: float = 10.0,
        temperature: float = 10.0,
        class_temperature: float = 2.0,
        form: Form = "union",
        ring_share: float = 0.25,
        candidates: int = 9,
        anchor_scale: float = 8.0,
        student_box_taps: Places = ("head.box[*]",),
        teacher_box_taps: Places = ("head.box[*]",),
        student_class_taps: Places = ("head.cls[*]",),
        teacher_class_taps: Places = ("head.cls[*]",),
    ) -> None:
        super().__init__()
        if form not in ("anchor", "union"):
            raise UserError(f"form {form!r} is not known; valid: anchor, union")
        if temperature <= 0 or class_temperature <= 0:
            raise UserError(f"temperatures must be > 0, not {temperature} and {class_temperature}")
        if candidates < 1 or anchor_scale <= 0:
            raise UserError(f"candidates must be at least 1 and anchor_scale > 0, not {candidates} and {anchor_scale}")
        self.lambda_main, self.lambda_vlr, self.lambda_cls = lambda_main, lambda_vlr, lambda_cls
        self.temperature, self.class_temperature = temperature, class_temperature
        self.form: Form = form
        self.ring_share, self.candidates, self.anchor_scale = ring_share, candidates, anchor_scale
        self.boxes = Layers.parse(student_box_taps, teacher_box_taps)
        self.scores = Layers.parse(student_class_taps, teacher_class_taps)

    @property
    def reads(self) -> Reads:
        """The maps of both heads."""
        return Reads((*self.boxes.student, *self.scores.student), (*self.boxes.teacher, *self.scores.teacher))

    def build(self, student: Signals, teacher: Signals | None, facts: Facts) -> None:
        """Pair the levels.

        Raises:
            UserError: if the heads do not fit each other, or edges are no distributions.
        """
        assert teacher is not None
        self.box_names = self.boxes.aligned(student, teacher)
        self.score_names = self.scores.aligned(student, teacher)
        boxes, scores = (
            [[one[name] for name in names] for one, names in zip((student, teacher), pair, strict=True)]
            for pair in (self.box_names, self.score_names)
        )
        for maps in zip(boxes[0], boxes[1], scores[0], scores[1], strict=True):
            if any(one.ndim != 4 for one in maps) or len({one.shape[2:] for one in maps}) > 1:
                shapes = ", ".join(str(list(one.shape)) for one in maps)
                raise UserError(f"ld compares maps of one grid at each level, not {shapes}")
            if maps[0].shape[1] % EDGES or maps[0].shape[1] == EDGES or maps[0].shape[1] != maps[1].shape[1]:
                raise UserError(
                    f"ld compares distributions, 4 (n + 1) numbers a position: the student has {maps[0].shape[1]}, "
                    f"the teacher {maps[1].shape[1]}"
                )

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> dict[str, Tensor]:  # type: ignore[override]
        """Return the parts `main`, `vlr` and `cls`.

        Raises:
            UserError: if the data has no boxes.
        """
        frame = batch.frame
        if frame is None:
            raise UserError("ld looks at the anchors on and around boxes, and this data has no boxes")
        sizes = [(one.shape[2], one.shape[3]) for one in (student[name] for name in self.box_names[0])]
        boxes = frame.boxes.float() if frame.boxes.dtype != torch.float64 else frame.boxes
        anchors = grid_anchors(sizes, frame.size, boxes, self.anchor_scale)
        counts = [height * width for height, width in sizes]
        on_box = on_boxes(boxes, anchors, counts, self.candidates)
        ring = valuable_region(boxes, anchors, counts, share=self.ring_share, count=self.candidates, form=self.form)
        images = len(batch)
        return ld(
            levels([student[name] for name in self.box_names[0]], EDGES),
            levels([teacher[name] for name in self.box_names[1]], EDGES),
            levels([student[name] for name in self.score_names[0]]).squeeze(2),
            levels([teacher[name] for name in self.score_names[1]]).squeeze(2),
            by_image(on_box.to(boxes.dtype), frame.box_image, images) > 0,
            by_image(ring, frame.box_image, images),
            lambda_main=self.lambda_main,
            lambda_vlr=self.lambda_vlr,
            lambda_cls=self.lambda_cls,
            temperature=self.temperature,
            class_temperature=self.class_temperature,
        )
