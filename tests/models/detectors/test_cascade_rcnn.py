# SPDX-License-Identifier: Apache-2.0
import re
from typing import Any

import pytest
import torch

from models.detectors.overfit import found, picture, train
from tutelage.core.error import UserError
from tutelage.core.tap import Recorder
from tutelage.models.detectors.cascade_rcnn import CascadeRCNN
from tutelage.models.load import load

SMALL: dict[str, Any] = {
    **{"backbone": "tiny8", "width": 16, "levels": (4, 8, 16), "anchor": 4.0, "head_width": 32},
    **{"regions": 32, "proposed": 64, "proposals": (60, 40)},
}


def tiny(**options: Any) -> CascadeRCNN:
    torch.manual_seed(0)
    return CascadeRCNN(3, **{**SMALL, **options})


def test_one_picture_is_learned_by_heart() -> None:
    model, given = tiny(masks=True), picture()
    first, last = train(model, given, 80)
    assert last < first / 2
    answers = found(model, given)
    assert min(answers["overlaps"]) > 0.75, answers
    model.train()
    with torch.no_grad():
        [said] = model(given[0]).detections()
    mask = given[1][0]["masks"][1]
    best = said["masks"][said["labels"] == 2][0]
    assert (best & mask).sum() / (best | mask).sum() > 0.6


def test_every_head_sees_what_the_one_before_corrected() -> None:
    model, (pixels, _) = tiny(), picture()
    seen: list[torch.Tensor] = []
    for heads in (model.first.roi_heads, *model.further):
        pool = heads.get_submodule("box_roi_pool")
        pool.register_forward_pre_hook(lambda _, args: seen.append(torch.cat(args[1])))
    answers = model.eval()(pixels)
    answers.detections()
    assert len(seen) == 3
    heads, regions = answers.heads[0], [seen[0]]
    with torch.no_grad():
        _, codes = answers._looked(heads, regions)
    whole = heads.box_coder.decode(codes[:, :4], regions)[:, 0]
    torch.testing.assert_close(seen[1], whole.clamp(0, 64))
    assert not torch.equal(seen[0], seen[1])


def test_all_heads_learn() -> None:
    model, (pixels, targets) = tiny(masks=True), picture()
    losses = model(pixels).losses(targets)
    assert set(losses) == {"objectness", "proposals", "classes", "boxes", "masks"}
    torch.stack(list(losses.values())).sum().backward()
    for heads in (model.first.roi_heads, *model.further):
        for path in ("box_predictor.cls_score", "mask_predictor.mask_fcn_logits"):
            grad = heads.get_submodule(path).get_parameter("weight").grad
            assert grad is not None
            assert grad.any()


def test_roles_are_those_of_a_pyramid_and_its_proposals() -> None:
    model = load({"model": "tutelage:cascade_mask_rcnn", **SMALL}, task="detection", num_classes=3, seed=0)
    recorder = Recorder(model.module.eval(), dict(model.roles))
    with recorder, torch.no_grad():
        answers = model.module(torch.rand(2, 3, 64, 64))
    taken = recorder.release()
    for level, one in enumerate(answers.proposed.maps):
        assert torch.equal(taken[f"fpn[{level}]"], one)
    assert torch.equal(taken["head.cls[1]"], answers.proposed.objectness[1])


def test_images_without_things_and_some_of_the_images() -> None:
    model, (pixels, _) = tiny(), picture()
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    both = model.eval()(pixels.repeat(2, 1, 1, 1))
    losses = both.losses([none, none])
    assert losses["boxes"] == 0
    assert len(both.rows([1]).detections()) == 1


def test_what_cannot_be() -> None:
    model, (pixels, targets) = tiny(masks=True), picture()
    said = "cascade_mask_rcnn learns masks, and the data gives none: set data.detection.masks to true"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        model(pixels).losses([{name: targets[0][name] for name in ("boxes", "labels")}])
