# SPDX-License-Identifier: Apache-2.0
"""The lines of a run's `metrics.jsonl`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tutelage.core.error import UserError

Record = Mapping[str, Any]
Curve = Sequence[tuple[float, float]]

#: What a training record holds beside the parts of the loss.
CLOCK = ("kind", "step", "epoch", "lr", "total")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a run, in their order.

    A last line cut by a kill is left out. Of records of one kind and step, as a resumed run may write them
    again, the later one stays.

    Args:
        path: of `metrics.jsonl`.

    Raises:
        UserError: if the file is missing, or another line than the last is not a JSON object.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    records: dict[Any, dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("not an object")
        except ValueError as error:
            if number == len(lines):
                break
            raise UserError(f"{path}, line {number}: not a JSON object ({error}); remove the line") from error
        key = (record.get("kind"), record.get("step", number))
        records.pop(key, None)
        records[key] = record
    return list(records.values())


def curve(records: Sequence[Record], kind: str, y: str, x: str = "step") -> list[tuple[float, float]]:
    """Return the points (x, y) of the records of a kind that have both.

    Example:
        >>> curve([{"kind": "evaluation", "epoch": 1.0, "top1": 0.5}], "evaluation", "top1", "epoch")
        [(1.0, 0.5)]
    """
    kept = [record for record in records if record.get("kind") == kind]
    return [(float(r[x]), float(r[y])) for r in kept if _number(r.get(x)) and _number(r.get(y))]


def parts(records: Sequence[Record]) -> tuple[str, ...]:
    """Return the labels of the loss's parts in training records, in order of appearance."""
    found = (key for record in records if record.get("kind") == "train" for key, v in record.items() if _number(v))
    return tuple(dict.fromkeys(key for key in found if key not in CLOCK))


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
