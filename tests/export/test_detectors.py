# SPDX-License-Identifier: Apache-2.0
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detector_case import SIDE, pictures, sharpened
from models.detectors.tiny_detr import KINDS as TRANSFORMERS
from models.detectors.tiny_detr import made
from tutelage.core.error import UserError
from tutelage.export.student import export, require_equal
from tutelage.models.load import load

TINY: dict[str, Any] = {"backbone": "tiny4", "width": 32}
SMALL: dict[str, Any] = {"head_width": 16, "proposals": (60, 40), "anchor": 4.0}
KINDS: dict[str, dict[str, Any]] = {
    "retinanet": {"candidates": 200},
    "fcos": {"candidates": 200, "threshold": 0.3, "extra": "none"},
    "ssd": {"candidates": 200},
    "faster_rcnn": SMALL,
    "mask_rcnn": SMALL,
    "cascade_rcnn": SMALL,
    "cascade_mask_rcnn": SMALL,
    "gfl": {"candidates": 200, "levels": (4, 8, 16), "extra": "none", "bins": 4, "iou": 0.8},
    "reppoints": {"candidates": 200, "extra": "none"},
    "solo": {"hidden": 16, "convolutions": 1, "candidates": 100, "most": 20, "grids": (12, 8, 6, 4, 3)},
}
EXACT = {"faster_rcnn-exact": {**SMALL, "exact": True}, "fcos-iccv": {**KINDS["fcos"], "form": "iccv"}}
KINDS |= EXACT
WHOLE: dict[str, dict[str, Any]] = {"yolox": {"depth": 0.33, "width": 0.125}}
NAMES = [*KINDS, *WHOLE]


@pytest.mark.parametrize("name", ["retinanet", *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:])])
def test_the_copy_finds_the_same_boxes(name: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    options = WHOLE[name] if name in WHOLE else {**TINY, **KINDS[name]}
    model = load({"model": f"tutelage:{name.partition('-')[0]}", **options}, task="detection", num_classes=3, seed=0)
    sharpened(model.module)
    file = tmp_path / "student.onnx"
    export(model, file, "onnx", size=(SIDE, SIDE))
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_outputs()]
    for seed in range(3):
        pixels = pictures(1, seed)[0].sigmoid()
        found = dict(zip(names, map(torch.from_numpy, session.run(None, {"pixels": pixels.numpy()})), strict=True))
        with torch.no_grad():
            [own] = model(pixels).detections()
        count = len(own["scores"])
        assert count > 5
        assert int((found["scores"] > 0).sum()) == count
        torch.testing.assert_close(found["scores"][:count], own["scores"], rtol=1e-4, atol=1e-5)
        assert torch.equal(found["labels"][:count], own["labels"])
        torch.testing.assert_close(found["boxes"][:count], own["boxes"], rtol=1e-3, atol=1e-2)
    if name == "solo":
        assert torch.equal(found["masks"][:count] > 0.5, own["masks"])
    if name in ("mask_rcnn", "cascade_mask_rcnn"):
        assert found["masks"].shape[1:] == (28, 28)


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind != "detr")) for kind in TRANSFORMERS]
)
def test_the_copy_of_a_detector_of_transformers_finds_the_same_boxes(kind: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model, side = made(kind), SIDE if kind == "yolos" else 2 * SIDE
    said_apart(model.module)
    file = tmp_path / "student.onnx"
    export(model, file, "onnx", size=(side, side))
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for seed in range(3):
        pixels = F.interpolate(pictures(1, seed)[0].sigmoid(), (side, side))
        found = dict(
            zip(
                ("boxes", "scores", "labels"),
                map(torch.from_numpy, session.run(None, {"pixels": pixels.numpy()})),
                strict=True,
            )
        )
        with torch.no_grad():
            [own] = model(pixels).detections()
        assert len(own["scores"]) == len(found["scores"]) >= 20
        torch.testing.assert_close(found["scores"], own["scores"], rtol=1e-4, atol=1e-5)
        rows = [torch.cat([one["boxes"], 1000 * one["labels"][:, None]], dim=1) for one in (found, own)]
        apart = torch.cdist(rows[0], rows[1], p=math.inf)  # of equal scores any may come first
        assert max(apart.amin(dim=0).max(), apart.amin(dim=1).max()) < 1e-2


@pytest.mark.slow
def test_a_detector_that_scores_all_places_alike_is_exported(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    export(made("rt_detr"), tmp_path / "student.onnx", "onnx", size=(2 * SIDE, 2 * SIDE))


def said_apart(model: nn.Module) -> None:
    """Make a network of attention say something else of each place."""
    sharpened(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        for part in model.modules():
            if isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, std=1.5 / part.in_features**0.5)
            elif isinstance(part, nn.Embedding):
                nn.init.normal_(part.weight)


def test_what_cannot_be_exported_is_named(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    with pytest.raises(
        UserError, match=r"^the student cannot be exported to ONNX: .*got input size \[1, 32, 1, 1\]"
    ):  # a norm over the coarsest map, which is one position here
        export(made("deformable_detr"), tmp_path / "student.onnx", "onnx", size=(SIDE, SIDE))


def test_a_network_that_scores_all_places_alike_says_why_its_copy_differs(tmp_path: Path) -> None:
    def answers(order: list[int]) -> list[Tensor]:
        boxes = torch.arange(12.0).view(3, 4)
        return [boxes[order], torch.full((3,), 0.5), torch.zeros(3)]

    file = tmp_path / "copy.onnx"
    assert require_equal(answers([2, 0, 1]), answers([0, 1, 2]), file, ranked=True) == 0
    with pytest.raises(UserError, match=r"^copy\.onnx answers otherwise than the student: 8 apart"):
        require_equal(answers([2, 0, 1]), answers([0, 1, 2]), file)
    with pytest.raises(UserError, match=r"scores all places alike: train it first$"):
        require_equal(answers([0, 0, 1]), answers([0, 1, 2]), file, ranked=True)
