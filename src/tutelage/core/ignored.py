# SPDX-License-Identifier: Apache-2.0
"""Pixels whose class is ignored: which places of a map they are, and how they are kept from a term."""

from dataclasses import replace

from torch import Tensor, nn

from tutelage.core.batch import Batch
from tutelage.core.signals import Signals
from tutelage.functional.spatial import as_grid, taking_part


def known(batch: Batch, values: Tensor, grid: tuple[int, int] | None = None) -> Tensor | None:
    """Return which places of a map, or which tokens, are compared: all but those of ignored pixels.

    Args:
        batch: whose class maps say what is ignored.
        values: `[B, C, H, W]`, or tokens `[B, L, D]` row by row.
        grid: (height, width) of the tokens; by default in the proportions of the class maps.

    Returns:
        `[B, H, W]` or `[B, L]` bool, all of an image of which nothing is known; None where there are no class maps,
        or tokens fill no such grid.
    """
    target = batch.target
    if not isinstance(target, Tensor) or target.ndim != 3 or target.is_floating_point():
        return None
    if values.ndim == 4:
        return taking_part(target, batch.labelled, *values.shape[2:])
    try:
        height, width = grid or as_grid(values[:0], (target.shape[1], target.shape[2])).shape[2:]
    except ValueError:
        return None
    places = taking_part(target, batch.labelled, height, width)
    return None if places is None else places.flatten(1)


def blanked(signals: Signals, batch: Batch) -> Signals:
    """Return signals whose maps and tokens are 0 at the places of ignored pixels, without a gradient there.

    Parameters, vectors, and whatever has not one entry an image stay as they are, and everything does where the batch
    has no class maps.
    """
    taps = dict(signals.taps)
    for name, value in taps.items():
        if value.ndim not in (3, 4) or isinstance(value, nn.Parameter) or len(value) != len(batch):
            continue
        places = known(batch, value)
        if places is not None:
            taps[name] = value.where(places[:, None] if value.ndim == 4 else places[..., None], 0.0)
    return replace(signals, taps=taps)
