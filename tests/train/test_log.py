# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import pytest

from tutelage.core.error import UserError
from tutelage.train.log import Log


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def written(folder: Path) -> Log:
    log = Log(folder / "metrics.jsonl", quiet=True)
    for step in (1, 2, 3):
        log.write("train", step, {"total": step / 2})
    return log


def test_writes_one_object_a_line(tmp_path: Path) -> None:
    log = written(tmp_path / "run")
    assert log.path is not None
    assert lines(log.path)[1] == {"kind": "train", "step": 2, "total": 1.0}


def test_rewinding_keeps_the_lines_up_to_a_step(tmp_path: Path) -> None:
    log = written(tmp_path)
    log.rewind(2)
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2]
    log.rewind(0)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


@pytest.mark.parametrize("cut", ['{"kind": "train", "st', '{"kind": "train"}', "[1]", "7"])
def test_rewinding_drops_a_line_that_a_kill_cut(tmp_path: Path, cut: str) -> None:
    log = written(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(cut)
    log.rewind(3)
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_rewinding_nothing_writes_nothing(tmp_path: Path) -> None:
    Log(tmp_path / "metrics.jsonl", quiet=True).rewind(0)
    Log(None, quiet=True).rewind(0)
    Log(None, quiet=True).write("train", 1, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")  # a real device that has no room
    with pytest.raises(UserError, match=r"could not write .*metrics.jsonl: the disk is full"):
        Log(tmp_path / "metrics.jsonl", quiet=True).write("train", 1, {})


def test_a_bar_is_shown_only_to_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Log(None, total=3, title="student") as log:
        log.show(2)
    assert capsys.readouterr().err.strip() == ""
