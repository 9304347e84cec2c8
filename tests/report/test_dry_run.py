# SPDX-License-Identifier: Apache-2.0
import json
from dataclasses import asdict

import torch
from torch import Tensor, nn

from tutelage.core import Batch, Distiller, Model, Objective, Tap
from tutelage.methods.features.mgd import MGD
from tutelage.methods.logits.kd import KD
from tutelage.report.dry_run import DryRun, Layer
from tutelage.report.number import TIMES
from tutelage.tasks.classification import Classification


class Net(nn.Module):
    """A map of some width, pooled and classified; one layer that nothing uses."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.head = nn.Linear(width, 5)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.act(self.conv(x)).mean((2, 3)))
        return scores


def found() -> DryRun:
    student, teacher = (Model(Net(width), roles={"map": Tap("conv")}) for width in (4, 6))
    sample = Batch.of(torch.rand(2, 3, 8, 8), torch.tensor([0, 1]))
    objective = Objective(kd=0.9 * KD(), mgd=0.1 * MGD())
    distiller = Distiller(student, objective, task=Classification(5), teacher=teacher, sample=sample)
    return DryRun.of(distiller)


def test_a_dry_run_is_read_from_a_distiller() -> None:
    dry_run = found()
    assert dry_run.shapes["student"]["map"] == (2, 4, 8, 8)
    assert dry_run.shapes["teacher"] == {"map": (2, 6, 8, 8), "logits": (2, 5)}
    align, generation = dry_run.layers
    assert align == Layer("mgd", "align", f"Conv2d 1{TIMES}1, 4 → 6", 4 * 6 + 6)
    assert (generation.kind.split()[0], generation.parameters) == ("Sequential", 2 * (6 * 6 * 9 + 6))
    assert dry_run.overwritten == ("student.map",)
    assert set(dry_run.frozen) == {"student.unused.weight", "student.unused.bias"}


def test_its_tables_and_remarks_hold_what_it_found() -> None:
    dry_run = found()
    assert ["student", "map", f" {TIMES} ".join("2488")] in dry_run.signals().cells
    assert [row[0] for row in dry_run.bridges().cells] == ["mgd", "mgd"]
    assert [names for _, names in dry_run.remarks] == [dry_run.overwritten, dry_run.frozen]
    assert dry_run.brief == "4 signals, 2 bridges, 1 cloned, 2 parameters frozen"


def test_it_survives_json() -> None:
    dry_run = found()
    assert DryRun.of_plain(json.loads(json.dumps(asdict(dry_run)))) == dry_run


def test_nothing_found_is_nothing_shown() -> None:
    nothing = DryRun({})
    assert (nothing.signals().rows, nothing.bridges().rows, nothing.remarks) == ([], [], [])
    assert nothing.brief == "0 signals, 0 bridges"
