# SPDX-License-Identifier: Apache-2.0
"""Give every stage of a network its own classifier, and let the deepest one teach them all.

The student stands in its own teacher's place. Three readings are public: the paper's, the authors' later code,
which takes a norm over the whole batch where the paper takes a mean of squares and leaves one branch out, and a
popular re-implementation. They are offered as `form`.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from tutelage.core import Batch, Card, Facts, Reads, Signals, Tap, Term
from tutelage.core.error import UserError
from tutelage.core.labels import class_target
from tutelage.core.layers import Places
from tutelage.core.tap import expand
from tutelage.functional.divergence import cross_entropy, kl_divergence, soft_cross_entropy
from tutelage.functional.precision import full_precision

CARD = Card(
    name="BYOT",
    title="Be Your Own Teacher: Improve the Performance of Convolutional Neural Networks via Self Distillation",
    authors="Zhang, Song, Gao, Chen, Bao, Ma",
    year=2019,
    venue="ICCV",
    paper="arxiv:1905.08094",
    code="github:ArchipLab-LinfengZhang/pytorch-self-distillation-final@47ca93b",
    code_licence=None,
    claims="Teaching a network's shallow stages by its deepest one makes the whole network more accurate.",
    reads={"student": ("stages[*]",), "teacher": ("stages[-1]", "logits")},
    labels=("hard",),
    averages="labelled",
    batch="coupled",
    zero_at_teacher=False,
    golden=("classic/byot",),
)

OBJECTIVE = {"task": 1.0, "byot": {"weight": 1.0, "teacher": "student"}}

Form = Literal["frobenius", "squared", "masked"]
FORMS = ("frobenius", "masked", "squared")


@full_precision
def byot(
    branch_logits: Sequence[Tensor],
    branch_features: Sequence[Tensor],
    deepest_logits: Tensor,
    deepest_feature: Tensor,
    target: Tensor,
    labelled: Tensor | None = None,
    *,
    alpha: float = 0.3,
    beta: float = 0.03,
    temperature: float = 3.0,
    form: Form = "frobenius",
) -> dict[str, Tensor]:
    """Return what the branches learn from labels, from the deepest classifier, and from the deepest feature.

    With branches i, the deepest classifier 0, and q_0 = softmax(z_0 / T):

        label    (1 - alpha) / B * sum_i sum_b - log softmax(z_ib)_y
        soft     squared:    alpha / B * sum_i sum_b KL( q_0b || softmax(z_ib / T) )
                 frobenius:  the same with the cross-entropy of q_0
                 masked:     T^2 times that cross-entropy
        feature  squared:    beta / B * sum_i sum_b |F_ib - F_0b|^2
                 frobenius:  beta * sum over all branches but the deepest of sqrt( sum_b |F_ib - F_0b|^2 )
                 masked:     beta * sum_i of all (F_ib - F_0b)^2 where F_ib > 0 or F_0b > 0

    Convention:
        - the deepest classifier and feature are constants; their own loss is the task's
        - KL runs from the deepest classifier to a branch; no T^2 but in `masked`
        - everything runs over labelled rows, B of them; the features of `frobenius` and `masked` are not
          averaged over them

    Args:
        branch_logits: one `[B, K]` a branch, from shallow to deep.
        branch_features: one `[B, D]` a branch, as wide as the deepest.
        deepest_logits: `[B, K]`.
        deepest_feature: `[B, D]`.
        target: `[B]` int64 classes (anything where unlabelled).
        labelled: `[B]` bool, all by default.
        alpha: share of the soft part.
        beta: coefficient of the feature part.
        temperature: T, > 0.
        form: `squared` (the paper), `frobenius` (the authors' later code) or `masked` (a third party's).

    Returns:
        `label`, `soft` and `feature`: scalars with their coefficients, float32 or wider; their sum is the
        loss. Without labelled rows they are connected zeros.

    Raises:
        UserError: if shapes differ.

    Example:
        >>> flat, one = torch.zeros(1, 2), torch.ones(1, 3)
        >>> parts = byot([flat], [one], flat, 3 * one, torch.tensor([0]), form="squared", beta=1.0)
        >>> parts["label"], parts["soft"], parts["feature"]
        (tensor(0.4852), tensor(0.), tensor(12.))

    Reference: Zhang et al., Be Your Own Teacher, ICCV 2019.
    """
    for what, branches, deepest in (
        ("logits", branch_logits, deepest_logits),
        ("features", branch_features, deepest_feature),
    ):
        for branch in branches:
            if branch.shape != deepest.shape:
                raise UserError(
                    f"byot compares {what} of one shape: a branch's are {list(branch.shape)}, "
                    f"the deepest {list(deepest.shape)}"
                )
    deepest_logits, deepest_feature = deepest_logits.detach(), deepest_feature.detach()
    if labelled is None:
        labelled = torch.ones_like(target, dtype=torch.bool)
    count = labelled.sum().clamp(min=1)
    onehot = nn.functional.one_hot(target.where(labelled, 0), deepest_logits.shape[1]).to(deepest_logits.dtype)

    def mean(rows: Tensor) -> Tensor:
        return rows.where(labelled, 0.0).sum() / count

    divergence = kl_divergence if form == "squared" else cross_entropy
    scale = temperature**2 if form == "masked" else 1.0
    label, soft, feature = [], [], []
    for depth, (logits, vector) in enumerate(zip(branch_logits, branch_features, strict=True)):
        label.append(mean(soft_cross_entropy(logits, onehot)))
        soft.append(scale * mean(divergence(logits / temperature, deepest_logits / temperature)))
        squares = (vector - deepest_feature).square()
        if form == "masked":
            squares = squares.where((vector > 0) | (deepest_feature > 0), 0.0)
        rows = squares.sum(dim=1).where(labelled, 0.0)
        if form == "frobenius":
            skipped = depth == len(branch_logits) - 1
            feature.append(0 * rows.sum() if skipped else _root(rows.sum()))
        else:
            feature.append(mean(rows) if form == "squared" else rows.sum())
    return {
        "label": (1 - alpha) * torch.stack(label).sum(),
        "soft": alpha * torch.stack(soft).sum(),
        "feature": beta * torch.stack(feature).sum(),
    }


def _root(total: Tensor) -> Tensor:
    """Return the square root; at 0, where it has no slope, the gradient is 0."""
    return torch.where(total > 0, total.where(total > 0, 1.0).sqrt(), total)


def _narrow(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Return a separable convolution: 3x3 by channel, 1x1 across channels, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class Branch(nn.Module):
    """The bottleneck and classifier of one stage; thrown away after training.

    Args:
        widths: channels of the stage and of all that follow it.
        strides: from each stage to the next.
        num_classes: K.
        adapt: bring the feature to the deepest by a linear layer.
    """

    def __init__(self, widths: Sequence[int], strides: Sequence[int], num_classes: int, adapt: bool) -> None:
        super().__init__()
        steps = zip(pairwise(widths), strides, strict=True)
        self.bottleneck = nn.Sequential(*(_narrow(one, other, stride) for (one, other), stride in steps))
        self.classifier = nn.Linear(widths[-1], num_classes)
        self.adaptation = nn.Linear(widths[-1], widths[-1]) if adapt else nn.Identity()

    def forward(self, feature_map: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits `[B, K]` and the feature `[B, D]`."""
        vector = self.bottleneck(feature_map).mean((2, 3))
        return self.classifier(vector), self.adaptation(vector)


@final
class BYOT(Term):
    """Term form of :func:`byot`: the student in the teacher's place too, `teacher: student`.

    Each stage but the last gets a bottleneck (one separable convolution for each stage that follows) and a
    classifier of its own.

    Args:
        alpha: see :func:`byot`.
        beta: see :func:`byot`.
        temperature: see :func:`byot`.
        form: see :func:`byot`.
        student_taps: maps from shallow to deep that get a branch; of a pattern, all but the last one.
        teacher_tap: the deepest map.
    """

    def __init__(
        self,
        *,
        alpha: float = 0.3,
        beta: float = 0.03,
        temperature: float = 3.0,
        form: Form = "frobenius",
        student_taps: Places = ("stages[*]",),
        teacher_tap: str | Mapping[str, Any] | Tap = "stages[-1]",
    ) -> None:
        super().__init__()
        if form not in FORMS:
            raise UserError(f"form {form!r} is not known; valid: {', '.join(FORMS)}")
        if temperature <= 0:
            raise UserError(f"temperature must be > 0, not {temperature}")
        if not 0 <= alpha <= 1:
            raise UserError(f"alpha is a share in [0, 1], not {alpha}")
        if isinstance(student_taps, (str, Mapping, Tap)) or not student_taps:
            raise UserError(f"student_taps: expected a list of roles or module paths, not {student_taps!r}")
        self.alpha, self.beta, self.temperature = alpha, beta, temperature
        self.form: Form = form
        self.student_taps = tuple(Tap.parse(tap) for tap in student_taps)
        self.teacher_tap = Tap.parse(teacher_tap)

    @property
    def reads(self) -> Reads:
        """The maps of the stages; the deepest map and the logits."""
        return Reads(self.student_taps, (self.teacher_tap, Tap("logits")))

    def build(self, student: Signals, teacher: Signals | None, facts: Facts) -> None:
        """Create a branch for each stage but the last.

        Raises:
            UserError: if a tap is no map, there is no shallow one, or the logits are not `[B, K]`.
        """
        assert teacher is not None
        self.names = tuple(
            name
            for tap in self.student_taps
            for name in (expand(tap.name, student.taps)[:-1] if "[*]" in tap.where else (tap.name,))
        )
        maps = {**{name: student[name] for name in self.names}, "the deepest": teacher[self.teacher_tap.name]}
        for name, one in maps.items():
            if one.ndim != 4:
                raise UserError(f"byot reads maps [B, C, H, W], and {name!r} is {list(one.shape)}")
        if not self.names:
            raise UserError("byot gives branches to all stages but the last, and the student has only one")
        if teacher.logits.ndim != 2:
            raise UserError(f"byot classifies, and needs logits [B, K], not {list(teacher.logits.shape)}")
        sizes = list(maps.values())
        widths = [one.shape[1] for one in sizes]
        strides = [max(1, round(one.shape[2] / other.shape[2])) for one, other in pairwise(sizes)]
        classes = teacher.logits.shape[1]
        # the released code leaves out the feature of the deepest branch
        adapted = len(self.names) - 1 if self.form == "frobenius" else 0
        self.branches = nn.ModuleList(
            Branch(widths[n:], strides[n:], classes, adapt=n < adapted) for n in range(len(self.names))
        ).to(sizes[0].device)

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> dict[str, Tensor]:  # type: ignore[override]
        """Return the parts `label`, `soft` and `feature`.

        Raises:
            UserError: if the data has no class labels, or a batch norm would get a single value a channel.
        """
        deepest = teacher[self.teacher_tap.name]
        if self.training and deepest.numel() == deepest.shape[1]:
            raise UserError(
                "byot: batch norm cannot train on one value a channel (one sample with a 1x1 map); "
                "use a batch size of at least 2, or drop the last incomplete batch"
            )
        answers = [
            branch(student[name].to(next(branch.parameters()).dtype))
            for branch, name in zip(self.branches, self.names, strict=True)
        ]
        return byot(
            [logits for logits, _ in answers],
            [feature for _, feature in answers],
            teacher.logits,
            deepest.mean((2, 3), dtype=torch.promote_types(deepest.dtype, torch.float32)),
            class_target(batch, "byot"),
            batch.labelled,
            alpha=self.alpha,
            beta=self.beta,
            temperature=self.temperature,
            form=self.form,
        )
