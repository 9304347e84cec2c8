# SPDX-License-Identifier: Apache-2.0
"""What a term that compares scores by class may be given: classes of a batch, logits of one shape."""

from torch import Tensor

from tutelage.core.batch import Batch, Facts
from tutelage.core.error import UserError


def class_target(batch: Batch, what: str) -> Tensor:
    """Return the classes or soft labels of a batch.

    Args:
        batch: of any task.
        what: the method, for the message.

    Raises:
        UserError: if the targets of the data are no classes.
    """
    if not isinstance(batch.target, Tensor):
        raise UserError(f"{what} needs class labels, and this data has {type(batch.target).__name__} for a target")
    return batch.target


def check_logits(student_logits: Tensor, teacher_logits: Tensor, what: str, *, classes: int = 1) -> None:
    """Refuse anything but two `[B, K]` tensors of one shape.

    Args:
        student_logits: `[B, K]`.
        teacher_logits: `[B, K]`.
        what: the method, for the message.
        classes: the fewest there may be: 1 or 2.

    Raises:
        UserError: naming both shapes.
    """
    given = student_logits.ndim == 2 and student_logits.shape == teacher_logits.shape
    if not given or student_logits.shape[1] < classes:
        several = " of two classes or more" if classes > 1 else ""
        raise UserError(
            f"{what} takes two [B, K] tensors of logits{several}: the student's are {list(student_logits.shape)}, "
            f"the teacher's {list(teacher_logits.shape)}"
        )


def check_classes(target: Tensor, logits: Tensor, what: str) -> None:
    """Refuse anything but one class a row.

    Args:
        target: `[B]`.
        logits: `[B, K]`.
        what: the method, for the message.

    Raises:
        UserError: naming the shape.
    """
    if target.shape != logits.shape[:1]:
        raise UserError(
            f"{what} takes one class a row, [{len(logits)}], not a target of shape {list(target.shape)}; "
            "it cannot use soft labels"
        )


def two_classes(facts: Facts) -> tuple[str, ...]:
    """Return what two classes leave of a comparison among the wrong ones, as a caveat."""
    lost = "with two classes there is one wrong class, and nothing to compare in it: the target part alone is left"
    return (lost,) if facts.num_classes == 2 else ()
