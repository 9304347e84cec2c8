# SPDX-License-Identifier: Apache-2.0
"""The next token, or the hidden ones: cross-entropy, perplexity and accuracy over labelled tokens."""

import math
from collections.abc import Iterable
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional as F

from tutelage.core import Batch, Model
from tutelage.core.card import Averages
from tutelage.core.error import UserError
from tutelage.functional.precision import full_precision
from tutelage.functional.tokens import over_tokens, token_mean

MOST = 700.0  # nats: the exponential of more is no number in float64


@full_precision
def _rows(logits: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    return F.cross_entropy(logits, target[:, 0], reduction="none", label_smoothing=label_smoothing)


def cross_entropy(
    logits: Tensor, target: Tensor, labelled: Tensor, *, label_smoothing: float = 0.0, chunk: int | None = None
) -> Tensor:
    """Return the cross-entropy of each labelled token, 0 at the others.

    Args:
        logits: `[B, L, V]`; position i answers for `target[:, i]`.
        target: `[B, L]` int64, anything where unlabelled.
        labelled: `[B, L]` bool.
        label_smoothing: share of the target spread evenly over all tokens.
        chunk: tokens at a time; by default as memory allows.

    Returns:
        `[B, L]`, in nats.
    """

    def rows(logits: Tensor, target: Tensor) -> Tensor:
        return _rows(logits, target, label_smoothing)

    return over_tokens(rows, logits, target[..., None], labelled, chunk=chunk)


@final
class Language:
    """One token at each position: the next one (causal), or the one that was hidden (masked).

    The data says which; see `tutelage.data.text`. Targets are aligned with the answers: position i of the
    logits is for position i of the targets.

    Args:
        label_smoothing: of the training loss.
        chunk: tokens whose loss is worked out at a time; by default as memory allows.

    Raises:
        UserError: if an option makes no sense.
    """

    name = "language"
    averages: Averages = "labelled"
    headline = "perplexity"
    provides: tuple[str, ...] = ("hidden", "q", "k", "v", "logits", "classifier")

    def __init__(self, *, label_smoothing: float = 0.0, chunk: int | None = None) -> None:
        if not 0 <= label_smoothing < 1:
            raise UserError(f"label_smoothing is a share in [0, 1), not {label_smoothing}")
        if chunk is not None and chunk < 1:
            raise UserError(f"chunk counts tokens, at least 1, not {chunk}")
        self.label_smoothing, self.chunk = label_smoothing, chunk

    def call(self, model: Model, batch: Batch) -> Any:
        """Return the model's output for the batch's tokens."""
        return model(batch.inputs)

    def logits(self, output: Any) -> Tensor:
        """Return `[B, L, V]` from what a model of text returns: a tensor, or an output with `logits`."""
        found: Tensor = output if isinstance(output, Tensor) else output.logits
        return found

    def loss(self, output: Any, batch: Batch) -> Tensor:
        """Return the cross-entropy averaged over labelled tokens.

        Raises:
            UserError: if the answers are not aligned with the targets.
        """
        losses = self._losses(output, batch, self.label_smoothing)
        return token_mean(losses, batch.labelled)

    def _losses(self, output: Any, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
        logits = self.logits(output)
        fits = isinstance(batch.target, Tensor) and logits.ndim == 3 and logits.shape[:-1] == batch.target.shape
        if not fits:
            given = list(getattr(batch.target, "shape", ())) or type(batch.target).__name__
            raise UserError(
                f"language needs a target [B, L] for logits [B, L, V]: the targets are {given}, the logits "
                f"{list(logits.shape)}; is the data text, and the model one of language?"
            )
        return cross_entropy(logits, batch.target, batch.labelled, label_smoothing=label_smoothing, chunk=self.chunk)

    def score(self, answers: Iterable[tuple[Any, Batch]]) -> dict[str, float]:
        """Return perplexity, loss (nats a token) and token accuracy, over all labelled tokens together.

        Raises:
            UserError: if no token is labelled.
        """
        loss, right, count = 0.0, 0, 0
        for output, batch in answers:
            hit = (self.logits(output).argmax(-1) == batch.target) & batch.labelled
            loss += self._losses(output, batch).sum(dtype=torch.float64).item()
            right += int(hit.sum())
            count += int(batch.labelled.sum())
        if not count:
            raise UserError("nothing to score: no labelled token in this split")
        mean = loss / count
        return {"perplexity": math.exp(min(mean, MOST)), "loss": mean, "token_accuracy": right / count}
