# SPDX-License-Identifier: Apache-2.0
"""Several runs side by side: each batch is loaded once, and a teacher they share answers it once."""

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from tutelage.core import Batch

Key = TypeVar("Key")
T = TypeVar("T")


class Batches(Protocol):
    """What a loop reads: batches as a function of epoch and position."""

    @property
    def steps_per_epoch(self) -> int:
        """Batches an epoch."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from a position on."""


@dataclass
class InStep:
    """Batches that several loops read side by side: the last one is kept on the device for the others.

    A loop that is elsewhere gets its batch too, read anew: it costs time, not bits.

    Args:
        batches: what is read.
        device: of the loops.
    """

    batches: Batches
    device: torch.device

    def __post_init__(self) -> None:
        self.place: tuple[int, int] | None = None
        self.source: Iterator[Batch] = iter(())
        self.batch: Batch | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Batches an epoch."""
        return self.batches.steps_per_epoch

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from a position on."""
        for position in range(start, self.steps_per_epoch):
            yield self._at(epoch, position)

    def _at(self, epoch: int, position: int) -> Batch:
        if self.batch is None or self.place != (epoch, position):
            if self.place != (epoch, position - 1):
                self.source = self.batches.epoch(epoch, start=position)
            self.batch, self.place = next(self.source).to(self.device), (epoch, position)
        return self.batch


def exhaust(running: Generator[object, None, T]) -> T:
    """Return what a generator returns at its end."""
    while True:
        try:
            next(running)
        except StopIteration as end:
            found: T = end.value
            return found


def advance(running: Mapping[Key, Generator[int, None, T]]) -> Iterator[tuple[Key, T]]:
    """Run generators side by side, the one furthest behind first; yield what each returned, as they end.

    If one fails, the others are closed.

    Args:
        running: each yields how many steps it has done.
    """
    done = dict.fromkeys(running, -1)
    try:
        while done:
            key = min(done, key=lambda one: done[one])
            try:
                done[key] = next(running[key])
            except StopIteration as end:
                del done[key]
                yield key, end.value
    finally:
        for one in running.values():
            one.close()
