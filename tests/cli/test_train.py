# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import pytest
import yaml

from tiny_recipe import killed, metrics, recipe, tutelage

CAPSYS = pytest.CaptureFixture[str]


def test_a_recipe_is_trained_without_its_teacher(capsys: CAPSYS) -> None:
    told = tutelage(capsys, "train", recipe())
    assert told.code == 0
    assert not [line for line in told.err if "teacher" in line]
    assert told.out[-2:] == ["runs/tiny-alone/student.safetensors", "runs/tiny-alone/report.html"]
    saved = yaml.safe_load(Path("runs/tiny-alone/recipe.yaml").read_text())
    assert saved["objective"] == {"task": 1.0}
    assert "teacher" not in saved
    assert set(metrics("runs/tiny-alone", "train")[0]) == {"kind", "step", "epoch", "lr", "total", "task"}


def test_it_is_the_run_of_the_task_alone(capsys: CAPSYS) -> None:
    tutelage(capsys, "train", recipe(), "--out", "train")
    tutelage(capsys, "distill", recipe(teacher=None, objective={"task": 1.0}), "--out", "distill")
    assert Path("train/student.safetensors").read_bytes() == Path("distill/student.safetensors").read_bytes()


def test_flags_stand_for_a_recipe(capsys: CAPSYS) -> None:
    recipe()
    flags = ["--student", "python:model.py:small", "--data", "digits", "--set", "train.epochs=0.1", "--quiet"]
    told = tutelage(capsys, "train", *flags, "--json")
    assert told.code == 0
    assert told.err == []
    assert told.document["folder"] == "runs/alone-small"
    assert (
        told.document["scores"].items()
        <= json.loads(Path("runs/alone-small/result.json").read_text())["scores"].items()
    )


def test_a_recipe_of_arms_has_a_baseline(capsys: CAPSYS) -> None:
    told = tutelage(capsys, "train", recipe(compare={"arms": {"kd": {"kd": 1.0}}}))
    assert told.code == 0
    assert "compare" not in yaml.safe_load(Path("runs/tiny-alone/recipe.yaml").read_text())


def test_batch_norm_and_dropout_survive_a_kill(capsys: CAPSYS) -> None:
    changes = {"student.seconds": 0.01, "student.norm": True, "student.dropout": 0.5, "data.workers": 0}
    path = recipe(changes, train={"steps": 30, "log_every": 4, "save_every": "5 steps"})
    command = ["train", str(path), "--out", "cut"]
    assert 0 < killed(*command) < 30
    assert tutelage(capsys, *command).code == 0
    assert tutelage(capsys, "train", path, "--out", "straight").code == 0
    for name in ("student.safetensors", "metrics.jsonl"):
        assert Path("cut", name).read_bytes() == Path("straight", name).read_bytes(), name
