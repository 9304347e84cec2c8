# SPDX-License-Identifier: Apache-2.0
"""The student of a finished run: `run:FOLDER`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tutelage.core.error import UserError

RECORD, WEIGHTS = "student.json", "student.safetensors"


def read(folder: str) -> tuple[dict[str, Any], Path]:
    """Return how to build a run's student, and the file of its weights.

    Raises:
        UserError: if the folder holds no student, or its record is damaged.
    """
    place = Path(folder)
    for name in (RECORD, WEIGHTS):
        if not (place / name).is_file():
            what = "no such folder" if not place.is_dir() else f"it has no {name}: is the run finished?"
            raise UserError(f"model 'run:{folder}': {what}")
    try:
        found = json.loads((place / RECORD).read_text())
    except ValueError as error:
        raise UserError(f"{place / RECORD} is damaged ({error})") from error
    if not isinstance(found, Mapping) or not isinstance(found.get("model"), (str, Mapping)):
        raise UserError(f"{place / RECORD} does not say how to build the model: it needs `model`")
    return dict(found), place / WEIGHTS
