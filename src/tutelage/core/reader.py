# SPDX-License-Identifier: Apache-2.0
"""One model read through its taps."""

from collections.abc import Callable, Iterable, Mapping
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from tutelage.core.batch import Batch
from tutelage.core.error import UserError
from tutelage.core.model import Model
from tutelage.core.signals import NONE, Signals
from tutelage.core.tap import Recorder, Tap
from tutelage.core.task import Task


class Reader:
    """Calls one model and returns its signals. Hooks are set once, here.

    Args:
        model: whose forward is read.
        taps: what to record; `logits` comes from the task and needs no hook.
        task: how the model is called.
    """

    def __init__(self, model: Model, taps: Iterable[Tap], task: Task) -> None:
        self.model, self.task = model, task
        wanted = tuple(taps)
        self.reads_logits = any(tap.where == "logits" for tap in wanted)
        named = [one for tap in wanted if tap.where != "logits" for one in model.expand(tap)]
        places = {tap.name: model.resolve(tap) for tap in named}
        self.recorder = Recorder(model.module, places)
        self.overwritten: tuple[str, ...] = ()
        self._forward: Callable[[Batch], tuple[Any, dict[str, Any]]] = self._plain

    def _plain(self, batch: Batch) -> tuple[Any, dict[str, Any]]:
        with self.recorder:
            output = self.task.call(self.model, batch)
        taps: dict[str, Any] = self.recorder.release()
        logits = self.task.logits(output)
        return output, taps if logits is None else {**taps, "logits": logits}

    def __call__(self, batch: Batch, borrowed: Mapping[str, nn.Module] = NONE) -> Signals:
        """Return the model's signals for a batch."""
        return Signals(*self._forward(batch), borrowed)

    def rehearse(self, batch: Batch) -> Signals:
        """Return the signals of a first forward, in which taps that are overwritten in place are found.

        Those taps are cloned from here on; their names are in `overwritten`.

        Raises:
            UserError: if logits are to be read and the task has none.
        """
        self.recorder.watch()
        with self.recorder:
            self.task.call(self.model, batch)
        self.overwritten += self.recorder.clone_overwritten()
        signals = self(batch)
        if self.reads_logits and "logits" not in signals.taps:
            raise UserError(f"a term reads logits, and the task {self.task.name!r} has none")
        return signals

    def compile(self, **options: Any) -> None:
        """Compile the forward; the hooks are part of the compiled frame.

        The compiler gives up on a code object after eight different frames, and models, modes and batch sizes
        all make their own: each reader brings a code object of its own.
        """
        plain = type(self)._plain
        own = FunctionType(plain.__code__.replace(), plain.__globals__, plain.__name__, plain.__defaults__)
        self._forward = torch.compile(MethodType(own, self), **options)

    def close(self) -> None:
        """Remove the hooks."""
        self.recorder.close()
