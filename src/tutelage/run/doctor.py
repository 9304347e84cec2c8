# SPDX-License-Identifier: Apache-2.0
"""Whether everything is there that a run needs."""

import math
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tutelage.report.environment import environment
from tutelage.report.records import curve, read_metrics
from tutelage.report.table import Table
from tutelage.run.distill import distill
from tutelage.run.evaluate import evaluate
from tutelage.run.recipe import parse

STEPS = 10
#: The self-test: one small network teaches another on the digits that come with scikit-learn.
SELF_TEST: dict[str, Any] = {
    "teacher": "tutelage:resnet14",
    "student": "tutelage:resnet8",
    "data": {"source": "digits", "batch_size": 64},
    "objective": {"task": 0.5, "kd": {"weight": 0.5}},
    "optimizer": {"name": "adamw", "lr": 0.01},
    "train": {"steps": STEPS, "log_every": 1, "save_every": "5 steps"},
}
REQUIREMENT = re.compile(r"([\w.-]+)[^;]*(?:;.*extra == ['\"](\w+)['\"])?")


@dataclass(frozen=True)
class Diagnosis:
    """What was found.

    Args:
        environment: versions, processor, threads, accelerators.
        packages: installed version by package, None where it is missing, by extra; `` holds what must be there.
        first: loss of the self-test at its first step.
        last: at its last one.
        seconds: it took.
        faults: what is wrong, a sentence each.
    """

    environment: Mapping[str, str]
    packages: Mapping[str, Mapping[str, str | None]]
    first: float
    last: float
    seconds: float
    faults: tuple[str, ...]

    @property
    def tables(self) -> tuple[Table, Table]:
        """What is printed: where it runs, then the packages."""
        rows = [
            (name, found or "missing", f"pip install 'tutelage[{extra}]'" if extra and not found else "")
            for extra, packages in self.packages.items()
            for name, found in packages.items()
        ]
        return (
            Table(("", "here"), [*self.environment.items()], "ll"),
            Table(("package", "version", "to install"), rows, "lll", title="Packages"),
        )

    def plain(self) -> dict[str, Any]:
        """Return the findings as plain data."""
        return asdict(self)


def doctor() -> Diagnosis:
    """Return what is installed, and how ten steps of training on digits went."""
    found = packages()
    faults = [f"{name} is missing: pip install tutelage" for name, held in found[""].items() if held is None]
    start = time.perf_counter()
    with TemporaryDirectory() as folder:
        result = distill(parse(SELF_TEST), Path(folder, "run"), quiet=True)
        losses = [value for _, value in curve(read_metrics(result.folder.metrics), "train", "total")]
        again = evaluate(result.folder.path)
    seconds = time.perf_counter() - start
    if not all(math.isfinite(loss) for loss in losses) or losses[-1] >= losses[0]:
        faults.append(f"ten steps of training did not lower the loss: {losses[0]:.3f} to {losses[-1]:.3f}")
    if abs(again["loss"] - result.scores["loss"]) > 1e-4 * max(1.0, abs(again["loss"])):
        faults.append("the saved student does not answer as the trained one did")
    return Diagnosis(environment(), found, losses[0], losses[-1], seconds, tuple(faults))


def packages() -> dict[str, dict[str, str | None]]:
    """Return the versions of the packages that this one names, by extra; those for its development are left out."""
    found: dict[str, dict[str, str | None]] = {"": {}}
    for line in requires("tutelage") or []:
        match = REQUIREMENT.match(line)
        if match is None or match[2] in ("dev", "examples"):
            continue
        found.setdefault(match[2] or "", {})[match[1]] = _version(match[1])
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
