# SPDX-License-Identifier: Apache-2.0
"""The loop: accumulation, clipping, averaging of weights, evaluation, logs, and exact resume."""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tutelage.core import Batch, Distiller, Losses, ranks
from tutelage.core.error import UserError
from tutelage.functional.noise import mix
from tutelage.train.average import Average
from tutelage.train.checkpoint import Shelf, load, nonfinite, require_fit
from tutelage.train.lockstep import Batches, exhaust
from tutelage.train.log import Log
from tutelage.train.rate import Rate
from tutelage.train.runtime import Runtime

DROPOUT = 0x0D  # salt of the generators' seed in a step
NORM = "gradient norm"
NEVER = 0  # steps are counted from 1 in records and messages


class DivergedError(UserError):
    """The run met a value that is not finite."""


@dataclass
class Loop:
    """Trains a Distiller.

    Every random choice is a function of seed, step and sample; hence the state of a run is its weights, the
    optimizer's state, the average and the step, and a resumed run ends with the same bits.

    Args:
        distiller: what is trained.
        batches: the data.
        optimizer: built from `distiller.param_groups()`.
        rate: factor on the learning rates.
        total_steps: optimizer steps of the run.
        seed: of dropout and its like.
        runtime: device and precision.
        accumulate: micro-batches of an optimizer step.
        clip: largest gradient norm, or None.
        average: moving average of the student's weights, or None.
        log: where metrics go.
        shelf: where checkpoints go; None saves none.
        save_every: optimizer steps between checkpoints.
        log_every: optimizer steps between log lines.
        evaluate: gives the student's scores; called every `evaluate_every` steps and at the end.
        evaluate_every: optimizer steps; 0 evaluates at the end only.
    """

    distiller: Distiller
    batches: Batches
    optimizer: torch.optim.Optimizer
    rate: Rate
    total_steps: int
    seed: int
    runtime: Runtime
    log: Log
    accumulate: int = 1
    clip: float | None = None
    average: Average | None = None
    shelf: Shelf | None = None
    save_every: int = 0
    log_every: int = 50
    evaluate: Callable[[], Mapping[str, float]] | None = None
    evaluate_every: int = 0

    def run(self) -> dict[str, float]:
        """Train to the last step, from the newest checkpoint if there is one; return the last scores.

        Raises:
            DivergedError: naming the first step and term that were not finite.
        """
        return exhaust(self.running())

    def running(self) -> Generator[int, None, dict[str, float]]:
        """Do what `run` does, and yield the number of steps done before each further one.

        Every step seeds the generators it draws from: whatever happens between two steps, the bits are the same.
        """
        self.begin()
        self._resume()
        self.never_finite = set(nonfinite(self.state()))  # such as a mask that a model keeps as a buffer
        self.distiller.train()
        scores: dict[str, float] | None = None
        yield self.distiller.step
        for batches in self._steps():
            step = self.distiller.step
            losses = self.step(batches)
            done = self.distiller.step
            self.log.show(done)
            last = done == self.total_steps
            if done % self.log_every == 0 or last:
                self._write(losses, step)
            save = bool(self.save_every) and (last or done % self.save_every == 0)
            state = self._finite_state() if save or last else {}
            if last or (self.evaluate_every and done % self.evaluate_every == 0):
                scores = self._score()
            if save and self.shelf and ranks.rank() == 0:
                self.shelf.put(done, state)  # after the lines of this step: a resumed run does not repeat them
            if not last:
                yield done
        return self._scores() if scores is None else scores

    def begin(self) -> None:
        """Make ready for steps."""
        self.base_rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.broken: dict[str, Tensor] = {}
        self.call = self.runtime.wrap(self.distiller)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps an epoch."""
        return -(-self.batches.steps_per_epoch // self.accumulate)

    def _steps(self) -> Iterator[list[Batch]]:
        """Yield the micro-batches of each optimizer step that is left."""
        while self.distiller.step < self.total_steps:
            epoch, position = divmod(self.distiller.step, self.steps_per_epoch)
            group: list[Batch] = []
            left = self.batches.steps_per_epoch - position * self.accumulate
            for batch in self.batches.epoch(epoch, start=position * self.accumulate):
                group.append(batch)
                left -= 1
                if len(group) == self.accumulate or left == 0:
                    yield group
                    group = []
                    if self.distiller.step >= self.total_steps:
                        return

    def step(self, batches: Sequence[Batch]) -> list[Losses]:
        """Run one optimizer step over its micro-batches."""
        step, losses = self.distiller.step, []
        self._set_rates(step)
        moved = (batch.to(self.runtime.device) for batch in batches)
        shared = self.distiller.share([fed for batch in moved for fed in self.distiller.feed(batch)])
        for number, batch in enumerate(shared):
            self.runtime.seed(mix(self.seed, step, DROPOUT, number, ranks.rank()))
            with self.runtime.unsynced(self.call, number + 1 == len(shared)):
                with self.runtime.autocast():
                    signals = self.distiller.observe(batch)
                    one = self.call(batch, signals)
                self.runtime.backward(one.total / len(shared))
            losses.append(one)
        norm = self.runtime.step(self.optimizer, self.parameters, self.clip)
        self._note(losses, norm, step)
        self.distiller.after_step(*losses)
        if self.average is not None:
            self.average.update(step)
        return losses

    def _set_rates(self, step: int) -> None:
        factor = self.rate.at(step)
        for group, base in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = base * factor

    # --- finiteness --------------------------------------------------------------------------------------

    def _note(self, losses: list[Losses], norm: Tensor | None, step: int) -> None:
        """Remember on the device the first step at which each number was not finite."""
        found = [(f"loss of {name}", value) for one in losses for name, value in one.parts.items()]
        if norm is not None and self.runtime.scaler is None:  # fp16 skips such steps by itself
            found.append((NORM, norm))
        for name, value in found:
            first = self.broken.setdefault(name, torch.full((), NEVER, device=value.device))
            self.broken[name] = torch.where((first == NEVER) & ~value.isfinite(), step + 1, first)

    def _require_finite(self) -> None:
        firsts = {name: int(value) for name, value in self.broken.items()}
        bad = {name: step for name, step in firsts.items() if step != NEVER}
        if bad:
            step = min(bad.values())
            names = [name for name in bad if bad[name] == step]
            losses = [name for name in names if name != NORM]  # a loss spoils the norm, not the other way round
            raise self._diverged(f"the {' and the '.join(losses or names)}", step)

    def _diverged(self, what: str, step: int) -> DivergedError:
        newest = self.shelf.newest if self.shelf else None
        kept = f"; the last finite checkpoint is {newest}" if newest else ""
        return DivergedError(
            f"{what} {'are' if ' and ' in what else 'is'} not finite at step {step}: lower optimizer.lr, clip "
            f"gradients (train.clip), or lower the weight of the term{kept}"
        )

    def _finite_state(self) -> dict[str, Any]:
        """Return the state; one that is not finite is refused."""
        self._require_finite()
        state = self.state()
        bad = [name for name in nonfinite(state) if name not in self.never_finite]
        if bad:
            raise self._diverged(bad[0].replace("/", " ", 1), self.distiller.step)
        return state

    # --- records -----------------------------------------------------------------------------------------

    def _write(self, losses: list[Losses], step: int) -> None:
        self._require_finite()
        values = {"epoch": (step + 1) / self.steps_per_epoch, "lr": self.optimizer.param_groups[0]["lr"]}
        values["total"] = float(torch.stack([one.total.detach() for one in losses]).mean())
        for name in losses[0].parts:
            values[name] = float(torch.stack([one.parts[name] for one in losses]).mean())
        self.log.show(step + 1, f"loss {values['total']:.4g}")
        if ranks.rank() == 0:
            self.log.write("train", step + 1, values)

    def _scores(self) -> dict[str, float]:
        if self.evaluate is None:
            return {}
        with self.average.applied() if self.average is not None else nullcontext():
            scores = dict(self.evaluate())
        self.distiller.train()
        return scores

    def _score(self) -> dict[str, float]:
        scores, step = self._scores(), self.distiller.step
        if scores and ranks.rank() == 0:
            self.log.write("evaluation", step, {"epoch": step / self.steps_per_epoch, **scores})
        return scores

    # --- resume ------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return everything a resumed run needs."""
        return {
            "step": self.distiller.step,
            "distiller": self.distiller.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.weights if self.average else None,
            "scaler": self.runtime.scaler.state_dict() if self.runtime.scaler else None,
            "feeders": [feeder.state() for feeder in self.distiller.feeders],
        }

    def _resume(self) -> None:
        path = self.shelf.newest if self.shelf else None
        if path is not None:
            self._restore(load(path), path)
        if ranks.rank() == 0:
            self.log.rewind(self.distiller.step)

    def _restore(self, state: dict[str, Any], path: Path) -> None:
        try:
            require_fit(state["distiller"], self.distiller.state_dict(), str(path))
            self.distiller.load_state_dict(state["distiller"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.average is not None:
                self.average.load(state["average"])
            if self.runtime.scaler is not None:
                self.runtime.scaler.load_state_dict(state["scaler"])
            for feeder, held in zip(self.distiller.feeders, state["feeders"], strict=True):
                feeder.load(held)
        except UserError:
            raise
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(f"{path} does not fit this run ({error}); remove it to go on without it") from error
