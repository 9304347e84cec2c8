# SPDX-License-Identifier: Apache-2.0
"""A number as a function of training progress."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tutelage.core.error import UserError, nearest

Shape = Literal["constant", "linear", "cosine"]
KEYS = ("linear", "cosine", "until", "by")


@dataclass(frozen=True)
class Span:
    """A length of training: optimizer steps, epochs, or (no unit) the whole run."""

    count: float
    unit: Literal["steps", "epochs"]

    @classmethod
    def parse(cls, text: str) -> "Span":
        """Read "20 epochs" or "500 steps".

        Raises:
            UserError: if the text is neither.
        """
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(step|epoch)s?\s*", str(text))
        if match is None:
            raise UserError(f'cannot read {text!r} as a length: write "20 epochs" or "500 steps"')
        return cls(float(match[1]), "steps" if match[2] == "step" else "epochs")

    def steps(self, steps_per_epoch: int) -> float:
        """Return the length in optimizer steps."""
        return self.count * (steps_per_epoch if self.unit == "epochs" else 1)


@dataclass(frozen=True)
class Schedule:
    """A weight over time: constant, or a line or half cosine from `start` to `end`, constant afterwards.

    Written in a recipe as a number, `{linear: [0, 1], until: 20 epochs}` or `{cosine: [1, 0]}`. Without
    `until` it lasts the whole run; `by: epochs` holds it constant within an epoch.

    Example:
        >>> ramp = Schedule.parse({"linear": [0, 1], "until": "4 steps"})
        >>> [ramp.at(step, steps_per_epoch=10, total_steps=100) for step in (0, 1, 4, 50)]
        [0.0, 0.25, 1.0, 1.0]
    """

    start: float
    end: float
    shape: Shape = "constant"
    until: Span | None = None
    by: Literal["steps", "epochs"] = "steps"

    @classmethod
    def parse(cls, value: "float | Mapping[str, Any] | Schedule") -> "Schedule":
        """Read a number, a mapping as in a recipe, or a Schedule.

        Raises:
            UserError: on an unknown key or a malformed value.
        """
        if isinstance(value, Schedule):
            return value
        if isinstance(value, Mapping):
            for key in value:
                if key not in KEYS:
                    raise UserError(f"unknown word {key!r} in a schedule{nearest(str(key), KEYS)}")
            shapes: list[Shape] = [shape for shape in ("linear", "cosine") if shape in value]
            if len(shapes) != 1:
                raise UserError("a schedule has one shape: linear: [start, end] or cosine: [start, end]")
            try:
                start, end = (float(number) for number in value[shapes[0]])
            except (TypeError, ValueError):
                raise UserError(f"{shapes[0]} takes two numbers, [start, end]") from None
            by = value.get("by", "steps")
            if by not in ("steps", "epochs"):
                raise UserError(f"by: {by!r} is not known; valid: epochs, steps")
            until = Span.parse(value["until"]) if "until" in value else None
            return cls(start, end, shapes[0], until, by)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UserError(f"a weight is a number or a schedule, not {value!r}")
        return cls(float(value), float(value))

    @property
    def constant(self) -> bool:
        """Whether the value never changes."""
        return self.shape == "constant"

    def at(self, step: int, *, steps_per_epoch: int, total_steps: int) -> float:
        """Return the value at a 0-based optimizer step."""
        if self.constant:
            return self.end
        length = self.until.steps(steps_per_epoch) if self.until else float(total_steps)
        now = step - step % steps_per_epoch if self.by == "epochs" else step
        progress = min(max(now / length, 0.0), 1.0) if length > 0 else 1.0
        if self.shape == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return self.start + (self.end - self.start) * progress
