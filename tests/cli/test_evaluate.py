# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny_recipe import recipe, tree, tutelage

CAPSYS = pytest.CaptureFixture[str]


def result() -> dict[str, float]:
    found: dict[str, float] = json.loads(Path("runs/tiny/result.json").read_text())["scores"]
    return found


def test_the_scores_are_those_of_the_run(capsys: CAPSYS) -> None:
    tutelage(capsys, "distill", recipe())
    before = tree("runs")
    told = tutelage(capsys, "evaluate", "runs/tiny", "--json")
    assert told.code == 0
    assert set(told.document) >= {"top1", "loss"}
    assert told.document == {name: result()[name] for name in told.document}
    text = tutelage(capsys, "evaluate", "runs/tiny")
    assert {name: float(value) for name, value in (line.split() for line in text.out)} == pytest.approx(
        told.document, abs=1e-4
    )
    assert tree("runs") == before


def test_they_are_computed_and_not_read(capsys: CAPSYS) -> None:
    tutelage(capsys, "distill", recipe())
    weights = load_file("runs/tiny/student.safetensors")
    weights["6.bias"] = torch.full((10,), -100.0)
    weights["6.bias"][3] = 100.0  # whatever it sees, it says three
    save_file(weights, "runs/tiny/student.safetensors")
    told = tutelage(capsys, "evaluate", "runs/tiny", "--json")
    assert told.document["top1"] == pytest.approx(61 / 600, abs=2e-3)  # the share of threes in the split
    assert told.document["top1"] != result()["top1"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing"], "nothing holds no finished run (no student.json)"),
        (["runs/tiny", "--split", "tets"], "--split 'tets' is not known; did you mean test?"),
        (["runs/tiny", "--split", "test"], "digits has no test split"),
        (
            ["runs/tiny", "--data", "digit"],
            "data.source 'digit' is neither a folder nor a known kind; did you mean digits?",
        ),
    ],
)
def test_what_cannot_be_scored_is_one_line(capsys: CAPSYS, arguments: list[str], said: str) -> None:
    tutelage(capsys, "distill", recipe())
    told = tutelage(capsys, "evaluate", *arguments)
    assert (told.code, told.out, told.err) == (2, [], [f"tutelage: {said}"])


@pytest.mark.parametrize("name", ["student.safetensors", "student.json", "recipe.yaml"])
def test_a_damaged_run_is_one_line_that_names_the_file(capsys: CAPSYS, name: str) -> None:
    tutelage(capsys, "distill", recipe())
    path = Path("runs/tiny", name)
    path.write_bytes(path.read_bytes()[:40] + b"\t\0")
    told = tutelage(capsys, "evaluate", "runs/tiny")
    assert (told.code, told.out) == (2, [])
    assert len(told.err) == 1
    assert f"runs/tiny/{name}" in told.err[0]


def test_a_run_without_its_weights_is_one_line(capsys: CAPSYS) -> None:
    tutelage(capsys, "distill", recipe())
    Path("runs/tiny/student.safetensors").unlink()
    told = tutelage(capsys, "evaluate", "runs/tiny")
    assert told.code == 2
    assert told.err == ["tutelage: model 'run:runs/tiny': it has no student.safetensors: is the run finished?"]
