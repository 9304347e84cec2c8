# SPDX-License-Identifier: Apache-2.0
"""The machine. Names are imported on first use, so that reading a card does not load torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tutelage.core.batch import Batch as Batch
    from tutelage.core.batch import Facts as Facts
    from tutelage.core.batch import Frame as Frame
    from tutelage.core.card import Card as Card
    from tutelage.core.distiller import Distiller as Distiller
    from tutelage.core.feeder import Feeder as Feeder
    from tutelage.core.model import InputSpec as InputSpec
    from tutelage.core.model import Model as Model
    from tutelage.core.objective import Entry as Entry
    from tutelage.core.objective import Losses as Losses
    from tutelage.core.objective import Objective as Objective
    from tutelage.core.rebuild import Rebuild as Rebuild
    from tutelage.core.schedule import Schedule as Schedule
    from tutelage.core.signals import Signals as Signals
    from tutelage.core.stored import Stored as Stored
    from tutelage.core.tap import Tap as Tap
    from tutelage.core.task import Task as Task
    from tutelage.core.teacher import Live as Live
    from tutelage.core.teacher import Shared as Shared
    from tutelage.core.teacher import Teacher as Teacher
    from tutelage.core.term import Draw as Draw
    from tutelage.core.term import Outcome as Outcome
    from tutelage.core.term import Reads as Reads
    from tutelage.core.term import Term as Term
    from tutelage.core.text import TextSpec as TextSpec

HOMES = {
    "Batch": "batch",
    "Card": "card",
    "Distiller": "distiller",
    "Draw": "term",
    "Entry": "objective",
    "Facts": "batch",
    "Feeder": "feeder",
    "Frame": "batch",
    "InputSpec": "model",
    "Live": "teacher",
    "Shared": "teacher",
    "Stored": "stored",
    "Losses": "objective",
    "Model": "model",
    "Objective": "objective",
    "Outcome": "term",
    "Reads": "term",
    "Rebuild": "rebuild",
    "Schedule": "schedule",
    "Signals": "signals",
    "Tap": "tap",
    "Task": "task",
    "Teacher": "teacher",
    "Term": "term",
    "TextSpec": "text",
}


def __getattr__(name: str) -> Any:
    if name in HOMES:
        return getattr(import_module(f"tutelage.core.{HOMES[name]}"), name)
    raise AttributeError(f"module 'tutelage.core' has no attribute {name!r}")
