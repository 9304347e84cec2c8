# SPDX-License-Identifier: Apache-2.0
"""Every detector, from a folder as COCO lays it out to a student, by one command."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from coco_folder import coco_folder
from models.detectors.tiny_detr import KINDS as TRANSFORMERS
from tiny_recipe import metrics, tutelage
from tutelage.models.source import listed

TINY: dict[str, Any] = {"backbone": "tiny8", "width": 32}
REGIONS: dict[str, Any] = {**TINY, "head_width": 16, "proposals": [40, 20], "regions": 16}
PLAIN: dict[str, Any] = {**TINY, "levels": [8, 16, 32], "extra": "none"}
KINDS: dict[str, dict[str, Any]] = {
    "retinanet": {**TINY, "anchor": 2},
    "fcos": PLAIN,
    "ssd": {**TINY, "levels": [8, 16, 32], "extra": "p6p7"},
    "gfl": {**PLAIN, "bins": 4},
    "reppoints": PLAIN,
    "solo": {**TINY, "hidden": 16, "convolutions": 1, "grids": [12, 8, 6, 4, 3]},
    "yolox": {"depth": 0.33, "width": 0.125},
    "faster_rcnn": REGIONS,
    "mask_rcnn": REGIONS,
    "cascade_rcnn": REGIONS,
    "cascade_mask_rcnn": REGIONS,
}
MODELS = {f"tutelage:{name}": options for name, options in KINDS.items()}
MODELS |= {f"hf:{name}": TRANSFORMERS[name] for name in ("detr", "rt_detr")}


def test_none_is_left_out() -> None:
    own = {name for name in listed("detectors") if not name.startswith("yolox_")}
    assert own == set(KINDS)


@pytest.mark.parametrize("model", list(MODELS))
def test_a_detector_is_distilled(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    coco_folder(Path("coco"), images=2)
    network = {"model": model, **MODELS[model]}
    masks = "mask" in model or "solo" in model
    asked = {
        "task": {"name": "detection"},
        "teacher": network,
        "student": network,
        "data": {"source": "coco:coco", "batch_size": 2, "detection": {"shortest": 64, "masks": masks}},
        "objective": {"task": 1.0, "pkd": {"weight": 1.0}},
        "optimizer": {"name": "sgd", "lr": 0.001},
        "train": {"steps": 2, "clip": 35, "log_every": 1},
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(asked))
    told = tutelage(capsys, "distill", "recipe.yaml", "--out", "run", "--json")
    assert told.code == 0, told.err
    lines = [line for line in metrics("run") if "step" in line]
    assert all(value == value for line in lines for value in line.values())
    scores = json.loads(Path("run/result.json").read_text())["scores"]
    assert ("mask_map" in scores) == masks
    assert Path("run/student.safetensors").is_file()
