# SPDX-License-Identifier: Apache-2.0
"""Distil without a stronger teacher: from a made-up teacher that is always right, or from a trained copy of oneself.

Two methods of one paper. `virtual` needs no teacher at all and acts like label smoothing; `self` takes a trained
network of the student's own kind for a teacher. The paper averages the divergence over samples; the released code
averages over classes too and multiplies by a number found for each architecture.
"""

from dataclasses import replace
from typing import Literal, final

import torch
from torch import Tensor

from tutelage.core import Batch, Card, Signals, Term
from tutelage.core.error import UserError
from tutelage.core.labels import check_logits, class_target
from tutelage.functional.divergence import kl_divergence
from tutelage.functional.precision import full_precision

CARD = Card(
    name="Tf-KD",
    title="Revisiting Knowledge Distillation via Label Smoothing Regularization",
    authors="Yuan, Tay, Li, Wang, Feng",
    year=2020,
    venue="CVPR",
    paper="arxiv:1909.11723",
    code="github:yuanli2333/Teacher-free-Knowledge-Distillation@d000ab3",
    code_licence="MIT",
    claims="A student gains as much from itself, or from a hand-made teacher, as from a stronger network.",
    reads={"student": ("logits",)},
    labels=("hard",),
    averages="labelled",
    batch="independent",
    zero_at_teacher=False,
    golden=("classic/tf_kd",),
)

OBJECTIVE = {"task": 0.9, "tf_kd": {"weight": 10.0}}  # alpha 0.1, times the code's factor of 100 on CIFAR-100

Kind = Literal["virtual", "self"]
Form = Literal["elements", "samples"]


def virtual_teacher(target: Tensor, num_classes: int, correct: float = 0.99) -> Tensor:
    """Return the answers of a teacher that is always right: `correct` at the label, the rest spread evenly.

    Args:
        target: `[B]` int64 classes in [0, K).
        num_classes: K, at least 2.
        correct: probability of the label.

    Returns:
        `[B, K]` float64.

    Example:
        >>> virtual_teacher(torch.tensor([1]), 3, 0.8)
        tensor([[0.1000, 0.8000, 0.1000]], dtype=torch.float64)
    """
    others = torch.full((len(target), num_classes), (1 - correct) / max(num_classes - 1, 1), dtype=torch.float64)
    return others.to(target.device).scatter(1, target[:, None], correct)


@full_precision
def tf_kd(
    student_logits: Tensor,
    teacher_logits: Tensor | None = None,
    target: Tensor | None = None,
    labelled: Tensor | None = None,
    *,
    temperature: float = 20.0,
    correct: float = 0.99,
    form: Form = "elements",
) -> Tensor:
    """Return the divergence from a trained copy (if its logits are given), or from the virtual teacher.

        self:     L = T^2 / n * sum_b KL( softmax(t_b / T) || softmax(s_b / T) )
        virtual:  L = 1 / n * sum_b KL( softmax(a_b / T) || softmax(s_b) ),  a = correct at the label,
                  (1 - correct) / (K - 1) elsewhere

    Convention:
        - KL runs from teacher to student; n is B K (`elements`) or B (`samples`)
        - the virtual teacher's values a lie in [0, 1]: at T = 20 their softmax is almost even
        - without a teacher the student is not softened, there is no T^2, and B counts labelled rows

    Args:
        student_logits: `[B, K]`, any float dtype; compared in float32 or wider.
        teacher_logits: `[B, K]` of a trained copy, or None for the virtual teacher.
        target: `[B]` int64 classes (anything where unlabelled), for the virtual teacher.
        labelled: `[B]` bool, all by default; for the virtual teacher.
        temperature: T, > 0.
        correct: the virtual teacher's value at the label.
        form: `elements` (the released code) or `samples` (the paper).

    Returns:
        Scalar, float32 or wider; without rows to average a connected zero.

    Raises:
        UserError: if shapes differ, or neither a teacher nor labels are given.

    Example:
        >>> tf_kd(torch.zeros(1, 2), target=torch.tensor([0]), temperature=1.0, form="samples")
        tensor(0.1070)

    Reference: Yuan et al., Revisiting Knowledge Distillation via Label Smoothing Regularization, CVPR 2020.
    """
    rows, classes = student_logits.shape
    share = classes if form == "elements" else 1
    if teacher_logits is not None:
        if student_logits.shape != teacher_logits.shape:
            raise UserError(
                f"tf_kd compares logits of one shape: the student's are {list(student_logits.shape)}, "
                f"the teacher's {list(teacher_logits.shape)}"
            )
        apart = kl_divergence(student_logits / temperature, teacher_logits / temperature)
        return temperature**2 * apart.sum() / max(rows * share, 1)
    if target is None or target.shape != (rows,):
        given = "none" if target is None else f"a target of shape {list(target.shape)}"
        raise UserError(f"tf_kd without a teacher needs one class a row, [{rows}], not {given}")
    if labelled is None:
        labelled = torch.ones_like(target, dtype=torch.bool)
    virtual = virtual_teacher(target.where(labelled, 0), classes, correct).to(student_logits.dtype)
    apart = kl_divergence(student_logits, virtual / temperature)
    return apart.where(labelled, 0.0).sum() / (labelled.sum().clamp(min=1) * share)


@final
class TfKD(Term):
    """Term form of :func:`tf_kd`.

    Args:
        kind: `virtual` needs no teacher and reads labels; `self` compares with a teacher, which should be a
            trained network of the student's kind, on all rows.
        temperature: see :func:`tf_kd`.
        correct: see :func:`tf_kd`.
        form: see :func:`tf_kd`.
    """

    def __init__(
        self,
        *,
        kind: Kind = "virtual",
        temperature: float = 20.0,
        correct: float = 0.99,
        form: Form = "elements",
    ) -> None:
        super().__init__()
        for word, given, valid in (("kind", kind, ("self", "virtual")), ("form", form, ("elements", "samples"))):
            if given not in valid:
                raise UserError(f"{word} {given!r} is not known; valid: {', '.join(valid)}")
        if temperature <= 0:
            raise UserError(f"temperature must be > 0, not {temperature}")
        if not 0 < correct <= 1:
            raise UserError(f"correct is a probability in (0, 1], not {correct}")
        self.kind: Kind = kind
        self.form: Form = form
        self.temperature, self.correct = temperature, correct

    @property
    def card(self) -> Card:
        """The file's card; of the `self` kind, one that reads a teacher and no labels."""
        if self.kind == "virtual":
            return CARD
        return replace(
            CARD,
            reads={"student": ("logits",), "teacher": ("logits",)},
            labels=("none",),
            averages="samples",
            zero_at_teacher=True,
        )

    def forward(self, student: Signals, teacher: Signals | None, batch: Batch) -> Tensor:
        """Return the divergence from the teacher, or from the virtual one.

        Raises:
            UserError: if the logits are not `[B, K]`, or the virtual teacher finds no class labels.
        """
        check_logits(student.logits, student.logits if teacher is None else teacher.logits, "tf_kd")
        if teacher is not None:
            return tf_kd(student.logits, teacher.logits, temperature=self.temperature, form=self.form)
        return tf_kd(
            student.logits,
            None,
            class_target(batch, "tf_kd"),
            batch.labelled,
            temperature=self.temperature,
            correct=self.correct,
            form=self.form,
        )
