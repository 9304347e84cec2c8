# SPDX-License-Identifier: Apache-2.0
"""Dense models are built again from their record alone: what they began with may be gone."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from models.detectors.tiny_detr import KINDS
from models.test_segmentation import MASK2FORMER, SEGFORMER, UPERNET
from tutelage.core import Model
from tutelage.models.load import load, rebuild


def told(model: Model) -> dict[str, Any]:
    """Return the record as it lies in a file."""
    record: dict[str, Any] = json.loads(json.dumps(model.source))
    return record


@pytest.mark.parametrize(
    ("task", "spec"),
    [
        ("segmentation", SEGFORMER),
        ("segmentation", UPERNET),
        ("segmentation", MASK2FORMER),
        *(("detection", {"model": f"hf:{kind}", **options}) for kind, options in KINDS.items()),
    ],
    ids=lambda given: str(given.get("model")) if isinstance(given, dict) else None,
)
def test_a_model_of_transformers_without_its_folder(tmp_path: Path, task: str, spec: dict[str, Any]) -> None:
    folder = tmp_path / "model"
    first = load(spec, task=task, num_classes=3, seed=0)
    net: Any = getattr(first.module, "net", first.module)
    net.save_pretrained(folder)
    student = load(f"hf:{folder}", task=task, num_classes=3)
    record = told(student)
    shutil.rmtree(folder)
    again = rebuild(record)
    again.module.load_state_dict(student.module.state_dict())
    assert again.input == student.input
    assert str(tmp_path) not in json.dumps(record)


def test_first_weights_are_no_part_of_a_record(tmp_path: Path) -> None:
    facts: Any = {"task": "pose", "image_size": (64, 64), "geometry": {"num_keypoints": 5}}
    model = load({"model": "tutelage:rtmpose_t", "widen": 0.125}, **facts, seed=0)
    backbone = {k: v.clone() for k, v in model.module.state_dict().items() if k.startswith("backbone.")}
    save_file(backbone, tmp_path / "backbone.safetensors")
    given = {"model": "tutelage:rtmpose_t", "widen": 0.125, "backbone": str(tmp_path / "backbone.safetensors")}
    student = load(given, **facts, seed=1)
    assert torch.equal(student.module.state_dict()[next(iter(backbone))], next(iter(backbone.values())))
    (tmp_path / "backbone.safetensors").unlink()
    assert str(tmp_path) not in json.dumps(told(student))
    assert rebuild(told(student)).module.state_dict().keys() == student.module.state_dict().keys()


def test_a_student_on_a_pretrained_backbone_asks_for_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    asked = []

    def create(name: str, **options: Any) -> Any:
        asked.append(options.pop("pretrained", False))
        return plain(name, **options)

    plain = timm.create_model
    monkeypatch.setattr(timm, "create_model", create)
    for task, name in (("detection", "retinanet"), ("segmentation", "pspnet")):
        asked.clear()
        spec = {"model": f"tutelage:{name}", "backbone": "timm:resnet18", "pretrained": True}
        record = told(load(spec, task=task, num_classes=2))
        assert any(asked)
        asked.clear()
        rebuild(record)
        assert asked
        assert not any(asked)
