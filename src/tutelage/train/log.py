# SPDX-License-Identifier: Apache-2.0
"""The metrics of a run: one JSON object a line, and a progress bar for whoever watches."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from tutelage.core.storage import unwritten, write_text


class Log:
    """Appends to `metrics.jsonl` and moves a progress bar.

    Args:
        path: the file; None writes nothing.
        total: optimizer steps of the run, for the bar.
        title: shown beside the bar.
        quiet: show no bar.
    """

    def __init__(self, path: Path | None, *, total: int = 0, title: str = "", quiet: bool = False) -> None:
        self.path, self.quiet = path, quiet
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[said]}"),
            console=Console(file=sys.stderr),
            transient=True,
            disable=quiet or not sys.stderr.isatty(),
        )
        self.bar: TaskID = self.progress.add_task(title, total=total, said="")

    def __enter__(self) -> "Log":
        self.progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()

    def rewind(self, step: int) -> None:
        """Drop the lines after a step, and one that a kill cut: a resumed run writes them again."""
        if self.path is None or not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (json.JSONDecodeError, KeyError, TypeError):
                continue
        write_text(self.path, "".join(f"{line}\n" for line in kept))

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Append one line.

        Raises:
            UserError: if it cannot be written.
        """
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        except OSError as error:
            raise unwritten(self.path, error) from error

    def show(self, step: int, said: str = "") -> None:
        """Move the bar."""
        self.progress.update(self.bar, completed=step, said=said)
