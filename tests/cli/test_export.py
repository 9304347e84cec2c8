# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import pytest
import torch

from tiny_recipe import recipe, tutelage

CAPSYS = pytest.CaptureFixture[str]


@pytest.fixture
def run(capsys: CAPSYS) -> Path:
    assert tutelage(capsys, "train", recipe(student={"model": "tutelage:resnet8"}), "--out", "run").code == 0
    return Path("run")


def test_a_student_is_written_beside_its_run_or_where_asked(capsys: CAPSYS, run: Path) -> None:
    told = tutelage(capsys, "export", run, "--to", "torch_export")
    assert told.code == 0
    assert told.out[0].startswith("run/student.pt2: ")
    assert told.out[1].startswith("largest difference from PyTorch on the same pixels: ")
    found = tutelage(
        capsys, "export", run, "--to", "torch_export", "--out", "there/s.pt2", "--size", "16", "--json"
    ).document
    assert found["path"] == "there/s.pt2"
    assert found["size"] == Path("there/s.pt2").stat().st_size
    program = torch.export.load("there/s.pt2").module()
    with torch.no_grad():
        assert program(torch.zeros(1, 1, 16, 16)).shape == (1, 10)


def test_a_copy_may_leave_the_normalisation_to_the_caller(capsys: CAPSYS, run: Path) -> None:
    tutelage(capsys, "export", run, "--to", "torch_export", "--out", "own.pt2")
    tutelage(capsys, "export", run, "--to", "torch_export", "--out", "plain.pt2", "--normalised")
    spec = json.loads(Path("run/student.json").read_text())["input"]
    pixels = torch.rand(2, 1, 8, 8)
    mean, std = (torch.tensor(spec[word]).view(1, -1, 1, 1) for word in ("mean", "std"))
    with torch.no_grad():
        own = torch.export.load("own.pt2").module()(pixels)
        plain = torch.export.load("plain.pt2").module()((pixels - mean) / std)
    assert torch.allclose(own, plain, atol=1e-5)


def test_bad_input(capsys: CAPSYS, run: Path) -> None:
    for arguments, said in (
        (("nowhere",), "nowhere holds no finished run (no student.json)"),
        ((run, "--to", "onx"), "unknown format 'onx'; did you mean onnx?"),
    ):
        told = tutelage(capsys, "export", *arguments)
        assert (told.code, told.err) == (2, [f"tutelage: {said}"])
