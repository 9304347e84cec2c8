# SPDX-License-Identifier: Apache-2.0
"""Where the knowledge comes from. A teacher stands beside the trained module, never inside it."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Literal, final

import torch
from torch import nn

from tutelage.core.batch import Batch
from tutelage.core.error import UserError
from tutelage.core.model import Model
from tutelage.core.reader import Reader
from tutelage.core.signals import Signals
from tutelage.core.tap import Tap
from tutelage.core.task import Task

Mode = Literal["eval", "batch_statistics", "train"]


class Teacher(ABC):
    """Yields signals without gradient. The Distiller tells it at build what will be read."""

    @abstractmethod
    def plan(self, taps: Iterable[Tap], borrows: Iterable[str], task: Task, sample: Batch) -> Signals:
        """Prepare to record these taps and lend these modules; return the signals of a dry run."""

    @abstractmethod
    def observe(self, batch: Batch) -> Signals:
        """Return the signals for a batch."""

    def networks(self) -> tuple[nn.Module, ...]:
        """Return the networks that answer, whose state a dry run must leave as it was."""
        return ()

    def follow(self, student: nn.Module) -> None:  # noqa: B027, most teachers stand still
        """Move after an optimizer step, for teachers that follow the student."""

    def close(self) -> None:  # noqa: B027, not every teacher holds anything
        """Let go of hooks and files."""


@final
class Live(Teacher):
    """A network that answers as it is asked.

    Args:
        model: the teacher; its parameters are frozen.
        mode: `eval`; `batch_statistics` (batch norm normalises with the batch, running statistics do not
            move, dropout and drop-path are off); or `train` (everything moves, as in some published runs).
    """

    def __init__(self, model: nn.Module | Model, mode: Mode = "eval") -> None:
        self.model = Model.of(model)
        if mode not in ("eval", "batch_statistics", "train"):
            raise UserError(f"teacher mode {mode!r} is not known; valid: batch_statistics, eval, train")
        self.mode: Mode = mode
        self.reader: Reader | None = None
        self.borrowed: dict[str, nn.Module] = {}
        self.norms = [m for m in self.model.module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for parameter in self.model.module.parameters():
            parameter.requires_grad_(False)
        self.settle()

    def settle(self) -> None:
        """Put the network into its mode."""
        self.model.module.train(self.mode == "train")
        still = self.mode == "batch_statistics"
        for norm in self.norms:
            norm.train(self.mode != "eval")
            norm.track_running_stats = norm.running_mean is not None and not still

    def settled(self) -> bool:
        """Whether the network still is in its mode: someone may have called `train` or `eval` on it."""
        if self.model.module.training != (self.mode == "train"):
            return False
        return self.mode != "batch_statistics" or all(norm.training for norm in self.norms)

    def networks(self) -> tuple[nn.Module, ...]:
        """Return the one network."""
        return (self.model.module,)

    def plan(self, taps: Iterable[Tap], borrows: Iterable[str], task: Task, sample: Batch) -> Signals:
        """Set the hooks, copy the modules to be lent, and return the signals of a first forward."""
        self.close()
        for role in [name for wanted in borrows for name in self.model.lent(wanted)]:
            lent = copy.deepcopy(self.model.lend(role)).eval()
            self.borrowed[role] = lent.requires_grad_(False)
        self.reader = Reader(self.model, taps, task)
        with torch.no_grad():
            self.reader.rehearse(sample)
        return self.observe(sample)

    @torch.no_grad()
    def observe(self, batch: Batch) -> Signals:
        """Return the network's signals.

        Raises:
            RuntimeError: if no Distiller was built with this teacher.
        """
        if self.reader is None:
            raise RuntimeError("a teacher answers once a Distiller was built with it: Distiller(..., teacher=teacher)")
        if not self.settled():
            self.settle()
        return self.reader(batch, self.borrowed)

    def close(self) -> None:
        """Remove every hook."""
        if self.reader is not None:
            self.reader.close()
        self.reader = None
