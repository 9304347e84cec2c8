# SPDX-License-Identifier: Apache-2.0
"""Optimizers by name: torch's own, then timm's."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tutelage.core.error import UserError, nearest

TORCH: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
}


def build(name: str, groups: Sequence[dict[str, Any]], *, lr: float, **options: Any) -> torch.optim.Optimizer:
    """Return an optimizer over parameter groups.

    Args:
        name: `sgd`, `adam`, `adamw`, `rmsprop`, or any name timm knows (`lion`, `lamb`, `adan`, ...).
        groups: from `distiller.param_groups()`.
        lr: of groups without a rate of their own.
        options: of the optimizer's constructor.

    Raises:
        UserError: on an unknown name or option.
    """
    lowered = name.lower()
    kind = TORCH.get(lowered) or _from_timm(lowered)
    known = [word for word in inspect.signature(kind).parameters if word not in ("self", "params")]
    for word in options:
        if word not in known:
            raise UserError(f"optimizer.{word}: unknown option of {name}{nearest(word, known)}")
    try:
        made: torch.optim.Optimizer = kind(groups, lr=lr, **options)
    except (TypeError, ValueError, IndexError) as error:
        raise UserError(f"optimizer: {name} refuses these options: {error}") from error
    return made


def _from_timm(name: str) -> Callable[..., torch.optim.Optimizer]:
    from timm.optim import get_optimizer_class, list_optimizers

    if name not in list_optimizers():
        raise UserError(f"optimizer.name: unknown optimizer {name!r}{nearest(name, [*TORCH, *list_optimizers()])}")
    try:
        found: Callable[..., torch.optim.Optimizer] = get_optimizer_class(name)
    except AssertionError as error:  # some need a GPU
        raise UserError(f"optimizer.name: {name} cannot be used here ({error})") from error
    return found
