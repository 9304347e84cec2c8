# SPDX-License-Identifier: Apache-2.0
"""Learn from soft labels the student makes for itself: a smoothed target, and wrong classes in order of rank.

The paper ranks the classes by probabilities. The authors' present code ranks them by log-probabilities of the
final logits, since a revision reused a variable; that gives another order and another loss.
"""

from collections.abc import Mapping
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tutelage.core import Batch, Card, Facts, Reads, Signals, Tap, Term, ranks
from tutelage.core.error import UserError
from tutelage.core.labels import class_target
from tutelage.functional.divergence import soft_cross_entropy
from tutelage.functional.precision import full_precision

CARD = Card(
    name="USKD",
    title="From Knowledge Distillation to Self-Knowledge Distillation: "
    "A Unified Approach with Normalized Loss and Customized Soft Labels",
    authors="Yang, Zeng, Li, Zhang, Yuan, Li",
    year=2023,
    venue="ICCV",
    paper="arxiv:2303.13005",
    code="github:yzd-v/cls_KD@1e5d48f",
    code_licence="Apache-2.0",
    claims="Soft labels made by the student itself improve CNN and ViT classifiers without a teacher.",
    reads={"student": ("stages[-2]", "logits")},
    labels=("hard", "soft"),
    averages="labelled",
    batch="coupled",
    zero_at_teacher=False,
    golden=("core/uskd", "core/uskd_probrank"),
)

OBJECTIVE = {"task": 1.0, "uskd": {"weight": 1.0}}

Form = Literal["probability", "log_probability"]


def class_order(student_logits: Tensor, weak_logits: Tensor, top: Tensor, form: Form = "probability") -> Tensor:
    """Return the classes of each row by falling ranking score, targets included.

        r_i = w_i / (1 - sum_J w + 1e-6) + g_i / (1 - sum_J g + 1e-6),    g = p, or log p

    Args:
        student_logits: `[B, K]`, p is their softmax.
        weak_logits: `[B, K]` of the auxiliary head, w is their softmax.
        top: `[B, J]` the target classes.
        form: `probability`, or `log_probability`.

    Returns:
        `[B, K]` int64; of equal scores the lower class comes first.

    Example:
        >>> class_order(torch.tensor([[0.0, 2.0, 1.0]]), torch.zeros(1, 3), torch.tensor([[0]]))
        tensor([[1, 2, 0]])
    """
    final_scores = F.log_softmax(student_logits.detach(), dim=1)
    if form == "probability":
        final_scores = final_scores.exp()
    scores = torch.zeros_like(final_scores)
    for one in (F.softmax(weak_logits.detach(), dim=1), final_scores):
        scores = scores + one / (1 - one.gather(1, top).sum(dim=1, keepdim=True) + 1e-6)
    return scores.sort(dim=1, descending=True, stable=True).indices


@full_precision
def uskd(
    student_logits: Tensor,
    weak_logits: Tensor,
    target: Tensor,
    labelled: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 0.1,
    mu: float = 0.005,
    form: Form = "probability",
    gather: bool = False,
    top: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return the target, non-target and weak part of self-distillation.

        L = alpha L_t + beta L_n + mu L_w
        L_t = - 1/B sum_b sum_{j in J} (p_j^2 + v_j - mean_b p_j^2) log p_j        (0 where v_j = 0)
        L_n = - 1/B sum_b sum_{i not in J} z_i log softmax(s without J)_i
        L_w = - 1/B sum_b sum_i (0.9 y_i + 0.1 / K) log w_i

    with p the softmax of the student, w that of the auxiliary head, J the target classes with labels v, and z
    Zipf's law over the ranks of :func:`class_order`: the class at place k of all K gets 1/k, the targets are
    removed, the rest is normalised to 1.

    Convention:
        - the smoothed labels and z are constants; the auxiliary head learns from L_w only
        - every mean runs over labelled rows, also that of p_j^2 (each target column by itself)
        - soft labels have two targets, the two largest, even where the second is 0 and decided by a tie

    Args:
        student_logits: `[B, K]`, any float dtype; computed in float32 or wider.
        weak_logits: `[B, K]`, of the auxiliary head.
        target: `[B]` int64 classes (anything where unlabelled), or `[B, K]` soft labels.
        labelled: `[B]` bool, all by default.
        alpha: coefficient of the target part.
        beta: coefficient of the non-target part.
        mu: coefficient of the auxiliary head's own loss.
        form: how classes are ranked: by `probability` (the paper) or `log_probability` (the present code).
        gather: take the mean of p_j^2 over all ranks instead of this process's rows.
        top: classes `[B, J]` and labels `[B, J]` of the targets, where they are known already.

    Returns:
        `target`, `nontarget` and `weak`: scalars with their coefficients, float32 or wider; their sum is the
        loss. Without labelled rows they are connected zeros.

    Raises:
        UserError: if the shapes do not fit.

    Example:
        >>> parts = uskd(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0]), alpha=1, beta=1, mu=1)
        >>> parts["target"], parts["nontarget"], parts["weak"]
        (tensor(0.6931), tensor(0.), tensor(0.6931))

    Reference: Yang et al., From Knowledge Distillation to Self-Knowledge Distillation, ICCV 2023, section 3.
    """
    if student_logits.ndim != 2 or weak_logits.shape != student_logits.shape:
        raise UserError(
            f"uskd takes two [B, K] tensors of logits: the student's are {list(student_logits.shape)}, "
            f"the auxiliary head's {list(weak_logits.shape)}"
        )
    rows, classes = student_logits.shape
    if target.shape not in ((rows,), (rows, classes)):
        raise UserError(
            f"uskd takes [B] classes or [B, K] soft labels for logits {list(student_logits.shape)}, "
            f"not a target of shape {list(target.shape)}"
        )
    if labelled is None:
        labelled = torch.ones(rows, dtype=torch.bool, device=student_logits.device)
    if target.ndim == 1:
        index = target.where(labelled, 0)[:, None]
        value = student_logits.new_ones(rows, 1)
        labels = torch.zeros_like(student_logits).scatter(1, index, 1.0)
    else:
        labels = target.to(student_logits.dtype)
        value, index = (part[:, :2] for part in labels.sort(dim=1, descending=True, stable=True))
    if top is not None:
        index, value = top[0], top[1].to(student_logits.dtype)

    num_labelled = labelled.sum().to(student_logits.dtype)

    def mean(values: Tensor) -> Tensor:
        return values.where(labelled, 0.0).sum() / num_labelled.clamp(min=1)

    log_probs = F.log_softmax(student_logits, dim=1).gather(1, index)
    squares = (2 * log_probs.detach()).exp()
    totals = torch.cat([squares.where(labelled[:, None], 0.0).sum(dim=0), num_labelled[None]])
    if gather:
        totals = ranks.mean(totals)
    smooth = (squares + value - totals[:-1] / totals[-1].clamp(min=1e-12)).where(value != 0, 0.0)

    if classes > index.shape[1]:
        order = class_order(student_logits, weak_logits, index, form)
        places = 1 / torch.arange(1, classes + 1, device=order.device, dtype=student_logits.dtype)
        zipf = torch.zeros_like(student_logits).scatter(1, order, places.expand(rows, -1)).scatter(1, index, 0.0)
        others = student_logits.scatter(1, index, -torch.inf)
        nontarget = soft_cross_entropy(others, zipf / zipf.sum(dim=1, keepdim=True))
    else:
        nontarget = student_logits[:, :0].sum(dim=1)

    return {
        "target": alpha * mean(-(smooth * log_probs).sum(dim=1)),
        "nontarget": beta * mean(nontarget),
        "weak": mu * mean(soft_cross_entropy(weak_logits, 0.9 * labels + 0.1 / classes)),
    }


@final
class USKD(Term):
    """Term form of :func:`uskd`: a linear head on an intermediate feature gives the auxiliary logits.

    Unlabelled rows are skipped. The mean of squared probabilities is taken over the rows at hand: those of
    one micro-batch, and unless `gather` of one process.

    Args:
        alpha: see :func:`uskd`.
        beta: see :func:`uskd`.
        mu: see :func:`uskd`.
        form: see :func:`uskd`.
        gather: see :func:`uskd`.
        student_tap: a map, which is pooled, or a vector: the second-to-last stage of a convolutional network,
            the class token after the middle block of a transformer (`cls[5]` of twelve blocks).
    """

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        beta: float = 0.1,
        mu: float = 0.005,
        form: Form = "probability",
        gather: bool = False,
        student_tap: str | Mapping[str, Any] | Tap = "stages[-2]",
    ) -> None:
        super().__init__()
        if form not in ("probability", "log_probability"):
            raise UserError(f"form {form!r} is not known; valid: log_probability, probability")
        self.alpha, self.beta, self.mu = alpha, beta, mu
        self.form: Form = form
        self.gather = gather
        self.student_tap = Tap.parse(student_tap)

    @property
    def reads(self) -> Reads:
        """The intermediate feature and the logits."""
        return Reads((self.student_tap, Tap("logits")))

    def build(self, student: Signals, teacher: Signals | None, facts: Facts) -> None:
        """Create the auxiliary head.

        Raises:
            UserError: if the tap is neither a map nor a vector, or the logits are not `[B, K]`.
        """
        feature, logits = student[self.student_tap.name], student.logits
        if feature.ndim not in (2, 4):
            raise UserError(
                f"uskd reads a map [B, C, H, W] or a vector [B, D], and {self.student_tap.name!r} is "
                f"{list(feature.shape)}; of a transformer tap the class token after its middle block (cls[5])"
            )
        if logits.ndim != 2:
            raise UserError(f"uskd ranks classes, and needs logits [B, K], not {list(logits.shape)}")
        self.weak_head = nn.Linear(feature.shape[1], logits.shape[1]).to(feature.device)

    def forward(self, student: Signals, teacher: Signals | None, batch: Batch) -> dict[str, Tensor]:
        """Return the parts `target`, `nontarget` and `weak`.

        Raises:
            UserError: if the data has no class labels.
        """
        feature = student[self.student_tap.name]
        if feature.ndim == 4:
            feature = feature.mean((2, 3), dtype=torch.promote_types(feature.dtype, torch.float32))
        return uskd(
            student.logits,
            self.weak_head(feature.to(self.weak_head.weight.dtype)),
            class_target(batch, "uskd"),
            batch.labelled,
            alpha=self.alpha,
            beta=self.beta,
            mu=self.mu,
            form=self.form,
            gather=self.gather,
        )
