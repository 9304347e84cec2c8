# SPDX-License-Identifier: Apache-2.0
"""A teacher whose answers were written down: they come with the batch, and no network runs."""

from collections.abc import Iterable, Mapping
from typing import final

import torch
from torch import Tensor, nn

from tutelage.core.batch import Batch
from tutelage.core.error import UserError, nearest
from tutelage.core.signals import Signals
from tutelage.core.tap import Tap, expand
from tutelage.core.task import Task
from tutelage.core.teacher import Teacher
from tutelage.functional.top import largest, spread

STORED = "stored"  # where a batch carries answers, in its `extra`
LOGITS, CLASSES, PROBS = "logits", "logits.classes", "logits.probs"
TINIEST = 1e-30  # probability that stands for none: its logarithm is finite


def pack(taps: Mapping[str, Tensor], top: int | None = None) -> dict[str, Tensor]:
    """Return a teacher's signals as they are kept: a row a sample.

    Args:
        taps: by name, each `[B, ...]`.
        top: keep so many of the largest class probabilities, and not the logits; None keeps the logits, float32.

    Returns:
        `logits` `[B, ..., K]`, or `logits.classes` int32 and `logits.probs` float32 `[B, ..., top]`; everything else
        in bfloat16.

    Example:
        >>> kept = pack({"logits": torch.tensor([[0.0, 2.0, 1.0]])}, top=2)
        >>> kept["logits.classes"], kept["logits.probs"]
        (tensor([[1, 2]], dtype=torch.int32), tensor([[0.6652, 0.2447]]))
    """
    kept = {}
    for name, tap in taps.items():
        if name != LOGITS:
            kept[name] = tap.to(torch.bfloat16)
        elif top is None:
            kept[name] = tap.float()
        else:
            rows = tap.float().softmax(dim=-1).flatten(0, -2)
            classes, probs = largest(rows, top)
            shape = (*tap.shape[:-1], classes.shape[1])
            kept[CLASSES], kept[PROBS] = classes.to(torch.int32).view(shape), probs.view(shape)
    return kept


def unpack(kept: Mapping[str, Tensor], num_classes: int) -> dict[str, Tensor]:
    """Return signals in float32 from what `pack` made of them.

    Where only the largest probabilities were kept, logits are their logarithms, with what is missing to 1 shared
    equally by the other classes: the softmax of these logits gives back what was kept.

    Args:
        kept: by name.
        num_classes: K.
    """
    taps = {name: tensor.float() for name, tensor in kept.items() if name not in (CLASSES, PROBS)}
    if CLASSES in kept:
        classes, probs = kept[CLASSES].long(), kept[PROBS].float()
        dense = spread(classes.flatten(0, -2), probs.flatten(0, -2), num_classes)
        taps[LOGITS] = dense.clamp(min=TINIEST).log().view(*probs.shape[:-1], num_classes)
    return taps


@final
class Stored(Teacher):
    """Answers from disk, which the loader puts into every batch of the training.

    Args:
        first: what is stored of a few samples, by name: the shapes of all.
        num_classes: of the logits.
        lent: modules that the teacher lent when it was asked, by role.
        place: what to call the store in an error.
    """

    def __init__(
        self, first: Mapping[str, Tensor], num_classes: int, lent: Mapping[str, nn.Module], place: str
    ) -> None:
        self.first, self.num_classes, self.place = dict(first), num_classes, place
        self.lent = {role: module.eval().requires_grad_(False) for role, module in lent.items()}
        self.names: tuple[str, ...] = ()
        self.borrowed: dict[str, nn.Module] = {}

    def networks(self) -> tuple[nn.Module, ...]:
        """Return the modules that were lent."""
        return tuple(self.lent.values())

    def plan(self, taps: Iterable[Tap], borrows: Iterable[str], task: Task, sample: Batch) -> Signals:
        """Make sure that all this is stored; return what is, of as many samples.

        Raises:
            UserError: naming what is missing, and what there is.
        """
        rows = len(sample)
        held = {name: tensor[torch.arange(rows) % len(tensor)] for name, tensor in self.first.items()}
        found = unpack({name: tensor.to(sample.index.device) for name, tensor in held.items()}, self.num_classes)
        self.names = tuple(dict.fromkeys(one for tap in taps for one in self._known(tap.name, found)))
        lent = [one for role in borrows for one in self._known(role, self.lent)]
        self.borrowed = {role: self.lent[role] for role in lent}
        return self._signals(found)

    def _known(self, name: str, there: Mapping[str, object]) -> tuple[str, ...]:
        found = expand(name, there)
        if not found or any(one not in there for one in found):
            raise UserError(
                f"{self.place} holds {', '.join(there) or 'nothing of that kind'}, and a term reads {name!r}"
                f"{nearest(name, there)}: store again, with the recipe that reads it"
            )
        return found

    def observe(self, batch: Batch) -> Signals:
        """Return what was stored of the batch.

        Raises:
            UserError: if the batch carries no answers.
        """
        if STORED not in batch.extra:
            raise UserError(f"the batch carries no answers of {self.place}: they come with the batches of training")
        return self._signals(unpack(batch.extra[STORED], self.num_classes))

    def _signals(self, found: Mapping[str, Tensor]) -> Signals:
        taps = {name: found[name] for name in dict.fromkeys((*self.names, LOGITS)) if name in found}
        return Signals(taps.get(LOGITS), taps, self.borrowed)
