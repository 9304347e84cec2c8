# SPDX-License-Identifier: Apache-2.0
"""Comparisons run in full precision, whatever precision the models run in."""

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
HALF = (torch.float16, torch.bfloat16)


def _widen(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.dtype in HALF else value
    if isinstance(value, (list, tuple)):
        return type(value)(_widen(part) for part in value)
    return value


def _device(values: Iterable[Any]) -> str | None:
    """Return the device type of the first tensor, also within lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            return value.device.type
        found = _device(value) if isinstance(value, (list, tuple)) else None
        if found is not None:
            return found
    return None


def full_precision(comparison: Callable[P, R]) -> Callable[P, R]:
    """Run a function with autocast off and half inputs promoted to float32; float64 stays float64."""

    @wraps(comparison)
    def wide(*args: P.args, **kwargs: P.kwargs) -> R:
        device = _device([*args, *kwargs.values()])
        # the meta device has no autocast of its own
        with torch.autocast("cpu" if device in (None, "meta") else device, enabled=False):
            return comparison(
                *(_widen(a) for a in args),
                **{name: _widen(a) for name, a in kwargs.items()},
            )

    return wide
