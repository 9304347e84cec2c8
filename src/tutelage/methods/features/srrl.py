# SPDX-License-Identifier: Apache-2.0
"""Match the teacher's pooled features, and what the teacher's own frozen classifier says about the student's.

A connector brings the student's map to the teacher's width, also where the widths agree. One published code
classifies the last sample's vector only and compares it with the whole batch; another applies the connector
after pooling. The first is a defect and is not offered, the second is `form="pooled"`.
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from tutelage.core import Batch, Card, Facts, Reads, Signals, Tap, Term
from tutelage.core.error import UserError
from tutelage.functional.precision import full_precision

CARD = Card(
    name="SRRL",
    title="Knowledge Distillation via Softmax Regression Representation Learning",
    authors="Yang, Martinez, Bulat, Tzimiropoulos",
    year=2021,
    venue="ICLR",
    paper="https://openreview.net/forum?id=ZzwDy_wiWv",
    code="github:jingyang2017/KD_SRRL@d2e802f",
    code_licence="MIT",
    claims="Training features through the teacher's classifier beats matching the features alone.",
    reads={"student": ("map",), "teacher": ("map",), "borrows": ("classifier",)},
    labels=("none",),
    averages="samples",
    batch="coupled",
    zero_at_teacher=False,
    golden=("core/srrl", "classic/srrl"),
)

OBJECTIVE = {"task": 1.0, "srrl": {"weight": 1.0}}

Form = Literal["map", "pooled"]


@full_precision
def srrl(
    student_pooled: Tensor,
    teacher_pooled: Tensor,
    student_scores: Tensor,
    teacher_scores: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> dict[str, Tensor]:
    """Return the feature and the regression part, both mean squared errors.

        L = alpha / (B C) * sum_{b,c} (a - f)^2  +  beta / (B K) * sum_{b,k} (h(a) - h(f))^2
        a = pool( connector(student map) ), f = pool(teacher map), h the teacher's classifier

    Convention:
        - averaged over samples and channels, and over samples and classes
        - gradients pass through h into the student; h itself is frozen

    Args:
        student_pooled: `[B, C]`, the student's pooled vector at the teacher's width.
        teacher_pooled: `[B, C]`.
        student_scores: `[B, K]`, what the teacher's classifier says about `student_pooled`.
        teacher_scores: `[B, K]`, the same about `teacher_pooled`.
        alpha: coefficient of the feature part.
        beta: coefficient of the regression part (1; the authors' CIFAR settings in cls_KD: 5).

    Returns:
        `feature` and `regression`, scalars with their coefficients, float32 or wider; their sum is the loss.
        A batch without rows gives connected zeros.

    Raises:
        UserError: if the shapes of a pair differ: they would broadcast.

    Example:
        >>> parts = srrl(torch.zeros(1, 2), torch.ones(1, 2), torch.zeros(1, 1), torch.full((1, 1), 3.0))
        >>> parts["feature"], parts["regression"]
        (tensor(1.), tensor(9.))

    Reference: Yang et al., Knowledge Distillation via Softmax Regression Representation Learning, ICLR 2021.
    """
    pairs = {
        "feature": (alpha, student_pooled, teacher_pooled),
        "regression": (beta, student_scores, teacher_scores),
    }
    parts = {}
    for part, (weight, student, teacher) in pairs.items():
        if student.shape != teacher.shape:
            raise UserError(
                f"srrl compares tensors of one shape: the student's {part} is {list(student.shape)}, "
                f"the teacher's {list(teacher.shape)}"
            )
        parts[part] = weight * (student - teacher).square().sum() / max(student.numel(), 1)
    return parts


def pool(feature_map: Tensor) -> Tensor:
    """Return the mean over positions, `[B, C, H, W]` to `[B, C]`, summed in float32 or wider."""
    return feature_map.mean((2, 3), dtype=torch.promote_types(feature_map.dtype, torch.float32))


def classify(classifier: nn.Module, vector: Tensor) -> Tensor:
    """Return the classifier's scores of pooled vectors, which come in float32 whatever its weights are."""
    given = vector.to(next(classifier.parameters(), vector).dtype)
    if isinstance(classifier, nn.Conv2d):  # some networks end in a 1x1 convolution
        given = given[:, :, None, None]
    scores: Tensor = classifier(given)
    return scores.flatten(2).squeeze(2) if isinstance(classifier, nn.Conv2d) else scores


@final
class SRRL(Term):
    """Term form of :func:`srrl`: a 1x1 convolution, batch norm and ReLU, then the teacher's classifier.

    The two maps may differ in height and width. The connector uses the batch's statistics while training: a
    batch needs more than one value a channel.

    Args:
        alpha: see :func:`srrl`.
        beta: see :func:`srrl`.
        form: `map` (the paper; connector, then pooling) or `pooled` (the other way round).
        student_tap: a map of the student.
        teacher_tap: the map that the teacher's classifier pools.
        classifier: role or path of the teacher's module that turns the pooled map into logits.
    """

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        beta: float = 1.0,
        form: Form = "map",
        student_tap: str | Mapping[str, Any] | Tap = "map",
        teacher_tap: str | Mapping[str, Any] | Tap = "map",
        classifier: str = "classifier",
    ) -> None:
        super().__init__()
        if form not in ("map", "pooled"):
            raise UserError(f"form {form!r} is not known; valid: map, pooled")
        self.alpha, self.beta = alpha, beta
        self.form: Form = form
        self.student_tap, self.teacher_tap = Tap.parse(student_tap), Tap.parse(teacher_tap)
        self.classifier = classifier

    @property
    def reads(self) -> Reads:
        """The two maps, and the teacher's classifier."""
        return Reads((self.student_tap,), (self.teacher_tap,), (self.classifier,))

    def build(self, student: Signals, teacher: Signals | None, facts: Facts) -> None:
        """Create the connector.

        Raises:
            UserError: if a tap is no map, or the classifier does not take the teacher's pooled map.
        """
        assert teacher is not None
        source, goal = student[self.student_tap.name], teacher[self.teacher_tap.name]
        if source.ndim != 4 or goal.ndim != 4:
            raise UserError(f"srrl pools maps [B, C, H, W], not {list(source.shape)} and {list(goal.shape)}")
        self._try(teacher.borrowed[self.classifier], goal)
        width = goal.shape[1]
        conv = nn.Conv2d(source.shape[1], width, 1, bias=False)
        nn.init.normal_(conv.weight, std=(2 / width) ** 0.5)
        layers = OrderedDict(conv=conv, bn=nn.BatchNorm2d(width), relu=nn.ReLU())
        self.connector = nn.Sequential(layers).to(source.device)

    def _try(self, classifier: nn.Module, goal: Tensor) -> None:
        """Refuse a classifier that does not turn the pooled map into one row of scores a sample."""
        advice = "tap the map it reads (teacher_tap), or name the part that follows the pooling (classifier)"
        try:
            with torch.no_grad():
                scores = classify(classifier, pool(goal))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            takes = getattr(classifier, "in_features", getattr(classifier, "in_channels", None))
            reason = f"it takes {takes}" if takes else str(error).partition("\n")[0]
            raise UserError(
                f"srrl: the teacher's {self.classifier!r} does not take the {goal.shape[1]} channels of "
                f"{self.teacher_tap.name!r} ({reason}); {advice}"
            ) from error
        if scores.ndim != 2:
            raise UserError(f"srrl: the teacher's {self.classifier!r} gave {list(scores.shape)}, not [B, K]; {advice}")

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> dict[str, Tensor]:  # type: ignore[override]
        """Return the parts `feature` and `regression`.

        Raises:
            UserError: on one value a channel while training.
        """
        source, classifier = student[self.student_tap.name], teacher.borrowed[self.classifier]
        if self.form == "pooled":
            source = pool(source)[:, :, None, None].to(next(self.connector.parameters()).dtype)
        if self.training and source.numel() == source.shape[1]:
            raise UserError(
                "srrl: batch norm cannot train on one value a channel (one sample with a 1x1 map); "
                "use a batch size of at least 2, or drop the last incomplete batch"
            )
        student_pooled, teacher_pooled = pool(self.connector(source)), pool(teacher[self.teacher_tap.name])
        return srrl(
            student_pooled,
            teacher_pooled,
            classify(classifier, student_pooled),
            classify(classifier, teacher_pooled),
            alpha=self.alpha,
            beta=self.beta,
        )
