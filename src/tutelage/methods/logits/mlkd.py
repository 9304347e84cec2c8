# SPDX-License-Identifier: Apache-2.0
"""Match predictions at three levels: each sample's, how samples relate, and how classes relate, on two views.

The paper leaves out samples and classes of which the teacher is too sure. The released code multiplies the weak
view's terms with the share of those that are left instead, and compares the strong view at the first three
temperatures only. No published number belongs to the paper's form, so the default is the released one.
"""

from collections.abc import Sequence
from typing import Literal, final

import torch
from torch import Tensor
from torch.nn import functional as F

from tutelage.core import Batch, Card, Reads, Signals, Tap, Term
from tutelage.core.error import UserError
from tutelage.core.labels import class_target
from tutelage.functional.collective import gather_rows
from tutelage.functional.divergence import kl_divergence
from tutelage.functional.precision import full_precision
from tutelage.functional.zscore import zscore

CARD = Card(
    name="MLKD",
    title="Multi-Level Logit Distillation",
    authors="Jin, Wang, Lin",
    year=2023,
    venue="CVPR",
    paper="doi:10.1109/CVPR52729.2023.02325",
    code="github:Jin-Ying/Multi-Level-Logit-Distillation@5ee473f",
    claims="Aligning predictions at instance, batch and class level rivals feature distillation with logits alone.",
    reads={"student": ("logits",), "teacher": ("logits",)},
    labels=("hard", "soft"),
    averages="samples",
    batch="coupled",
    zero_at_teacher=False,
    golden=("classic/mlkd",),
)

OBJECTIVE = {"task": 0.1, "mlkd": {"weight": 1.0}}

Form = Literal["released", "paper"]
TEMPERATURES = (4.0, 3.0, 5.0, 2.0, 6.0)
STRONG = 3  # so many temperatures are compared on the strong view by the released code


def instance_level(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Return T^2 KL( softmax(t / T) || softmax(s / T) ) of each row, `[B]`."""
    return temperature**2 * kl_divergence(student_logits / temperature, teacher_logits / temperature)


def batch_level(student: Tensor, teacher: Tensor, students: Tensor, teachers: Tensor) -> Tensor:
    """Return sum_m ( <q_n, q_m> - <p_n, p_m> )^2 of each row n of probabilities, `[B]`.

    Args:
        student: p, `[B, K]`.
        teacher: q, `[B, K]`.
        students: the rows p_m, `[M, K]`.
        teachers: the rows q_m, `[M, K]`.
    """
    return (teacher @ teachers.T - student @ students.T).square().sum(dim=1)


def class_level(students: Tensor, teachers: Tensor) -> Tensor:
    """Return sum_d ( <q_:c, q_:d> - <p_:c, p_:d> )^2 of each column c of probabilities, `[K]`."""
    return (teachers.T @ teachers - students.T @ students).square().sum(dim=1)


def unsure(confidence: Tensor) -> Tensor:
    """Return 1 where a confidence is at most the median (the mean of the middle two), else 0; `[B]` to `[B]`."""
    if not len(confidence):
        return confidence
    ranked, middle = confidence.sort().values, len(confidence) // 2
    lower = ranked[(len(confidence) - 1) // 2]
    return (confidence <= lower + 0.5 * (ranked[middle] - lower)).to(confidence.dtype)


@full_precision
def mlkd(
    student_logits: Tensor,
    student_strong: Tensor,
    teacher_logits: Tensor,
    teacher_strong: Tensor,
    target: Tensor,
    labelled: Tensor | None = None,
    *,
    alpha: float = 0.9,
    beta: float = 0.1,
    temperatures: Sequence[float] = TEMPERATURES,
    form: Form = "released",
    standardize: bool = False,
    gather: bool = False,
) -> dict[str, Tensor]:
    """Return the three levels, and the strong view's own cross-entropy.

        L = alpha sum_T [ L_instance + L_batch + L_class ] + beta CE(strong, y)
        L_instance = T^2 / B sum_n m_n KL(q_n || p_n) on the weak view  +  T^2 / B sum_n KL(q_n || p_n) on the strong
        L_batch    = 1/B sum_n m_n sum_m ( <q_n, q_m> - <p_n, p_m> )^2
        L_class    = 1/K sum_c m_c sum_d ( <q_:c, q_:d> - <p_:c, p_:d> )^2

    with p and q the `[B, K]` softmax of the student's and the teacher's logits at temperature T, m_n = 1 where the
    teacher's largest probability (T = 1, weak view) is at most its median over samples, and m_c = 1 where its
    probabilities of a class sum to at most their median over classes.

    Convention:
        - `paper` is the above; `released` puts the means of m_n and m_c in the place of each m_n and m_c, and takes
          the weak view again in the place of the strong from the fourth temperature on
        - batch and class level see the weak view alone
        - the weak view's own cross-entropy is the task's loss

    Args:
        student_logits: `[B, K]` of the weak view, any float dtype; compared in float32 or wider.
        student_strong: `[B, K]` of the strong view.
        teacher_logits: `[B, K]`.
        teacher_strong: `[B, K]`.
        target: `[B]` int64 classes (anything where unlabelled), or `[B, K]` soft labels.
        labelled: `[B]` bool, all by default.
        alpha: coefficient of the three levels.
        beta: coefficient of the strong view's cross-entropy, a mean over labelled rows.
        temperatures: T, each > 0.
        form: `released` or `paper`.
        standardize: compare standardised logits at instance level (Sun et al., CVPR 2024: with alpha 9 and the
            temperatures 2, 3, 5, 2, 6).
        gather: relate samples and classes, and take the medians, over the samples of all processes.

    Returns:
        `instance`, `batch`, `class` and `label`: scalars with their coefficients, float32 or wider; their sum is
        the loss. A batch without rows gives connected zeros.

    Raises:
        UserError: if the shapes do not fit.

    Example:
        >>> weak = strong = torch.zeros(2, 2)
        >>> parts = mlkd(weak, strong, weak, strong, torch.tensor([0, 1]))
        >>> [round(part.item(), 4) for part in parts.values()]
        [0.0, 0.0, 0.0, 0.0693]

    Reference: Jin et al., Multi-Level Logit Distillation, CVPR 2023.
    """
    views = (student_logits, student_strong, teacher_logits, teacher_strong)
    if student_logits.ndim != 2 or any(logits.shape != student_logits.shape for logits in views):
        raise UserError(f"mlkd takes four [B, K] tensors of logits, not {', '.join(str([*v.shape]) for v in views)}")
    rows, classes = student_logits.shape
    if target.shape not in ((rows,), (rows, classes)):
        raise UserError(
            f"mlkd takes [B] classes or [B, K] soft labels for logits {list(student_logits.shape)}, "
            f"not a target of shape {list(target.shape)}"
        )

    def everyone(tensor: Tensor) -> Tensor:
        return gather_rows(tensor)[0] if gather else tensor

    sure = F.softmax(teacher_logits, dim=1)
    of_all = everyone(sure)
    kept_rows, kept_classes = unsure(of_all.amax(dim=1)), unsure(of_all.sum(dim=0))
    if form == "released":
        row_weight, class_weight = kept_rows.mean().expand(rows), kept_classes.mean().expand(classes)
    else:
        start = gather_rows(sure)[1] if gather else 0
        row_weight, class_weight = kept_rows[start : start + rows], kept_classes

    scored = [zscore(logits, dim=1) if standardize else logits for logits in views]
    instance, batch, class_ = [], [], []
    for number, temperature in enumerate(temperatures):
        again = (0, 2) if form == "released" and number >= STRONG else (1, 3)
        instance += [
            row_weight * instance_level(scored[0], scored[2], temperature),
            instance_level(scored[again[0]], scored[again[1]], temperature),
        ]
        p, q = (F.softmax(logits / temperature, dim=1) for logits in (student_logits, teacher_logits))
        all_p, all_q = everyone(p), everyone(q)
        batch.append(row_weight * batch_level(p, q, all_p, all_q))
        class_.append(class_weight * class_level(all_p, all_q))

    if labelled is None:
        labelled = torch.ones(rows, dtype=torch.bool, device=student_logits.device)
    known = target.where(labelled, 0) if target.ndim == 1 else target.to(student_logits.dtype)
    own = F.cross_entropy(student_strong, known, reduction="none").where(labelled, 0.0)
    return {
        "instance": alpha * torch.stack(instance).sum() / max(rows, 1),
        "batch": alpha * torch.stack(batch).sum() / max(rows, 1),
        "class": alpha * torch.stack(class_).sum() / classes,
        "label": beta * own.sum() / labelled.sum().clamp(min=1),
    }


@final
class MLKD(Term):
    """Term form of :func:`mlkd`. Reads the logits of both models on the batch and on a further view of it.

    Unlabelled rows count at all three levels; the strong view's cross-entropy skips them.

    Args:
        alpha: see :func:`mlkd`.
        beta: see :func:`mlkd`.
        temperatures: see :func:`mlkd`.
        form: see :func:`mlkd`.
        standardize: see :func:`mlkd`.
        gather: see :func:`mlkd`.
        view: name of the strong view, as the data section makes it.
    """

    def __init__(
        self,
        *,
        alpha: float = 0.9,
        beta: float = 0.1,
        temperatures: Sequence[float] = TEMPERATURES,
        form: Form = "released",
        standardize: bool = False,
        gather: bool = False,
        view: str = "strong",
    ) -> None:
        super().__init__()
        if form not in ("released", "paper"):
            raise UserError(f"form {form!r} is not known; valid: paper, released")
        if not temperatures or min(temperatures) <= 0:
            raise UserError(f"temperatures must be > 0 and at least one, not {list(temperatures)}")
        if not view:
            raise UserError("view names the strong view of the batch; it cannot be empty")
        self.alpha, self.beta, self.temperatures = alpha, beta, tuple(temperatures)
        self.form: Form = form
        self.standardize, self.gather, self.view = standardize, gather, view

    @property
    def reads(self) -> Reads:
        """The logits of both models on both views."""
        taps = Tap("logits"), Tap("logits", view=self.view)
        return Reads(taps, taps)

    def forward(self, student: Signals, teacher: Signals, batch: Batch) -> dict[str, Tensor]:  # type: ignore[override]
        """Return the parts `instance`, `batch`, `class` and `label`.

        Raises:
            UserError: if the targets of the data are no classes.
        """
        strong = f"logits@{self.view}"
        return mlkd(
            student.logits,
            student[strong],
            teacher.logits,
            teacher[strong],
            class_target(batch, "mlkd"),
            batch.labelled,
            alpha=self.alpha,
            beta=self.beta,
            temperatures=self.temperatures,
            form=self.form,
            standardize=self.standardize,
            gather=self.gather,
        )
