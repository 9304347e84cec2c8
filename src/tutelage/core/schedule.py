# SPDX-License-Identifier: Apache-2.0
"""A number as a function of training progress."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tutelage.core.error import UserError, nearest

Shape = Literal["constant", "linear", "cosine", "step"]
KEYS = ("linear", "cosine", "step", "until", "by")


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
    """A weight over time: constant, or a line, half cosine or step from `start` to `end`, then constant.

    Written in a recipe as a number, `{linear: [0, 1], until: 20 epochs}`, `{cosine: [1, 0]}` or
    `{step: [0, 1], until: 0.1}`. `until` is a length, or a share of the run as a number; without it a line
    lasts the whole run. `by: epochs` holds it constant within an epoch.

    Example:
        >>> ramp = Schedule.parse({"linear": [0, 1], "until": "4 steps"})
        >>> [ramp.at(step, steps_per_epoch=10, total_steps=100) for step in (0, 1, 4, 50)]
        [0.0, 0.25, 1.0, 1.0]
        >>> pretrain = Schedule.parse({"step": [1, 0], "until": 0.1})
        >>> [pretrain.at(step, steps_per_epoch=10, total_steps=100) for step in (0, 9, 10, 99)]
        [1.0, 1.0, 0.0, 0.0]
    """

    start: float
    end: float
    shape: Shape = "constant"
    until: Span | float | None = None
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
            known: tuple[Shape, ...] = ("linear", "cosine", "step")
            shapes = [shape for shape in known if shape in value]
            if len(shapes) != 1:
                raise UserError("a schedule has one shape: linear, cosine or step, each [start, end]")
            try:
                start, end = (float(number) for number in value[shapes[0]])
            except (TypeError, ValueError):
                raise UserError(f"{shapes[0]} takes two numbers, [start, end]") from None
            if not (math.isfinite(start) and math.isfinite(end)):
                raise UserError(f"{shapes[0]} takes finite numbers, not [{start}, {end}]")
            by = value.get("by", "steps")
            if by not in ("steps", "epochs"):
                raise UserError(f"by: {by!r} is not known; valid: epochs, steps")
            until = _until(value["until"]) if "until" in value else None
            if shapes[0] == "step" and until is None:
                raise UserError("a step needs to know when: step: [0, 1], until: 20 epochs")
            return cls(start, end, shapes[0], until, by)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UserError(f"a weight is a number or a schedule, not {value!r}")
        if not math.isfinite(value):
            raise UserError(f"a weight is a finite number, not {value}")
        return cls(float(value), float(value))

    @property
    def constant(self) -> bool:
        """Whether the value never changes."""
        return self.shape == "constant"

    def at(self, step: int, *, steps_per_epoch: int, total_steps: int) -> float:
        """Return the value at a 0-based optimizer step."""
        if self.constant:
            return self.end
        length = float(total_steps)
        if self.until is not None:
            until = self.until
            length = until * total_steps if isinstance(until, float) else until.steps(steps_per_epoch)
        now = step - step % steps_per_epoch if self.by == "epochs" else step
        progress = min(max(now / length, 0.0), 1.0) if length > 0 else 1.0
        if self.shape == "step":
            return self.start if progress < 1 else self.end
        if self.shape == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return self.start + (self.end - self.start) * progress


def _until(value: Any) -> Span | float:
    """Read a length, or a share of the run."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return Span.parse(str(value))
    if not 0 <= value <= 1:
        raise UserError(f'until: {value} is no share of the run in [0, 1]; write "{value} epochs" for a length')
    return float(value)
