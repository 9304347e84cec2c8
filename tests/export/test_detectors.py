# SPDX-License-Identifier: Apache-2.0
from pathlib import Path
from typing import Any

import pytest
import torch

from detector_case import SIDE, pictures, sharpened
from tutelage.export.student import export
from tutelage.models.load import load

TINY: dict[str, Any] = {"backbone": "tiny4", "width": 32}
SMALL: dict[str, Any] = {"head_width": 16, "proposals": (60, 40), "anchor": 4.0}
KINDS: dict[str, dict[str, Any]] = {
    "retinanet": {"candidates": 200},
    "fcos": {"candidates": 200, "threshold": 0.3, "extra": "none"},
    "ssd": {"candidates": 200},
    "faster_rcnn": SMALL,
    "mask_rcnn": SMALL,
    "gfl": {"candidates": 200, "levels": (4, 8, 16), "extra": "none", "bins": 4, "iou": 0.8},
    "reppoints": {"candidates": 200, "extra": "none"},
    "solo": {"hidden": 16, "convolutions": 1, "candidates": 100, "most": 20, "grids": (12, 8, 6, 4, 3)},
}
WHOLE: dict[str, dict[str, Any]] = {"yolox": {"depth": 0.33, "width": 0.125}}
NAMES = [*KINDS, *WHOLE]


@pytest.mark.parametrize("name", ["retinanet", *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:])])
def test_the_copy_finds_the_same_boxes(name: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    options = WHOLE[name] if name in WHOLE else {**TINY, **KINDS[name]}
    model = load({"model": f"tutelage:{name}", **options}, task="detection", num_classes=3, seed=0)
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
    if name == "mask_rcnn":
        assert found["masks"].shape[1:] == (28, 28)
