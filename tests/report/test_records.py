# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import pytest

from tutelage.core.error import UserError
from tutelage.report.records import curve, parts, read_metrics

TRAIN = [
    {"kind": "train", "step": 10, "epoch": 0.5, "lr": 0.1, "total": 3.0, "task": 1.0, "kd": 2.0},
    {"kind": "train", "step": 20, "epoch": 1.0, "lr": 0.1, "total": 2.0, "task": 0.5, "kd": 1.5, "mgd": 9.0},
]
SCORES = [{"kind": "evaluation", "step": 20, "epoch": 1.0, "top1": 0.5, "top5": 0.9, "loss": 1.2, "ece": 0.1}]


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(lines), encoding="utf-8")
    return path


def lines(*records: dict[str, object]) -> list[str]:
    return [json.dumps(record) + "\n" for record in records]


def test_records_come_back_in_order(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl", *lines(*TRAIN, *SCORES), "\n")
    assert read_metrics(path) == [*TRAIN, *SCORES]


@pytest.mark.parametrize("keep", [1, 5, 30, -2])
def test_a_last_line_cut_anywhere_is_left_out(tmp_path: Path, keep: int) -> None:
    whole = lines(*TRAIN, *SCORES)
    assert read_metrics(write(tmp_path / "m.jsonl", *whole[:2], whole[2][:keep])) == TRAIN


def test_a_line_cut_inside_a_letter_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(lines(TRAIN[0])[0].encode() + '{"kind": "é'.encode()[:-1])
    assert read_metrics(path) == TRAIN[:1]


def test_a_broken_line_elsewhere_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl", lines(TRAIN[0])[0], '{"kind": "tr\n', lines(TRAIN[1])[0])
    with pytest.raises(UserError, match=r"m\.jsonl, line 2: not a JSON object"):
        read_metrics(path)
    with pytest.raises(UserError, match="line 1: not a JSON object"):
        read_metrics(write(path, "7\n", *lines(*TRAIN)))


def test_what_a_resumed_run_wrote_again_counts_once(tmp_path: Path) -> None:
    again = {**TRAIN[1], "total": 1.9}
    path = write(tmp_path / "m.jsonl", *lines(*TRAIN, again, *SCORES))
    assert read_metrics(path) == [TRAIN[0], again, *SCORES]


def test_no_file_is_a_user_s_error_and_an_empty_one_is_empty(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        read_metrics(tmp_path / "none.jsonl")
    assert read_metrics(write(tmp_path / "m.jsonl")) == []


def test_curves_and_parts_are_read_from_records() -> None:
    records = [*TRAIN, *SCORES]
    assert curve(records, "train", "kd") == [(10.0, 2.0), (20.0, 1.5)]
    assert curve(records, "train", "mgd") == [(20.0, 9.0)]
    assert curve(records, "evaluation", "top1", "epoch") == [(1.0, 0.5)]
    assert curve(records, "evaluation", "nothing") == []
    assert parts(records) == ("task", "kd", "mgd")
    assert parts([]) == ()
