# SPDX-License-Identifier: Apache-2.0
"""Push the student's tower features through the rest of the teacher's head, and match what comes out.

So the student imitates predictions without contradicting its own labels: these reach its own last layers only.
The student's features are first brought to the mean and deviation of the teacher's, channel by channel. This is the
form for heads with distributions for edges (generalised focal loss); the paper's forms for other heads compare
decoded boxes, and are not here.
"""

from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tutelage.core import Batch, Card, Facts, Reads, Signals, Term
from tutelage.core.bridge import check_maps
from tutelage.core.error import UserError
from tutelage.core.layers import Layers, Places
from tutelage.core.tap import Tap, expand
from tutelage.functional.anchors import by_image, grid_anchors, levels, on_boxes
from tutelage.functional.divergence import kl_divergence
from tutelage.functional.precision import full_precision

CARD = Card(
    name="CrossKD",
    title="CrossKD: Cross-Head Knowledge Distillation for Object Detection",
    authors="Wang, Chen, Zheng, Li, Cheng, Hou",
    year=2024,
    venue="CVPR",
    paper="arxiv:2306.11369",
    code="github:jbwang1997/CrossKD@87e156a",
    code_licence=None,
    claims="Imitating the teacher's predictions through its own head resolves their conflict with the labels.",
    reads={
        "student": ("head.cls[*].pre", "head.box[*].pre"),
        "teacher": ("head.cls[*].pre", "head.box[*].pre", "head.cls[*]", "head.box[*]"),
        "borrows": ("head.cls", "head.box", "head.box[*]"),
    },
    labels=("hard",),
    averages="samples",
    batch="coupled",
    zero_at_teacher=False,
    golden=("classic/crosskd",),
)

OBJECTIVE = {"task": 1.0, "crosskd": {"weight": 1.0}}

EDGES = 4
EPS = torch.finfo(torch.float32).eps  # in the released divisors


@full_precision
def align(student_map: Tensor, teacher_map: Tensor, eps: float = 1e-6) -> Tensor:
    """Return the student's map with the mean and deviation of the teacher's, channel by channel.

    Args:
        student_map: `[B, C, H, W]`.
        teacher_map: `[B, C, H', W']`.
        eps: added to the student's deviation. Deviations have divisor n - 1; that of a single value is 0.
    """
    moments = []
    for given in (student_map, teacher_map):
        several = int(given.numel() > given.shape[1])
        moments.append((given.mean((0, 2, 3), keepdim=True), given.std((0, 2, 3), keepdim=True, correction=several)))
    (mean, deviation), (goal, spread) = moments
    return (student_map - mean) / (deviation + eps) * spread + goal


@full_precision
def quality_focal(student_logits: Tensor, teacher_logits: Tensor, beta: float = 1.0) -> Tensor:
    """Return the cross-entropy with the teacher's probabilities, times their distance.

        BCE( s, sigmoid(t) ) * |sigmoid(s) - sigmoid(t)|^beta

    Args:
        student_logits: of any shape; gradients pass through both factors.
        teacher_logits: of the same shape.
        beta: at least 1.

    Returns:
        of the same shape.

    Example:
        >>> quality_focal(torch.tensor([0.0]), torch.tensor([100.0]))
        tensor([0.3466])
    """
    goal = teacher_logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(student_logits, goal, reduction="none")
    return entropy * (student_logits.sigmoid() - goal).abs() ** beta


@full_precision
def crosskd(
    student_scores: Tensor,
    teacher_scores: Tensor,
    student_boxes: Tensor,
    teacher_boxes: Tensor,
    valid: Tensor,
    divisor: Tensor,
    *,
    lambda_cls: float = 1.0,
    lambda_box: float = 4.0,
    beta: float = 1.0,
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """Return the class and the box part, both of the student's cross-head predictions.

        cls = lambda_cls / (divisor + e) * sum over valid positions and classes of
              BCE( s, sigmoid(t) ) * |sigmoid(s) - sigmoid(t)|^beta
        box = lambda_box / (4 + e) / sum w * sum over positions of w * sum over edges of
              T^2 KL( softmax(t / T) || softmax(s / T) ),  w the teacher's largest class probability

    Convention:
        - KL runs from teacher to student, summed over bins; probabilities of classes are sigmoids
        - both parts are means over what the batch has: anchors that learn a box, certainty
        - e is the smallest step of float32 at 1, as in the released code

    Args:
        student_scores: `[B, A, K]`, what the teacher's head says to the student's features; any float dtype.
        teacher_scores: `[B, A, K]`.
        student_boxes: `[B, A, 4, n + 1]` logits of the bins, the same.
        teacher_boxes: `[B, A, 4, n + 1]`.
        valid: `[B, A]` bool, positions that count.
        divisor: 0-d, anchors of the batch that learn a box.
        lambda_cls: coefficient.
        lambda_box: coefficient.
        beta: of the class part, at least 1.
        temperature: T of the box part, > 0.

    Returns:
        `cls` and `box`: scalars with their coefficients, float32 or wider; their sum is the loss. Without
        valid positions connected zeros.

    Raises:
        UserError: if the two heads differ in shape.

    Example:
        >>> scores, boxes = torch.zeros(1, 1, 1), torch.zeros(1, 1, 4, 2)
        >>> sure, edges = torch.full((1, 1, 1), 100.0), torch.tensor([1.0, 0.0]).expand(1, 1, 4, 2)
        >>> there = torch.ones(1, 1, dtype=torch.bool)
        >>> parts = crosskd(scores, sure, boxes, edges, there, torch.tensor(2.0))
        >>> parts["cls"], parts["box"]
        (tensor(0.1733), tensor(0.4438))

    Reference: Wang et al., CrossKD, CVPR 2024.
    """
    for what, one, other in (("scores", student_scores, teacher_scores), ("boxes", student_boxes, teacher_boxes)):
        if one.shape != other.shape:
            raise UserError(
                f"crosskd compares heads of one shape: the student's {what} are {list(one.shape)}, "
                f"the teacher's {list(other.shape)}"
            )
    rows = quality_focal(student_scores, teacher_scores, beta).sum(dim=2)
    certainty = teacher_scores.sigmoid().amax(dim=2).where(valid, 0.0)
    edges = kl_divergence(student_boxes / temperature, teacher_boxes / temperature).sum(dim=2)
    box = temperature**2 * (certainty * edges).sum() / (EDGES + EPS)
    return {
        "cls": lambda_cls * rows.where(valid, 0.0).sum() / (divisor.to(rows.dtype) + EPS),
        "box": lambda_box * box / certainty.sum().clamp(min=EPS),
    }


@final
class CrossKD(Term):
    """Term form of :func:`crosskd`: aligns the student's tower features and runs the rest of the teacher's head.

    The roles `head.cls[i].pre` and `head.box[i].pre` are the features of level i at the reused layer of the two
    towers, before their activation; `head.cls` and `head.box`, lent, the modules from there to the predictions, and
    `head.box[i]`, lent too, what a level applies to its box predictions last.
    Any of them may be named by path: a layer that runs once a level with the number of its `call`.

    Args:
        lambda_cls: see :func:`crosskd`.
        lambda_box: see :func:`crosskd`.
        beta: see :func:`crosskd`.
        temperature: see :func:`crosskd`.
        activated: apply a ReLU to the aligned features: not where the reused layer is the pyramid itself.
        candidates: anchors of each level that may learn a box, for the divisor of the class part.
        anchor_scale: side of an anchor, in strides.
        student_class_taps: features of the student's class tower, from the finest level to the coarsest.
        teacher_class_taps: the same of the teacher.
        student_box_taps: features of the student's box tower.
        teacher_box_taps: the same of the teacher.
        score_taps: the teacher's class predictions.
        box_taps: the teacher's box predictions.
        class_modules: modules of the teacher that lead from the features to its class predictions, in order.
        box_modules: the same for boxes.
        box_scales: modules of the teacher, one a level, applied to its box predictions last; empty where there
            are none.
    """

    def __init__(
        self,
        *,
        lambda_cls: float = 1.0,
        lambda_box: float = 4.0,
        beta: float = 1.0,
        temperature: float = 1.0,
        activated: bool = True,
        candidates: int = 9,
        anchor_scale: float = 8.0,
        student_class_taps: Places = ("head.cls[*].pre",),
        teacher_class_taps: Places = ("head.cls[*].pre",),
        student_box_taps: Places = ("head.box[*].pre",),
        teacher_box_taps: Places = ("head.box[*].pre",),
        score_taps: Places = ("head.cls[*]",),
        box_taps: Places = ("head.box[*]",),
        class_modules: Sequence[str] = ("head.cls",),
        box_modules: Sequence[str] = ("head.box",),
        box_scales: Sequence[str] = ("head.box[*]",),
    ) -> None:
        super().__init__()
        if beta < 1:
            raise UserError(f"beta is at least 1, not {beta}")
        if temperature <= 0:
            raise UserError(f"temperature must be > 0, not {temperature}")
        for option, named in (("class_modules", class_modules), ("box_modules", box_modules)):
            if isinstance(named, str) or not named:
                raise UserError(f"{option}: expected a list of modules, not {named!r}")
        self.lambda_cls, self.lambda_box = lambda_cls, lambda_box
        self.beta, self.temperature, self.activated = beta, temperature, activated
        self.candidates, self.anchor_scale = candidates, anchor_scale
        self.classes = Layers.parse(student_class_taps, teacher_class_taps)
        self.boxes = Layers.parse(student_box_taps, teacher_box_taps)
        self.score_taps = tuple(Tap.parse(tap) for tap in score_taps)
        self.box_taps = tuple(Tap.parse(tap) for tap in box_taps)
        self.class_modules, self.box_modules = tuple(class_modules), tuple(box_modules)
        self.box_scales = tuple(box_scales)

    @property
    def reads(self) -> Reads:
        """The towers' features, the teacher's predictions, and the rest of its head."""
        return Reads(
            (*self.classes.student, *self.boxes.student),
            (*self.classes.teacher, *self.boxes.teacher, *self.score_taps, *self.box_taps),
            (*self.class_modules, *self.box_modules, *self.box_scales),
        )

    def build(self, student: Signals, teacher: Signals | None, facts: Facts) -> None:
        """Pair the levels, and try the teacher's head on them.

        Raises:
            UserError: if the levels do not fit, or the head does not lead from features to predictions.
        """
        assert teacher is not None
        self.class_names = self.classes.aligned(student, teacher)
        self.box_names = self.boxes.aligned(student, teacher)
        self.score_names = tuple(name for tap in self.score_taps for name in expand(tap.name, teacher.taps))
        self.prediction_names = tuple(name for tap in self.box_taps for name in expand(tap.name, teacher.taps))
        counts = {
            "class features": len(self.class_names[0]),
            "box features": len(self.box_names[0]),
            "class predictions": len(self.score_names),
            "box predictions": len(self.prediction_names),
        }
        self.scale_names = tuple(name for role in self.box_scales for name in expand(role, teacher.borrowed))
        if self.box_scales:
            counts["box_scales"] = len(self.scale_names)
        if len(set(counts.values())) > 1:
            raise UserError(
                "crosskd needs one of each a level, and has "
                + ", ".join(f"{count} {what}" for what, count in counts.items())
            )
        for names in (self.class_names, self.box_names):
            for one, other in zip(*names, strict=True):
                check_maps(student[one], teacher[other], "crosskd")
                if student[one].shape[1] != teacher[other].shape[1]:
                    raise UserError(
                        f"crosskd runs the teacher's head on the student's features, which must be as wide: "
                        f"{one!r} has {student[one].shape[1]} channels, the teacher's {teacher[other].shape[1]}"
                    )
        with torch.no_grad():
            scores, boxes = self._cross(student, teacher)
        for what, found, answers in (("class", scores, self.score_names), ("box", boxes, self.prediction_names)):
            for cross, name in zip(found, answers, strict=True):
                width = cross.shape[1]
                if width != teacher[name].shape[1]:
                    raise UserError(
                        f"crosskd: {what}_modules lead to {width} channels, and the teacher's {name!r} has "
                        f"{teacher[name].shape[1]}; name the modules that follow the features up to the prediction"
                    )
                if what == "box" and (width % EDGES or width == EDGES):
                    raise UserError(
                        f"crosskd compares distributions, 4 (n + 1) numbers a position, and {name!r} has {width}"
                    )

    def _cross(self, student: Signals, teacher: Signals) -> tuple[list[Tensor], list[Tensor]]:
        """Return what the teacher's head says to the student's features, level by level."""
        found: tuple[list[Tensor], list[Tensor]] = ([], [])
        for names, modules, scales, out in (
            (self.class_names, self.class_modules, (), found[0]),
            (self.box_names, self.box_modules, self.scale_names, found[1]),
        ):
            for level, (one, other) in enumerate(zip(*names, strict=True)):
                given = align(student[one], teacher[other])
                given = given.relu() if self.activated else given
                for role in (*modules, *scales[level : level + 1]):
                    given = _run(teacher.borrowed, role, given)
                out.append(given)
        return found

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> dict[str, Tensor]:  # type: ignore[override]
        """Return the parts `cls` and `box`.

        Raises:
            UserError: if the data has no boxes.
        """
        frame = batch.frame
        if frame is None:
            raise UserError("crosskd counts the anchors that learn a box, and this data has no boxes")
        scores, boxes = self._cross(student, teacher)
        sizes = [(one.shape[2], one.shape[3]) for one in scores]
        known = frame.boxes.float() if frame.boxes.dtype != torch.float64 else frame.boxes
        anchors = grid_anchors(sizes, frame.size, known, self.anchor_scale)
        on_box = on_boxes(known, anchors, [height * width for height, width in sizes], self.candidates)
        learned = by_image(on_box.to(known.dtype), frame.box_image, len(batch)).sum()
        centre = (anchors[:, :2] + anchors[:, 2:]) / 2
        valid = (centre < frame.image_size.flip(1)[:, None].to(known.dtype)).all(dim=2)
        return crosskd(
            levels(scores).squeeze(2),
            levels([teacher[name] for name in self.score_names]).squeeze(2),
            levels(boxes, EDGES),
            levels([teacher[name] for name in self.prediction_names], EDGES),
            valid,
            learned.clamp(min=1),
            lambda_cls=self.lambda_cls,
            lambda_box=self.lambda_box,
            beta=self.beta,
            temperature=self.temperature,
        )


def _run(lent: Mapping[str, nn.Module], role: str, given: Tensor) -> Tensor:
    """Return what a lent module makes of a map, which comes in its own type."""
    module = lent[role]
    out: Tensor = module(given.to(next(module.parameters(), given).dtype))
    return out
