# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tutelage.core.error import UserError
from tutelage.run.distill import distill
from tutelage.run.evaluate import evaluate
from tutelage.run.pictures import draw
from tutelage.run.recipe import Recipe, TaskSection, parse

TINY = {"model": "tutelage:pspnet", "backbone": "tiny8", "width": 16}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "skd": {"skd": {"weight": 1.0}},
    "cirkd": {"cirkd": {"pixel_memory": 40, "region_memory": 20, "pixel_keys": 20, "region_keys": 20}},
    "cwd": {"cwd": {"weight": 3, "student_tap": "logits", "teacher_tap": "logits"}},
    "mgd": {"mgd": {"mask": "pixel", "mask_ratio": 0.75, "student_tap": "stages[-1]", "teacher_tap": "stages[-1]"}},
}


def recipe(objective: dict[str, Any], **more: Any) -> Recipe:
    given: dict[str, Any] = {
        "task": {"name": "segmentation"},
        "teacher": {**TINY, "backbone": "tiny12", "width": 24},
        "student": TINY,
        "data": {"source": "scenes", "batch_size": 4, "segmentation": {"scenes": [8, 4], "side": 48}},
        "objective": {"task": 1.0, **objective},
        "optimizer": {"name": "sgd", "lr": 0.05},
        "train": {"steps": 3, "decay": "poly", "log_every": 1, "save_every": None},
    }
    return parse({**given, **more})


@pytest.mark.parametrize("method", OBJECTIVES)
def test_methods_on_scenes(tmp_path: Path, method: str) -> None:
    if method == "cirkd":
        more: dict[str, Any] = {"data": {**recipe({}).data.model_dump(), "labels": 4, "labelled_per_batch": 2}}
    else:
        more = {}
    found = distill(recipe(OBJECTIVES[method], **more), tmp_path / "run", quiet=True)
    assert {"miou", "pixel_accuracy", "boundary_iou", "loss", "iou/ground"} <= set(found.scores)
    assert all(value == value for value in found.scores.values())
    assert (tmp_path / "run" / "pictures" / "0-truth.png").is_file()
    assert evaluate(tmp_path / "run")["miou"] == pytest.approx(found.scores["miou"])


@pytest.mark.parametrize(("model", "known"), [("timm:resnet18", 1000), ("torchvision:lraspp_mobilenet_v3_large", 21)])
def test_a_published_teacher_of_other_classes_is_refused(tmp_path: Path, model: str, known: int) -> None:
    teacher = {"model": model, "weights": "pretrained"}
    with pytest.raises(
        UserError, match=rf"^teacher: {model} tells {known} classes apart, the data has 11: teacher\.fit"
    ):
        distill(recipe(OBJECTIVES["cwd"], teacher=teacher), tmp_path / "run", quiet=True)


def test_each_students_early_features_pass_the_others_next_block(tmp_path: Path) -> None:
    peer = {"model": "hf:segformer", "hidden_sizes": [8] * 4, "depths": [1] * 4, "num_attention_heads": [1] * 4}
    sides = {"forth": ("student", "peer", "segformer.stages.1"), "back": ("peer", "student", "backbone.network.layer2")}
    objective = {
        label: {"method": "hfd_bsd", "student": own, "teacher": other, "through": through}
        for label, (own, other, through) in sides.items()
    }
    found = distill(
        recipe(objective, teacher=None, peers={"peer": {**peer, "decoder_hidden_size": 8}}),
        tmp_path / "run",
        quiet=True,
    )
    assert found.scores["miou"] >= 0
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    lows = [one[f"{label}.low"] for one in steps if one["kind"] == "train" for label in sides]
    assert len(lows) == 6
    assert min(lows) > 0


def test_windows_and_mirrors_are_for_scores_and_pictures(tmp_path: Path) -> None:
    task = {"name": "segmentation", "window": 32, "flip": True, "scales": [1.0, 1.5], "boundary": 0}
    found = distill(recipe(OBJECTIVES["skd"], task=task), tmp_path / "run", quiet=True)
    assert "boundary_iou" not in found.scores
    assert evaluate(tmp_path / "run")["loss"] == pytest.approx(found.scores["loss"], rel=1e-5)


def test_a_students_answers_are_drawn_at_the_size_of_the_image(tmp_path: Path) -> None:
    distill(recipe({}, teacher=None), tmp_path / "run", quiet=True)
    file = tmp_path / "photo.png"
    Image.new("RGB", (40, 30), (120, 120, 120)).save(file)
    found = draw(str(tmp_path / "run"), [file], task=TaskSection(name="segmentation"), out=tmp_path / "out")
    answer = found.answers[str(file)]
    assert answer["size"] == [30, 40]
    assert sum(answer["classes"].values()) == pytest.approx(1.0, abs=0.01)
    with Image.open(tmp_path / "out" / "photo.png") as picture:
        assert picture.size == (40, 30)
        assert picture.convert("RGB").getcolors() != [(1200, (120, 120, 120))]


@pytest.mark.parametrize("method", ["cirkd", "skd"])
def test_a_stopped_run_goes_on_with_the_same_bits(tmp_path: Path, method: str) -> None:
    words = {"steps": 4, "decay": "poly", "log_every": 1, "save_every": "2 steps"}
    whole = distill(recipe(OBJECTIVES[method], train=words), tmp_path / "whole", quiet=True)
    part = distill(recipe(OBJECTIVES[method], train=words), tmp_path / "part", quiet=True)
    for name in ("result.json", "student.safetensors", "student.json"):
        (tmp_path / "part" / name).unlink()
    newest = sorted((tmp_path / "part" / "checkpoints").iterdir())
    newest[-1].unlink()
    again = distill(recipe(OBJECTIVES[method], train=words), tmp_path / "part", quiet=True)
    assert again.scores == part.scores == whole.scores
    one, other = (found.student.module.state_dict() for found in (whole, again))
    assert all(torch.equal(one[key], other[key]) for key in one)
