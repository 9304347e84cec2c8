# SPDX-License-Identifier: Apache-2.0
"""Every example runs, for a few steps, and trains what it returns."""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

FOLDER = Path(__file__).resolve().parent.parent / "examples"
NEEDS = {"lightning_trainer": "lightning", "accelerate_loop": "accelerate", "hf_trainer": "accelerate"}
STEPS = 4


def main_of(stem: str) -> Callable[..., Any]:
    found: Callable[..., Any] = runpy.run_path(str(FOLDER / f"{stem}.py"))["main"]
    return found


def test_every_example_is_run_here() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == {"plain_pytorch", *NEEDS}


def test_plain_pytorch() -> None:
    scores = main_of("plain_pytorch")(steps=STEPS)
    assert set(scores) == {"teacher", "student"}
    assert all(0 <= score <= 1 for score in scores.values())


@pytest.mark.filterwarnings("ignore")  # of the other libraries, about themselves
@pytest.mark.parametrize("stem", NEEDS)
def test_another_trainer(stem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(NEEDS[stem])
    if stem == "hf_trainer":
        pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    student = main_of(stem)(steps=STEPS)
    assert isinstance(student, nn.Module)
    seen = [norm for norm in student.modules() if isinstance(norm, nn.BatchNorm2d)]
    # the batches of the run and those of the dry run, which are taken back
    assert {int(norm.num_batches_tracked) for norm in seen if norm.num_batches_tracked is not None} == {STEPS}
    assert all(bool(p.isfinite().all()) and p.requires_grad for p in student.parameters())
    assert not any(module._forward_hooks for module in student.modules())
