# SPDX-License-Identifier: Apache-2.0
"""Detection from a folder of files to scores: every detector learns from a teacher, resumes, is drawn."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from coco_folder import coco_folder
from models.detectors.tiny_detr import KINDS as TRANSFORMERS
from tutelage.core import Distiller
from tutelage.core.error import UserError
from tutelage.run.distill import distill
from tutelage.run.evaluate import evaluate
from tutelage.run.pictures import draw
from tutelage.run.recipe import Recipe, TaskSection, parse

TINY = {"backbone": "tiny4", "width": 32}
PAIRS: dict[str, dict[str, Any]] = {
    "retinanet": {"anchor": 2},
    "fcos": {"threshold": 0.02, "extra": "none"},
    "ssd": {"levels": [8, 16, 32], "extra": "p6p7"},
    "faster_rcnn": {"head_width": 16, "proposals": [40, 20], "regions": 16},
    "mask_rcnn": {"head_width": 16, "proposals": [40, 20], "regions": 16},
}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Six scenes as COCO lays them out."""
    coco_folder(tmp_path / "coco")
    return tmp_path


def recipe(home: Path, name: str, steps: int = 3, **more: Any) -> Recipe:
    options = PAIRS[name]
    given: dict[str, Any] = {
        "task": {"name": "detection"},
        "teacher": {"model": f"tutelage:{name}", **TINY, **options, "backbone": "tiny8"},
        "student": {"model": f"tutelage:{name}", **TINY, **options},
        "data": {
            "source": f"coco:{home / 'coco'}",
            "batch_size": 3,
            "detection": {"shortest": [48, 64], "longest": 64, "masks": name == "mask_rcnn"},
        },
        "objective": {"task": 1.0, "pkd": {"weight": 1.0}, "fgd": {"weight": 0.1}},
        "optimizer": {"name": "sgd", "lr": 0.001, "momentum": 0.9},
        "train": {
            "steps": steps,
            "decay": "multistep",
            "milestones": [1],
            "clip": 35,
            "log_every": 1,
            "save_every": None,
        },
    }
    return parse({**given, **more})


@pytest.mark.parametrize("name", ["retinanet", "mask_rcnn"])  # all go through the command line
def test_every_detector_learns_from_a_folder(name: str, home: Path) -> None:
    found = distill(recipe(home, name), home / "run", quiet=True)
    assert {"map", "map50", "map75"} <= set(found.scores)
    lines = [json.loads(line) for line in (home / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(value == value for line in lines for value in line.values())
    assert any("task.boxes" in line for line in lines)
    assert evaluate(home / "run")["map"] == pytest.approx(found.scores["map"])
    for what in ("truth", "teacher", "before", "after"):
        assert (home / "run" / "pictures" / f"0-{what}.png").is_file()


@pytest.mark.parametrize("name", ["retinanet", "faster_rcnn"])
def test_a_killed_run_ends_with_the_same_bits(name: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = recipe(home, name, steps=5)  # an epoch has two steps
    saved = asked.model_copy(update={"train": asked.train.model_copy(update={"save_every": "3 steps"})})
    whole = distill(saved, home / "whole", quiet=True)
    step, taken = Distiller.after_step, 0

    def killed(self: Any, *args: Any, **more: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == 5:  # the third step lies in the middle of an epoch, the fourth was not saved
            raise KeyboardInterrupt
        return step(self, *args, **more)

    monkeypatch.setattr(Distiller, "after_step", killed)
    with pytest.raises(KeyboardInterrupt):
        distill(saved, home / "part", quiet=True)
    monkeypatch.undo()
    again = distill(saved, home / "part", quiet=True)
    one, other = whole.student.module.state_dict(), again.student.module.state_dict()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert again.scores == whole.scores


def test_detectors_of_different_kinds_meet_where_their_levels_do(home: Path) -> None:
    teacher = {"model": "tutelage:faster_rcnn", **TINY, "head_width": 16}
    taps = ["fpn[1]", "fpn[2]", "fpn[3]"]
    objective = {
        "task": 1.0,
        "pkd": {"weight": 1.0, "student_taps": ["fpn[0]", "fpn[1]", "fpn[2]"], "teacher_taps": taps},
    }
    found = distill(recipe(home, "retinanet", teacher=teacher, objective=objective), home / "run", quiet=True)
    assert "map" in found.scores


def test_a_student_inherits_neck_and_head(home: Path) -> None:
    inherit = {"backbone.fpn.layer_blocks": "teacher.backbone.fpn.layer_blocks", "head": "teacher.head"}
    asked = recipe(home, "retinanet", steps=1, inherit=inherit, optimizer={"name": "sgd", "lr": 1e-9})
    found = distill(asked, home / "run", quiet=True)
    plain = distill(
        recipe(home, "retinanet", steps=1, optimizer={"name": "sgd", "lr": 1e-9}), home / "other", quiet=True
    )
    name = "head.classification_head.conv.0.0.weight"
    one, other = (run.student.module.state_dict()[name] for run in (found, plain))
    assert not torch.allclose(one, other)


def test_boxes_are_drawn_on_files_of_any_size(home: Path) -> None:
    alone = recipe(home, "mask_rcnn", steps=1, teacher=None, objective={"task": 1.0})
    distill(alone, home / "run", quiet=True)
    file = home / "photo.png"
    Image.new("RGB", (50, 90), (120, 120, 120)).save(file)
    options = {"shortest": 64}
    found = draw(str(home / "run"), [file], task=TaskSection(name="detection"), out=home / "out", options=options)
    answer = found.answers[str(file)]
    assert set(answer) >= {"boxes", "labels", "names", "scores", "masks"}
    assert all(code["size"] == [90, 50] for code in answer["masks"])
    with Image.open(home / "out" / "photo.png") as drawn:
        assert drawn.size == (50, 90)
    assert isinstance(json.loads((home / "out" / "coco.json").read_text()), list)


@pytest.mark.parametrize("kind", ["own", "hf"])
def test_few_labels(kind: str, home: Path) -> None:
    words = recipe(home, "retinanet").data.model_dump()
    more: dict[str, Any] = {"data": {**words, "labels": 2, "labelled_per_batch": 1}}
    if kind == "hf":
        more["student"] = more["teacher"] = {"model": "hf:rt_detr", **TRANSFORMERS["rt_detr"]}
        more["objective"] = {"task": 1.0, "pkd": {"weight": 1.0}}
    assert "map" in distill(recipe(home, "retinanet", **more), home / "run", quiet=True).scores
    lines = [json.loads(line) for line in (home / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(value == value for line in lines for value in line.values())


def test_bad_annotations_stop_a_run(home: Path) -> None:
    file = home / "coco" / "annotations" / "instances_train.json"
    given = json.loads(file.read_text())
    given["annotations"][0]["bbox"] = [70, 70, 5, 5]
    file.write_text(json.dumps(given))
    with pytest.raises(UserError, match="1 boxes outside their image"):
        distill(recipe(home, "retinanet"), home / "run", quiet=True)


def test_long_scoring_tells_how_far_it_is(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("tutelage.train.log.Log.show", lambda self, step, said="": told.append(said))
    distill(recipe(home, "retinanet", teacher=None, objective={"task": 1.0}), home / "run", quiet=True)
    assert {"scoring 1/2", "scoring 2/2", "scoring"} <= set(told)
    told.clear()
    evaluate(home / "run")
    assert told == ["scoring 1/2", "scoring 2/2", "scoring"]
