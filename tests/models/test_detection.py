# SPDX-License-Identifier: Apache-2.0
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor

from detector_case import framed, pictures
from tutelage.core.error import UserError
from tutelage.models import detection
from tutelage.models.load import load, rebuild
from tutelage.models.weights import OtherClassesError
from tutelage.tasks.detection import Answers, Detection

TINY = {"backbone": "tiny4", "width": 32}
PUBLISHED = (
    *("retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2", "fcos_resnet50_fpn", "ssd300_vgg16"),
    *("fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2", "maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2"),
)


@pytest.mark.parametrize("name", ["retinanet", "fcos", "ssd", "faster_rcnn", "mask_rcnn"])
def test_every_detector_is_called_as_the_task_says(name: str) -> None:
    model = load({"model": f"tutelage:{name}", **TINY}, task="detection", num_classes=3, seed=0)
    pixels, targets = pictures(2)
    batch = framed(pixels, targets)
    task = Detection(3)
    output = task.call(model, batch)
    assert isinstance(output, Answers)
    assert all(bool(part.isfinite()) for part in task.loss(output, batch).values())
    again = rebuild(model.source, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(model.module.parameters(), again.module.parameters(), strict=True))
    assert {"stages[0]", "fpn[0]", "head.cls[0]", "head.box[0]"} <= set(model.roles)


def old_names(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return a state as the files published in 2021 name it."""
    found = {}
    for key, value in state.items():
        key = re.sub(r"(backbone\.fpn\.\w+_blocks\.\d+)\.0\.", r"\1.", key)
        key = re.sub(r"rpn\.head\.conv\.0\.0\.", "rpn.head.conv.", key)
        key = re.sub(r"mask_head\.(\d)\.0\.", lambda m: f"mask_head.mask_fcn{int(m[1]) + 1}.", key)
        if name.startswith("retinanet"):
            key = re.sub(r"(_head\.conv)\.(\d)\.0\.", lambda m: f"{m[1]}.{2 * int(m[2])}.", key)
        found[key] = value
    return found


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_weights_fit_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        theirs = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=91)
    state = {key: torch.zeros(()).expand(value.shape) for key, value in theirs.state_dict().items()}
    if not name.endswith("v2"):
        state = old_names(state, name)
    asked: dict[str, Tensor] = {}

    def fit(module: torch.nn.Module, given: dict[str, Tensor], source: str) -> None:
        own = module.state_dict()
        assert {key: value.shape for key, value in given.items()} == {
            key: value.shape for key, value in own.items() if key in given
        }
        left = {key for key in own if key not in given}
        assert all(key.endswith("num_batches_tracked") for key in left)
        asked.update(given)

    monkeypatch.setattr(detection._Published, "state", lambda self: state)
    monkeypatch.setattr("tutelage.models.weights.fit", fit)
    model = load(
        {"model": f"torchvision:{name}", "weights": "pretrained"},
        task="detection",
        num_classes=2,
        class_names=("dog", "person"),
    )
    assert len(asked) > 50
    assert model.class_names == ("dog", "person")


def test_classes_are_picked_by_name() -> None:
    made = torchvision.models.detection.RetinaNet_ResNet50_FPN_Weights.DEFAULT
    categories = made.meta["categories"]
    named: dict[str, Any] = {"num_classes": 2, "class_names": ("dog", "person")}
    small = load({"model": "tutelage:retinanet", **TINY}, task="detection", seed=0, **named)
    whole = load({"model": "tutelage:retinanet", **TINY}, task="detection", num_classes=91, seed=1)
    detection.fit(small.module, whole.module.state_dict(), "it", ("dog", "person"), categories)
    pixels, _ = pictures(1)
    rows = [categories.index("dog"), categories.index("person")]
    small.module.eval(), whole.module.eval()
    torch.testing.assert_close(small(pixels).logits, whole(pixels).logits[..., rows])
    two = load({"model": "tutelage:faster_rcnn", **TINY}, task="detection", seed=0, **named).module
    many = load({"model": "tutelage:faster_rcnn", **TINY}, task="detection", num_classes=90, seed=1).module
    detection.fit(two, many.state_dict(), "it", ("dog", "person"), categories)
    own, theirs = two.state_dict(), many.state_dict()
    score, box = "roi_heads.box_predictor.cls_score.weight", "roi_heads.box_predictor.bbox_pred.weight"
    assert torch.equal(own[score], theirs[score][[0, *rows]])
    assert torch.equal(own[box], theirs[box].view(91, 4, -1)[[0, *rows]].flatten(0, 1))


def test_weights_for_other_classes(tmp_path: Path) -> None:
    old = load({"model": "tutelage:retinanet", **TINY}, task="detection", num_classes=5, seed=0)
    file = tmp_path / "old.pt"
    torch.save(old.module.state_dict(), file)
    spec = {"model": "tutelage:retinanet", **TINY, "weights": str(file)}
    with pytest.raises(OtherClassesError, match="head: fresh"):
        load(spec, task="detection", num_classes=2, class_names=("a", "b"))
    new = load({**spec, "head": "fresh"}, task="detection", num_classes=2, class_names=("a", "b"))
    name = "backbone.body.stem.0.weight"
    assert torch.equal(new.module.state_dict()[name], old.module.state_dict()[name])
    with pytest.raises(UserError, match=r"know no class 'dgo'.*did you mean dog"):
        detection.fit(new.module, old.module.state_dict(), "it", ("dgo", "b"), ("dog", "a", "b", "c", "d"))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"model": "tutelage:retinanett"}, "did you mean retinanet"),
        ({"model": "tutelage:retinanet", "widht": 3}, "widht"),
        ({"model": "tutelage:retinanet", "weights": "pretrained"}, "comes without weights"),
        ({"model": "torchvision:retinanet_resnet50"}, "unknown detector"),
        ({"model": "torchvision:ssdlite320_mobilenet_v3_large"}, "not among the detectors"),
        ({"model": "timm:resnet18"}, "is no detector"),
        ({"model": "tutelage:retinanet", **TINY, "input": {"maen": 0}}, "did you mean mean"),
    ],
)
def test_what_cannot_be_had_is_named(spec: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load(spec, task="detection", num_classes=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_detectors_find_what_torchvisions_do(name: str) -> None:
    two_stages, ssd = "rcnn" in name, name.startswith("ssd")
    given: dict[str, Any] = {"box_score_thresh": 0.0} if two_stages else {"score_thresh": 0.0}
    side, background = (300 if ssd else 160), int(two_stages or ssd)
    if not ssd:
        given |= {"min_size": side, "max_size": side}
    torch.manual_seed(0)
    theirs: Any = torchvision.models.get_model(name, weights=None, weights_backbone=None, **given).eval()
    for path, parameter in theirs.named_parameters():  # else all scores are alike
        if any(word in path for word in ("cls_logits", "cls_score", "classification_head.module_list")):
            torch.nn.init.normal_(parameter, std=0.002 if background else 0.05)
    spec = {"model": f"torchvision:{name}", "threshold": 0.0, "most": 100}
    model = load(spec, task="detection", num_classes=91 - background)
    eps = {part.eps for part in model.module.modules() if hasattr(part, "running_var")}
    for part in theirs.backbone.modules():  # torchvision sets it where it loads its weights
        if isinstance(part, torch.nn.BatchNorm2d) and 0.0 in eps:
            part.eps = 0.0
    detection.fit(model.module, theirs.state_dict(), "it", (), ())
    model.module.eval()
    pixels = torch.rand(1, 3, side, side)
    with torch.no_grad():
        [own], [other] = model(pixels).detections(), theirs(list(pixels))
    assert torch.equal(own["labels"][:20] + background, other["labels"][:20])
    torch.testing.assert_close(own["scores"][:20], other["scores"][:20])
    torch.testing.assert_close(own["boxes"][:20], other["boxes"][:20], rtol=1e-4, atol=1e-2)
