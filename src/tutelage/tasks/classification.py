# SPDX-License-Identifier: Apache-2.0
"""One class an image: softmax cross-entropy, accuracy."""

from collections.abc import Iterable
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional as F

from tutelage.core import Batch, Model
from tutelage.core.card import Averages
from tutelage.core.error import UserError
from tutelage.functional.precision import full_precision


@full_precision
def cross_entropy(logits: Tensor, target: Tensor, labelled: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the mean cross-entropy over labelled rows, or a connected zero if there are none.

    Args:
        logits: `[B, K]`.
        target: `[B]` classes (anything where unlabelled), or `[B, K]` soft labels.
        labelled: `[B]` bool.
        label_smoothing: share of the target spread evenly over all classes.
    """
    if target.ndim == 1:
        target = target.where(labelled, 0)
    rows = F.cross_entropy(logits, target, reduction="none", label_smoothing=label_smoothing)
    return rows.where(labelled, 0.0).sum() / labelled.sum().clamp(min=1)


@final
class Classification:
    """One class an image.

    Args:
        num_classes: K.
        label_smoothing: of the training loss.
    """

    name = "classification"
    averages: Averages = "labelled"
    headline = "top1"
    provides: tuple[str, ...] = (
        *("stem", "stages", "map", "pooled", "logits", "classifier"),
        *("blocks", "tokens", "cls", "q", "k", "v"),
    )

    def __init__(self, num_classes: int, *, label_smoothing: float = 0.0) -> None:
        self.num_classes, self.label_smoothing = num_classes, label_smoothing

    def call(self, model: Model, batch: Batch) -> Any:
        """Return the model's output for the batch's inputs."""
        return model(batch.inputs)

    def logits(self, output: Any) -> Tensor:
        """Return `[B, K]` from whatever a classifier returns: a tensor, or the first of several."""
        if isinstance(output, Tensor):
            return output
        found = getattr(output, "logits", None)
        scores: Tensor = found if found is not None else next(iter(output))
        return scores

    def loss(self, output: Any, batch: Batch) -> Tensor:
        """Return the cross-entropy averaged over labelled rows.

        Raises:
            UserError: if the model has another number of classes than the data.
        """
        logits = self.logits(output)
        if logits.shape[1] != self.num_classes:
            raise UserError(f"the model has {logits.shape[1]} classes, the data {self.num_classes}")
        return cross_entropy(
            logits, batch.target, batch.labelled, self.label_smoothing if self.training_target(batch) else 0.0
        )

    @staticmethod
    def training_target(batch: Batch) -> bool:
        """Whether targets are hard: soft ones are smooth already."""
        return isinstance(batch.target, Tensor) and batch.target.ndim == 1

    def score(self, answers: Iterable[tuple[Any, Batch]]) -> dict[str, float]:
        """Return top-1 and (of more than five classes) top-5 accuracy, loss (nats) and calibration error.

        All are means over labelled rows.
        """
        logits, target = [], []
        for output, batch in answers:
            logits.append(self.logits(output).float()[batch.labelled])
            target.append(batch.target[batch.labelled])
        scores, truth = torch.cat(logits), torch.cat(target)
        if not len(truth):
            raise UserError("nothing to score: no labelled sample in this split")
        top = scores.topk(min(5, self.num_classes), dim=1).indices == truth[:, None]
        confidence, answer = scores.softmax(1).max(1)
        return {
            "top1": top[:, 0].float().mean().item(),
            **({"top5": top.any(1).float().mean().item()} if self.num_classes > 5 else {}),
            "loss": F.cross_entropy(scores, truth).item(),
            "ece": calibration_error(confidence, answer == truth),
        }


def agreement(one: Tensor, other: Tensor) -> float:
    """Return the share of samples for which two models name the same class; labels do not matter.

    Args:
        one: `[N]` classes.
        other: `[N]` classes.

    Example:
        >>> agreement(torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 1, 2]))
        0.75
    """
    return (one == other).double().mean().item()


def by_class(answer: Tensor, target: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return how many samples of each class are named rightly, and how many there are.

    Args:
        answer: `[N]` classes.
        target: `[N]` classes; rows with -1 do not count.
        num_classes: K.

    Returns:
        Two `[K]` int64.

    Example:
        >>> by_class(torch.tensor([0, 1, 1]), torch.tensor([0, 0, -1]), 2)
        (tensor([1, 0]), tensor([2, 0]))
    """
    known = target >= 0
    right = target[known & (answer == target)]
    return right.bincount(minlength=num_classes), target[known].bincount(minlength=num_classes)


def calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    """Return the expected calibration error over equal-width bins (Naeini et al. 2015).

    Args:
        confidence: `[N]` probability of the answer.
        correct: `[N]` bool.
        bins: number of bins in (0, 1].
    """
    which = (confidence * bins).ceil().long().clamp(1, bins) - 1
    zeros = torch.zeros(bins, device=confidence.device)
    gap = zeros.scatter_add(0, which, confidence) - zeros.scatter_add(0, which, correct.float())
    return (gap.abs().sum() / len(confidence)).item()
