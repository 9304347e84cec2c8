# SPDX-License-Identifier: Apache-2.0
"""Teach a small model what a big one knows: tap, bridge, compare, train, export."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tutelage.core import Batch as Batch
    from tutelage.core import Distiller as Distiller
    from tutelage.core import Entry as Entry
    from tutelage.core import Facts as Facts
    from tutelage.core import Live as Live
    from tutelage.core import Losses as Losses
    from tutelage.core import Model as Model
    from tutelage.core import Objective as Objective
    from tutelage.core import Signals as Signals
    from tutelage.core import Tap as Tap
    from tutelage.core import Teacher as Teacher
    from tutelage.core import Term as Term
    from tutelage.run.door import distill as distill

__version__ = "0.1.0"

NAMES = (
    *("Batch", "Distiller", "Entry", "Facts", "Live", "Losses"),
    *("Model", "Objective", "Signals", "Tap", "Teacher", "Term"),
)


def __getattr__(name: str) -> Any:
    if name in NAMES:
        from tutelage import core

        return getattr(core, name)
    if name == "distill":
        from tutelage.run.door import distill

        return distill
    raise AttributeError(f"module 'tutelage' has no attribute {name!r}")
