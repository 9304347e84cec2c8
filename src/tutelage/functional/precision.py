# SPDX-License-Identifier: Apache-2.0
"""Comparisons run in full precision, whatever precision the models run in."""

from collections.abc import Callable
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


def full_precision(comparison: Callable[P, R]) -> Callable[P, R]:
    """Run a function with autocast off and half inputs promoted to float32; float64 stays float64."""

    @wraps(comparison)
    def wide(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next((a.device.type for a in args if isinstance(a, Tensor)), "cpu")
        with torch.autocast(device, enabled=False):
            return comparison(
                *(_widen(a) for a in args),  # type: ignore[arg-type]
                **{name: _widen(a) for name, a in kwargs.items()},  # type: ignore[arg-type]
            )

    return wide
