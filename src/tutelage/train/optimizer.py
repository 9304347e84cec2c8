# SPDX-License-Identifier: Apache-2.0
"""Optimizers by name: torch's own, then timm's."""

from collections.abc import Sequence
from typing import Any

import torch

from tutelage.core.error import UserError, nearest

TORCH = {
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
    try:
        if lowered in TORCH:
            made: torch.optim.Optimizer = TORCH[lowered](groups, lr=lr, **options)
            return made
        from timm.optim import get_optimizer_class, list_optimizers

        if lowered not in list_optimizers():
            raise UserError(
                f"optimizer.name: unknown optimizer {name!r}{nearest(lowered, [*TORCH, *list_optimizers()])}"
            )
        return get_optimizer_class(lowered)(groups, lr=lr, **options)  # type: ignore[no-any-return]
    except (TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"optimizer: {name} refuses these options: {error}") from error
