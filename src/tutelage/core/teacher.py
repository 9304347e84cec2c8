# SPDX-License-Identifier: Apache-2.0
"""Where the knowledge comes from. A teacher stands beside the trained module, never inside it."""

import copy
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, final
from weakref import ref

import torch
from torch import Tensor, nn

from tutelage.core.batch import Batch
from tutelage.core.error import UserError
from tutelage.core.model import Model
from tutelage.core.reader import Reader
from tutelage.core.signals import Signals
from tutelage.core.tap import Tap
from tutelage.core.task import Task

Mode = Literal["eval", "batch_statistics", "train"]
ANSWERS = 4  # batches, or views of one, that a shared teacher remembers


class Teacher(ABC):
    """Yields signals without gradient. The Distiller tells it at build what will be read."""

    #: the network that answers, where there is one that can be called
    model: Model | None = None

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
        self.model: Model = Model.of(model)
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


@dataclass
class _Common:
    """What all who share a teacher have in common."""

    teacher: Live
    taps: dict[Tap, None] = field(default_factory=dict)
    borrows: dict[str, None] = field(default_factory=dict)
    answers: "deque[tuple[ref[Tensor], Signals]]" = field(default_factory=lambda: deque(maxlen=ANSWERS))


@final
class Shared(Teacher):
    """One network that several Distillers ask about the same batches: it answers each of them once.

    A batch is known again by the tensor of its inputs itself, not by its values: nothing is compared, and a batch
    that was loaded twice is answered twice. The hooks stay until the live teacher is closed.

    Args:
        teacher: in mode `eval`, in which an answer changes nothing; or a `Shared` beside which this one stands.

    Raises:
        UserError: if the teacher changes with what it sees.
    """

    def __init__(self, teacher: "Live | Shared") -> None:
        if isinstance(teacher, Live) and teacher.mode != "eval":
            raise UserError(f"a teacher in mode {teacher.mode} changes as it answers; one in mode eval can be shared")
        self.common: _Common = teacher.common if isinstance(teacher, Shared) else _Common(teacher)
        self.model: Model = self.common.teacher.model
        self.names: set[str] = set()

    def networks(self) -> tuple[nn.Module, ...]:
        """Return the one network."""
        return self.common.teacher.networks()

    def plan(self, taps: Iterable[Tap], borrows: Iterable[str], task: Task, sample: Batch) -> Signals:
        """Let the network record these taps beside those of the others; return the signals of a first forward."""
        common, wanted, lent = self.common, tuple(taps), tuple(borrows)
        places = [tap for tap in wanted if tap.where != "logits"]
        self.names = {"logits", *(one.name for tap in places for one in self.model.expand(tap))}
        common.taps |= dict.fromkeys(wanted)
        common.borrows |= dict.fromkeys(lent)
        common.answers.clear()
        return self._own(common.teacher.plan(common.taps, common.borrows, task, sample))

    def observe(self, batch: Batch) -> Signals:
        """Return the network's signals, of now or of when another asked."""
        key = _first(batch.inputs)
        answers = self.common.answers
        for seen, signals in answers:
            if seen() is key:
                return self._own(signals)
        while answers and answers[0][0]() is None:  # nobody can ask for it again
            answers.popleft()
        signals = self.common.teacher.observe(batch)
        answers.append((ref(key), signals))
        return self._own(signals)

    def _own(self, signals: Signals) -> Signals:
        return replace(signals, taps={name: tap for name, tap in signals.taps.items() if name in self.names})


def _first(inputs: Any) -> Tensor:
    """Return the tensor by which inputs are known again."""
    found: Tensor = next(iter(inputs.values() if isinstance(inputs, Mapping) else [inputs]))
    return found
