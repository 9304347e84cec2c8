# SPDX-License-Identifier: Apache-2.0
"""The learning rate over time, as a factor on each group's own rate."""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tutelage.core.schedule import Span

Decay = Literal["constant", "cosine", "flat_cosine", "linear", "poly", "multistep", "exponential"]


@dataclass(frozen=True)
class Rate:
    """Linear warm-up, then a decay over the rest of the run.

    Args:
        decay: `constant`, `cosine`, `linear` or `poly` (what is left of the run, to the power `power`) from 1 to
            `end`, `flat_cosine` (1 for half of the run, then a cosine to `end`), `multistep` (times `gamma` at each
            milestone), or `exponential` (times `gamma` an epoch).
        warmup: optimizer steps of the warm-up from `warmup_start`.
        warmup_start: first factor.
        end: last factor of cosine, flat_cosine, linear and poly.
        milestones: in epochs.
        gamma: factor of multistep and exponential.
        power: exponent of poly.
        steps_per_epoch: optimizer steps.
        total_steps: of the run.
    """

    decay: Decay
    steps_per_epoch: int
    total_steps: int
    warmup: float = 0.0
    warmup_start: float = 0.0
    end: float = 0.0
    milestones: Sequence[float] = ()
    gamma: float = 0.1
    power: float = 0.9

    @classmethod
    def warm(cls, warmup: str | None, steps_per_epoch: int) -> float:
        """Return a warm-up written as "5 epochs" or "500 steps" in optimizer steps."""
        return Span.parse(warmup).steps(steps_per_epoch) if warmup else 0.0

    def at(self, step: int) -> float:
        """Return the factor at a 0-based optimizer step.

        Example:
            >>> rate = Rate("cosine", steps_per_epoch=10, total_steps=100, warmup=4)
            >>> [round(rate.at(step), 3) for step in (0, 1, 4, 52, 100)]
            [0.25, 0.5, 1.0, 0.5, 0.0]
        """
        if step < self.warmup:
            risen = min((step + 1) / self.warmup, 1.0)  # an epoch's share may end between two steps
            return self.warmup_start + (1 - self.warmup_start) * risen
        progress = min((step - self.warmup) / max(self.total_steps - self.warmup, 1), 1.0)
        if self.decay == "cosine":
            return self.end + (1 - self.end) * (1 + math.cos(math.pi * progress)) / 2
        if self.decay == "flat_cosine":
            late = max(2 * step / max(self.total_steps, 1) - 1, 0.0)
            return self.end + (1 - self.end) * (1 + math.cos(math.pi * min(late, 1.0))) / 2
        if self.decay == "linear":
            return self.end + (1 - self.end) * (1 - progress)
        if self.decay == "poly":
            return self.end + (1 - self.end) * float((1 - progress) ** self.power)
        epoch = step / self.steps_per_epoch
        if self.decay == "multistep":
            return float(self.gamma ** bisect.bisect_right(list(self.milestones), epoch))
        if self.decay == "exponential":
            return float(self.gamma ** math.floor(epoch))
        return 1.0
