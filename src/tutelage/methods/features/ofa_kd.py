# SPDX-License-Identifier: Apache-2.0
"""Give the student exits half-way, and let each answer like the teacher, the true class above all.

Student and teacher may be of any architecture: what is compared are answers, not maps. The paper raises the target
class's share alone to a power; the released code raises all shares, and takes the label itself out. The second is
the default.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tutelage.core import Batch, Card, Facts, Reads, Signals, Tap, Term
from tutelage.core.bridge import check_statistics
from tutelage.core.error import UserError
from tutelage.core.layers import Places
from tutelage.core.tap import expand
from tutelage.functional.divergence import soft_cross_entropy
from tutelage.functional.precision import full_precision
from tutelage.functional.target import class_index

CARD = Card(
    name="OFA-KD",
    title="One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation",
    authors="Hao, Guo, Han, Tang, Hu, Wang, Xu",
    year=2023,
    venue="NeurIPS",
    paper="arxiv:2310.19444",
    code="github:Hao840/OFAKD@f7bb896",
    code_licence=None,
    claims="Comparing answers of intermediate exits distils across architectures where features cannot.",
    reads={"student": ("stages[*]", "logits"), "teacher": ("logits", "pooled")},
    labels=("hard", "soft"),
    averages="samples",
    batch="coupled",
    zero_at_teacher=False,
    golden=("classic/ofa",),
)

OBJECTIVE = {"task": 1.0, "ofa_kd": {"weight": 1.0}}

Form = Literal["code", "paper"]
#: Side of the grid of tokens at which a transformer's exit stops merging patches.
GRID = 7


@full_precision
def ofa_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    index: Tensor,
    *,
    eps: float = 1.0,
    temperature: float = 1.0,
    form: Form = "code",
) -> Tensor:
    """Return one exit's cross-entropy with the teacher's answer, its target class enhanced.

        L = - 1 / B * sum_b sum_c [ (q_c + o_c)^eps - o_c ] log p_c                       (released code)
        L = - 1 / B * sum_b [ (1 + q_y)^eps log p_y + sum_{c != y} q_c log p_c ]          (paper, eq. 5)
        p = softmax(s / T), q = softmax(t / T), o the one-hot target

    Convention:
        - summed over classes, averaged over the batch; no factor T^2
        - with eps = 1 `code` is the plain soft cross-entropy; `paper` is larger by - log p_y

    Args:
        student_logits: `[B, K]`, an exit's.
        teacher_logits: `[B, K]`.
        index: `[B]` int64, the target class.
        eps: exponent, > 0; larger puts more on classes the teacher is sure of.
        temperature: softening, > 0.
        form: `code` or `paper`.

    Returns:
        Scalar, float32 or wider; a batch without rows gives a connected zero.

    Raises:
        UserError: if the shapes differ.

    Example:
        >>> one = torch.zeros(1, 2)
        >>> ofa_kd(one, one, torch.tensor([0])), ofa_kd(one, one, torch.tensor([0]), form="paper")
        (tensor(0.6931), tensor(1.3863))

    Reference: Hao et al., One-for-All, NeurIPS 2023, eq. 5.
    """
    if student_logits.shape != teacher_logits.shape:
        raise UserError(
            f"ofa_kd compares logits of one shape: the student's are {list(student_logits.shape)}, "
            f"the teacher's {list(teacher_logits.shape)}"
        )
    shares = F.softmax(teacher_logits / temperature, dim=1)
    target = torch.zeros_like(shares).scatter(1, index[:, None], 1.0)
    raised = (shares + target).pow(eps)
    weights = raised - target if form == "code" else torch.where(target > 0, raised, shares)
    rows = soft_cross_entropy(student_logits / temperature, weights)
    return rows.sum() / max(len(rows), 1)


class Separable(nn.Module):
    """Halves a map: depthwise with stride 2 and pointwise, then the same without stride, each with norm and ReLU."""

    def __init__(self, width: int, goal: int) -> None:
        super().__init__()
        self.op = nn.Sequential(
            nn.Conv2d(width, width, 3, stride=2, padding=1, groups=width, bias=False),
            nn.Conv2d(width, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False),
            nn.Conv2d(width, goal, 1, bias=False),
            nn.BatchNorm2d(goal),
            nn.ReLU(),
        )

    def forward(self, feature_map: Tensor) -> Tensor:
        """Return `[B, goal, ceil(H / 2), ceil(W / 2)]`."""
        halved: Tensor = self.op(feature_map)
        return halved


class MapExit(nn.Module):
    """From a map to logits: a block for each stage that is left, the last to the goal's width; then a linear layer.

    Args:
        width: channels of the map.
        goal: channels before the linear layer.
        blocks: halvings; without any, one 1x1 convolution.
        classes: of the logits.
    """

    def __init__(self, width: int, goal: int, blocks: int, classes: int) -> None:
        super().__init__()
        self.blocks = blocks
        widths = [*(width * 2**n for n in range(blocks)), goal]
        steps: list[nn.Module] = [Separable(widths[n], widths[n + 1]) for n in range(blocks)]
        self.steps = nn.Sequential(*(steps or [nn.Conv2d(width, goal, 1)]))
        self.fc = nn.Linear(goal, classes)
        _initialize(self)

    def forward(self, feature_map: Tensor) -> Tensor:
        """Return `[B, K]`."""
        if self.blocks:
            left = feature_map[:, :1, :: 2**self.blocks, :: 2**self.blocks]
            check_statistics(left, self.training, "ofa_kd")
        scores: Tensor = self.fc(self.steps(feature_map).mean((2, 3)))
        return scores


class TokenExit(nn.Module):
    """From patch tokens to logits: patches merged to a grid of 7, a transformer block, the mean, a linear layer.

    Args:
        width: of the tokens.
        goal: width of the transformer block.
        side: of the square grid of tokens.
        classes: of the logits.
    """

    def __init__(self, width: int, goal: int, side: int, classes: int) -> None:
        super().__init__()
        self.merges = nn.ModuleList()
        self.side = side
        while side > GRID and side % 2 == 0:
            self.merges.append(nn.Sequential(nn.LayerNorm(4 * width), nn.Linear(4 * width, width)))
            side //= 2
        self.widen = nn.Linear(width, goal)
        heads = max(n for n in (1, 2, 3, 4, 6, 8, 12, 16) if goal % n == 0 and (n == 1 or goal // n >= 32))
        self.block = nn.TransformerEncoderLayer(
            goal, heads, 4 * goal, dropout=0.0, activation=F.gelu, batch_first=True, norm_first=True
        )
        self.fc = nn.Linear(goal, classes)
        _initialize(self)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return `[B, K]`."""
        side = self.side
        for merge in self.merges:
            grid = tokens.unflatten(1, (side // 2, 2, side // 2, 2))
            tokens = merge(grid.transpose(2, 3).flatten(3).flatten(1, 2))
            side //= 2
        scores: Tensor = self.fc(self.block(self.widen(tokens)).mean(1))
        return scores


def _initialize(exit_: nn.Module) -> None:
    for part in exit_.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
        if isinstance(part, (nn.Conv2d, nn.Linear)) and part.bias is not None:
            nn.init.zeros_(part.bias)


@final
class OFAKD(Term):
    """Term form of :func:`ofa_kd`, summed over the student's own answer and those of its exits.

    An unlabelled row takes the teacher's class for its target, a soft label its largest class.

    Args:
        eps: see :func:`ofa_kd`; one number, or one for each exit from shallow to deep and a last one for the
            student's own answer.
        temperature: see :func:`ofa_kd`.
        form: see :func:`ofa_kd`.
        exits: how many of the student's last stages get one.
        width: of an exit before its last layer; None takes the larger of both models' last widths.
        student_taps: maps or patch tokens of the student, from shallow to deep.
        teacher_tap: the teacher's last width is that of this tensor's last dimension.
    """

    def __init__(
        self,
        *,
        eps: float | Sequence[float] = 1.0,
        temperature: float = 1.0,
        form: Form = "code",
        exits: int = 4,
        width: int | None = None,
        student_taps: Places = ("stages[*]",),
        teacher_tap: str | Mapping[str, Any] | Tap = "pooled",
    ) -> None:
        super().__init__()
        self.eps = tuple(eps) if isinstance(eps, Sequence) else float(eps)
        if min(self.eps if isinstance(self.eps, tuple) else (self.eps,), default=0.0) <= 0:
            raise UserError(f"eps must be > 0, not {eps}")
        if temperature <= 0:
            raise UserError(f"temperature must be > 0, not {temperature}")
        if form not in ("code", "paper"):
            raise UserError(f"form {form!r} is not known; valid: code, paper")
        if exits < 1:
            raise UserError(f"exits is a number of stages of at least 1, not {exits}")
        if isinstance(student_taps, (str, Mapping, Tap)) or not student_taps:
            raise UserError(f"student_taps: expected a list of roles or module paths, not {student_taps!r}")
        self.temperature, self.exits, self.width = temperature, exits, width
        self.form: Form = form
        self.student_taps = tuple(Tap.parse(tap) for tap in student_taps)
        self.teacher_tap = Tap.parse(teacher_tap)

    @property
    def reads(self) -> Reads:
        """The student's stages and the logits of both; the teacher's last width, unless it is given."""
        logits = Tap("logits")
        return Reads((*self.student_taps, logits), (logits, self.teacher_tap) if self.width is None else (logits,))

    def build(self, student: Signals, teacher: Signals | None, facts: Facts) -> None:
        """Create the exits.

        Raises:
            UserError: if a tap is neither a map nor a square of patch tokens, or `eps` fits another number.
        """
        assert teacher is not None
        names = [name for tap in self.student_taps for name in expand(tap.name, student.taps)]
        self.names = tuple(names[-self.exits :])
        if isinstance(self.eps, tuple) and len(self.eps) != len(self.names) + 1:
            raise UserError(
                f"ofa_kd: eps has {len(self.eps)} numbers; {len(self.names)} exits and the student's own answer "
                f"need {len(self.names) + 1}"
            )
        last = student[self.names[-1]]
        own = last.shape[1] if last.ndim == 4 else last.shape[-1]
        goal = self.width or max(own, teacher[self.teacher_tap.name].shape[-1])
        classes = teacher.logits.shape[1]
        made: list[nn.Module] = []
        for left, name in zip(range(len(self.names) - 1, -1, -1), self.names, strict=True):
            signal = student[name]
            side = math.isqrt(signal.shape[1]) if signal.ndim == 3 else 0
            if signal.ndim == 4:
                made.append(MapExit(signal.shape[1], goal, left, classes))
            elif side and side**2 == signal.shape[1]:
                made.append(TokenExit(signal.shape[2], goal, side, classes))
            else:
                raise UserError(
                    f"ofa_kd puts exits at maps [B, C, H, W] or a square of patch tokens [B, L, D]; {name!r} is "
                    f"{list(signal.shape)}"
                )
        self.heads = nn.ModuleList(made).to(last.device)

    def forward(  # type: ignore[override]
        self, student: Signals, teacher: Signals, batch: Batch
    ) -> dict[str, Tensor]:
        """Return the parts `exit1`, `exit2`, ... from shallow to deep, and `final`."""
        index = class_index(batch.target, batch.labelled, teacher.logits)
        pairs = enumerate(zip(self.heads, self.names, strict=True), 1)
        answers = {f"exit{number}": head(student[name]) for number, (head, name) in pairs}
        answers["final"] = student.logits
        powers = self.eps if isinstance(self.eps, tuple) else (self.eps,) * len(answers)
        return {
            part: ofa_kd(logits, teacher.logits, index, eps=power, temperature=self.temperature, form=self.form)
            for (part, logits), power in zip(answers.items(), powers, strict=True)
        }
