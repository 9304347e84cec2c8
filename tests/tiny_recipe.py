# SPDX-License-Identifier: Apache-2.0
"""Runs of a few steps on digits, asked for as a user would: a recipe, a model in a file, a command line."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tutelage.cli import main

MODEL = '''
"""A user's own model: no batch norm unless asked, and slow if asked."""
import time
from torch import nn

class Small(nn.Sequential):
    def __init__(self, classes, channels, width, norm, seconds, dropout):
        super().__init__(
            nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.BatchNorm1d(width) if norm else nn.Identity(), nn.Dropout(dropout), nn.Linear(width, classes),
        )
        self.seconds = seconds

    def forward(self, images):
        if self.training:
            time.sleep(self.seconds)
        return super().forward(images)

class Flat(nn.Module):
    """Has logits and nothing else."""
    def __init__(self, classes):
        super().__init__()
        self.linear = nn.Linear(64, classes)

    def forward(self, images):
        return self.linear(images.flatten(1))

class Crashes(Flat):
    def forward(self, images):
        if self.training and len(images) > 2:
            raise ZeroDivisionError("a bug")
        return super().forward(images)

def small(num_classes, in_channels, width=4, norm=False, seconds=0.0, dropout=0.0):
    return Small(num_classes, in_channels, width, norm, seconds, dropout)

def flat(num_classes):
    return Flat(num_classes)

def crashes(num_classes):
    return Crashes(num_classes)
'''

KD_MGD: dict[str, Any] = {
    "student": {"model": "python:model.py:small"},
    "teacher": {"model": "python:model.py:small", "width": 6},
    "data": {"source": "digits", "batch_size": 100},
    "objective": {"task": 0.5, "kd": {"weight": 0.5}, "mgd": {"weight": 0.1, "mask": "channel", "mask_ratio": 0.3}},
    "optimizer": {"name": "adamw", "lr": 0.01},
    "train": {"steps": 4, "log_every": 1, "save_every": None},
}


@dataclass(frozen=True)
class Told:
    """What a command told.

    Args:
        code: of the exit.
        out: lines of standard output.
        err: lines of standard error.
    """

    code: int
    out: list[str]
    err: list[str]

    @property
    def document(self) -> Any:
        """The JSON document that standard output is."""
        return json.loads("\n".join(self.out))


def tutelage(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Told:
    """Run a command in this process."""
    capsys.readouterr()
    code = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    said = capsys.readouterr()
    return Told(code, said.out.splitlines(), said.err.splitlines())


def started(*arguments: str, **variables: str) -> "subprocess.Popen[str]":
    """Start a command as a process of its own, in the present folder."""
    return subprocess.Popen(
        [sys.executable, "-c", "from tutelage.cli import main; main()", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
    )


def killed(*arguments: str) -> int:
    """Start a run, kill it once a checkpoint lies there, and return the step of the newest one."""
    process = started(*arguments)
    place = Path(arguments[arguments.index("--out") + 1], "checkpoints")
    give_up = time.monotonic() + 60
    while not list(place.glob("step_*.safetensors")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < give_up
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL
    assert not Path(place.parent, "student.safetensors").exists()
    return int(max(place.glob("step_*.safetensors")).stem[5:])


def recipe(changes: Mapping[str, Any] | None = None, name: str = "tiny.yaml", **sections: Any) -> Path:
    """Write a recipe and the file of its models into the present folder.

    Args:
        changes: values by dotted place; None takes a section out.
        name: of the file.
        sections: in the place of whole sections.
    """
    made = {**copy.deepcopy(KD_MGD), **sections}
    for place, value in (changes or {}).items():
        *parents, last = place.split(".")
        section = made
        for word in parents:
            section = section[word]
        section[last] = value
    Path("model.py").write_text(MODEL)
    path = Path(name)
    path.write_text(yaml.safe_dump({key: value for key, value in made.items() if value is not None}))
    return path


def metrics(folder: str | Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Return the records of a run."""
    found = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if kind in (None, line["kind"])]


def tree(folder: str | Path = ".") -> dict[str, bytes]:
    """Return every file below a folder with its content, but for what Python caches."""
    files = (path for path in Path(folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path): path.read_bytes() for path in files}
