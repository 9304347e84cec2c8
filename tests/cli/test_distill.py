# SPDX-License-Identifier: Apache-2.0
import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tiny_recipe import killed, metrics, recipe, started, tree, tutelage
from tutelage.models.load import load as load_model

CAPSYS = pytest.CaptureFixture[str]


# --- what a run leaves -------------------------------------------------------------------------------------


def test_a_recipe_becomes_a_run_folder(capsys: CAPSYS) -> None:
    told = tutelage(capsys, "distill", recipe({"train.save_every": "3 steps"}))
    assert told.code == 0
    assert told.out[-2:] == ["runs/tiny/student.safetensors", "runs/tiny/report.html"]
    assert told.err[:2] == [
        "student reads map [2, 4, 4, 4], logits [2, 10]",
        "teacher reads map [2, 6, 4, 4], logits [2, 10]",
    ]
    assert sorted(str(path.relative_to("runs/tiny")) for path in Path("runs/tiny").rglob("*.*")) == [
        "checkpoints/step_000000003.safetensors",
        "checkpoints/step_000000004.safetensors",
        "metrics.jsonl",
        "recipe.yaml",
        "report.html",
        "result.json",
        "student.json",
        "student.safetensors",
    ]
    assert [line["step"] for line in metrics("runs/tiny", "train")] == [1, 2, 3, 4]
    scores = {name: float(value) for name, value in (line.split() for line in told.out[:-3])}
    result = json.loads(Path("runs/tiny/result.json").read_text())["scores"]
    assert scores == pytest.approx(result, abs=1e-4)
    assert metrics("runs/tiny")[-1]["top1"] == result["top1"]


def test_the_student_alone_is_exported(capsys: CAPSYS) -> None:
    tutelage(capsys, "distill", recipe())
    assert set(load_file("runs/tiny/student.safetensors")) == {"0.weight", "0.bias", "6.weight", "6.bias"}
    student = load_model("run:runs/tiny")
    assert student.class_names == tuple("0123456789")
    assert student(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


def test_the_saved_recipe_holds_every_choice_and_makes_the_same_run(capsys: CAPSYS) -> None:
    tutelage(capsys, "distill", recipe(), "--set", "optimizer.lr=0.02", "--set", "objective.kd.temperature=2")
    saved = yaml.safe_load(Path("runs/tiny/recipe.yaml").read_text())
    assert saved["optimizer"] == {"name": "adamw", "lr": 0.02, "weight_decay": 0.0, "decay_norms": False}
    assert saved["objective"]["kd"] == {"weight": 0.5, "temperature": 2}
    assert saved["train"]["decay"] == "cosine"
    tutelage(capsys, "distill", "runs/tiny/recipe.yaml", "--out", "again")
    assert Path("again/student.safetensors").read_bytes() == Path("runs/tiny/student.safetensors").read_bytes()
    assert Path("again/recipe.yaml").read_text() == Path("runs/tiny/recipe.yaml").read_text()


def test_json_is_one_document(capsys: CAPSYS) -> None:
    told = tutelage(capsys, "distill", recipe(), "--json", "--quiet")
    assert told.err == []
    assert set(told.document) == {"scores", "measures", "folder"}
    assert told.document["folder"] == "runs/tiny"
    assert told.document["measures"]["parameters"] == 4 * 9 + 4 + 10 * 4 + 10


def test_flags_stand_for_a_recipe(capsys: CAPSYS) -> None:
    recipe()
    flags = ["--student", "python:model.py:small", "--teacher", "python:model.py:small", "--data", "digits"]
    told = tutelage(capsys, "distill", *flags, "--method", "kd+mgd", "--set", "train.epochs=0.1")
    assert told.code == 0
    saved = yaml.safe_load(Path("runs/kd+mgd-small/recipe.yaml").read_text())
    assert saved["objective"] == {
        "task": 0.1,
        "kd": {"weight": 0.9},
        "mgd": {"weight": 7e-5, "mask": "channel", "mask_ratio": 0.15},
    }
    assert saved["train"]["epochs"] == 0.1


def test_flags_change_a_recipe(capsys: CAPSYS) -> None:
    tutelage(capsys, "distill", recipe(), "--student", "python:model.py:flat", "--set", "objective={task: 1, kd: 1}")
    saved = yaml.safe_load(Path("runs/tiny/recipe.yaml").read_text())
    assert saved["student"]["model"] == "python:model.py:flat"


def test_a_method_without_a_teacher_needs_none(capsys: CAPSYS) -> None:
    told = tutelage(capsys, "distill", recipe(teacher=None, objective={"task": 1.0, "tf_nkd": 1.0}))
    assert told.code == 0
    assert "tf_nkd" in json.dumps(metrics("runs/tiny")[0])


def test_the_average_is_what_is_scored_and_exported(capsys: CAPSYS) -> None:
    kept = {"train.ema": 0.9, "train.save_every": "4 steps"}
    tutelage(capsys, "distill", recipe(kept))
    state = load_file("runs/tiny/checkpoints/step_000000004.safetensors")
    exported = load_file("runs/tiny/student.safetensors")
    assert all(torch.equal(exported[name], state[f"/average/{name}"]) for name in exported)
    assert not any(torch.equal(exported[name], state[f"/distiller/students.student.{name}"]) for name in exported)
    told = tutelage(capsys, "evaluate", "runs/tiny", "--json")
    result = json.loads(Path("runs/tiny/result.json").read_text())["scores"]
    assert told.document == {name: result[name] for name in told.document}


def test_a_teacher_is_fitted_first_if_the_recipe_says_so(capsys: CAPSYS) -> None:
    fit = {"model": "python:model.py:small", "width": 6, "fit": {"train": {"steps": 2}, "optimizer": {"lr": 0.05}}}
    told = tutelage(capsys, "distill", recipe(teacher=fit))
    assert told.code == 0
    saved = yaml.safe_load(Path("runs/tiny/teacher/recipe.yaml").read_text())
    assert saved["train"]["steps"] == 2
    assert saved["optimizer"] == {"name": "adamw", "lr": 0.05, "weight_decay": 0.0, "decay_norms": False}
    assert saved["objective"] == {"task": 1.0}
    assert saved["student"]["width"] == 6
    assert Path("runs/tiny/teacher/student.safetensors").exists()


def test_the_student_of_a_run_may_teach(capsys: CAPSYS) -> None:
    tutelage(capsys, "distill", recipe())
    told = tutelage(capsys, "distill", recipe(teacher={"model": "run:runs/tiny"}), "--out", "second")
    assert told.code == 0
    assert "teacher reads map [2, 4, 4, 4], logits [2, 10]" in told.err


# --- going on ----------------------------------------------------------------------------------------------


def test_a_killed_run_ends_with_the_same_bits(capsys: CAPSYS) -> None:
    settings = {"steps": 40, "log_every": 3, "accumulate": 2, "ema": 0.9, "clip": 1.0, "save_every": "7 steps"}
    path = recipe({"student.seconds": 0.01}, train={**settings, "evaluate_every": "1 epochs"})
    command = ["distill", str(path), "--out", "cut"]
    step = killed(*command)
    assert 0 < step < 40
    resumed = started(*command)
    _, said = resumed.communicate(timeout=60)
    assert resumed.returncode == 0, said
    assert f"goes on from cut/checkpoints/step_{step:09d}.safetensors" in said
    assert tutelage(capsys, "distill", path, "--out", "straight").code == 0
    for name in ("student.safetensors", "metrics.jsonl", "student.json", "recipe.yaml"):
        assert Path("cut", name).read_bytes() == Path("straight", name).read_bytes(), name


def test_a_finished_run_is_not_run_again(capsys: CAPSYS) -> None:
    first = tutelage(capsys, "distill", recipe())
    before = tree("runs")
    again = tutelage(capsys, "distill", recipe())
    assert again.out == first.out
    assert again.err == ["runs/tiny holds this run, finished; remove the folder to run it again"]
    assert tree("runs") == before


# --- several processes -------------------------------------------------------------------------------------


def test_two_processes_equal_one(capsys: CAPSYS) -> None:
    path = recipe({"train.accumulate": 2, "train.save_every": "2 steps"})
    port = 20000 + os.getpid() % 10000  # below those that the system lends to others meanwhile
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [started("distill", str(path), "--out", "two", RANK=str(n), LOCAL_RANK=str(n), **meeting) for n in (0, 1)]
    said = [process.communicate(timeout=90) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
    out, err = said[1]  # the first one speaks; what torch itself warns of does not count
    assert out == ""
    assert not [line for line in err.splitlines() if "reads" in line or "steps" in line or "tutelage" in line]
    assert tutelage(capsys, "distill", path, "--out", "one").code == 0
    one, two = (load_file(f"{name}/student.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)
    scores = [metrics(name, "evaluation")[-1]["loss"] for name in ("one", "two")]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    assert len(metrics("two")) == len(metrics("one"))
    assert os.environ.get("WORLD_SIZE") is None
