# SPDX-License-Identifier: Apache-2.0
import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from models.detectors.overfit import exported, found, picture, train
from tutelage.core import Batch, Distiller, Objective
from tutelage.core.batch import Frame
from tutelage.core.error import UserError
from tutelage.core.tap import Recorder
from tutelage.methods.detection.crosskd import CrossKD
from tutelage.methods.detection.ld import LD
from tutelage.models.detectors.gfl import GFL, distribution_focal, quality_focal
from tutelage.models.load import load
from tutelage.tasks.detection import Detection

SMALL: dict[str, Any] = {"backbone": "tiny8", "width": 32, "levels": (4, 8, 16), "extra": "none", "convolutions": 2}


def tiny(**options: Any) -> GFL:
    torch.manual_seed(0)
    return GFL(3, **{**SMALL, "bins": 8, **options})


def test_one_picture_is_learned_by_heart() -> None:
    model, given = tiny(), picture()
    first, last = train(model, given, 100)
    assert last < first / 2
    answers = found(model, given)
    assert min(answers["overlaps"]) > 0.75, answers
    assert answers["confident"] <= 4


def test_the_quality_focal_loss_is_the_equation() -> None:
    logits, quality = torch.tensor([1.2, -0.7, 0.3]).double(), torch.tensor([0.8, 0.0, 1.0]).double()
    for logit, y, said in zip(logits.tolist(), quality.tolist(), quality_focal(logits, quality).tolist(), strict=True):
        p = 1 / (1 + math.exp(-logit))
        assert said == pytest.approx(abs(y - p) ** 2 * -((1 - y) * math.log(1 - p) + y * math.log(p)))


def test_the_distribution_focal_loss_is_the_equation_and_least_at_the_distance() -> None:
    edges, y = torch.randn(5, generator=torch.Generator().manual_seed(0)).double(), 2.3
    p = edges.softmax(0).tolist()
    said = distribution_focal(edges[None], torch.tensor([y]).double()).item()
    assert said == pytest.approx(-((3 - y) * math.log(p[2]) + (y - 2) * math.log(p[3])))
    free = torch.zeros(1, 5, requires_grad=True)
    optimizer = torch.optim.Adam([free], 0.1)
    for _ in range(300):
        optimizer.zero_grad()
        distribution_focal(free, torch.tensor([y])).sum().backward()
        optimizer.step()
    assert (free.softmax(1) * torch.arange(5)).sum().item() == pytest.approx(y, abs=0.02)


def test_distances_become_the_box_around_a_position() -> None:
    model = tiny().eval()
    answers = model(torch.zeros(1, 3, 64, 64))
    centre = (answers.anchors[:, :2] + answers.anchors[:, 2:]) / 2
    assert centre[1].tolist() == [4, 0]
    assert answers.counts == [256, 64, 16]
    assert answers.strides[256] == 8
    sure = torch.full_like(answers.edges, -50.0)
    sure[..., 2] = 50.0  # two strides to each side
    logits = torch.full_like(answers.logits, -9.0)
    logits[0, 256 + 9, 1] = 3.0  # row 1, column 1 of stride 8
    said = type(answers)(**{**vars(answers), "edges": sure, "logits": logits, "threshold": 0.5}).detections()[0]
    assert said["boxes"].tolist() == [[0.0, 0.0, 24.0, 24.0]]  # clipped: the centre is (8, 8)
    assert said["labels"].tolist() == [1]


def test_roles_are_the_answers_and_what_crosskd_reuses() -> None:
    model = tiny().eval()
    for part in model.head.scales.parameters():
        part.data.fill_(2.0)
    roles = model.roles()
    recorder = Recorder(model, roles)
    pixels = torch.rand(2, 3, 64, 64)
    with recorder, torch.no_grad():
        answers = model(pixels)
    taken = recorder.release()
    scores = torch.cat([taken[f"head.cls[{n}]"].flatten(2).transpose(1, 2) for n in range(3)], dim=1)
    torch.testing.assert_close(scores, answers.logits)
    boxes = torch.cat([taken[f"head.box[{n}]"].flatten(2).transpose(1, 2) for n in range(3)], dim=1)
    torch.testing.assert_close(boxes.unflatten(2, (4, 9)), answers.edges)
    assert [taken[f"fpn[{n}]"].shape[1:] for n in range(3)] == [(32, 16, 16), (32, 8, 8), (32, 4, 4)]
    lent = {role: model.get_submodule(path) for role, path in model.lends().items()}
    with torch.no_grad():
        torch.testing.assert_close(lent["head.cls"](F.relu(taken["head.cls[1].pre"])), taken["head.cls[1]"])
        edges = lent["head.box"](F.relu(taken["head.box[1].pre"]))
        torch.testing.assert_close(lent["head.box[1]"](edges), taken["head.box[1]"])
    kinds = [[type(layer).__name__ for layer in lent[role].children()] for role in ("head.cls", "head.box")]
    assert kinds == [["Conv2d", "GroupNorm", "ReLU", "Conv2d"]] * 2  # a layer of the tower is run again


def test_images_without_boxes_and_some_of_the_images() -> None:
    model, (pixels, targets) = tiny(), picture()
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    both = model.eval()(pixels.repeat(2, 1, 1, 1), torch.tensor([[64, 64]] * 2))
    losses = both.losses([targets[0], none])
    torch.stack(list(losses.values())).sum().backward()
    alone = model(pixels, torch.tensor([[64, 64]])).losses(targets)
    torch.testing.assert_close(both.rows([0]).losses(targets), alone)
    assert losses["classes"] > alone["classes"]  # the empty image is background
    empty = model(pixels).losses([none])
    assert empty["boxes"] == empty["edges"] == 0
    assert all(part.requires_grad for part in empty.values())


def test_positions_in_the_padding_do_not_count() -> None:
    model, (pixels, targets) = tiny().eval(), picture()
    answers = model(pixels, torch.tensor([[64, 40]]))
    other = answers.logits.clone()
    other[:, answers.anchors[:, ::2].mean(1) >= 40] = 5.0
    changed = type(answers)(**{**vars(answers), "logits": other})
    first = [{name: value[:1] for name, value in targets[0].items()}]
    assert torch.equal(changed.losses(first)["classes"], answers.losses(first)["classes"])


def test_half_precision_is_compared_in_full() -> None:
    model, (pixels, targets) = tiny(), picture()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(pixels).losses(targets)
    assert all(part.dtype == torch.float32 and part.isfinite() for part in losses.values())


def test_it_is_found_by_name() -> None:
    model = load({"model": "tutelage:gfl", "bins": 8, **SMALL}, task="detection", num_classes=3, seed=0)
    assert {"fpn[2]", "head.cls[2]", "head.box[2]", "head.cls[2].pre", "stages[0]"} <= set(model.roles)
    assert model(torch.rand(1, 3, 64, 64)).logits.shape == (1, 256 + 64 + 16, 3)


def test_it_exports() -> None:
    assert exported(tiny(), torch.rand(1, 3, 64, 64), ("logits", "edges"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bins": 0}, "bins and convolutions are at least 1, not 0 and 2"),
        ({"head_norm": "grupp"}, "head_norm 'grupp' is not known; did you mean group?"),
    ],
)
def test_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        tiny(**options)


def test_ld_and_crosskd_read_it_as_it_is() -> None:
    pixels, targets = picture()
    frame = Frame((64, 64), torch.tensor([[64, 64]]), targets[0]["boxes"], torch.tensor([0, 0]))
    batch = Batch.of(pixels, frame=frame, extra={"annotated": [True]})
    batch = replace(batch, target=targets, labelled=torch.tensor([True]))
    spec = {"model": "tutelage:gfl", "bins": 8, **SMALL}
    teacher, student = (
        load({**spec, "backbone": body}, task="detection", num_classes=3, seed=seed)
        for seed, body in enumerate(("tiny16", "tiny8"))
    )
    scales = [f"head.scales.{level}" for level in range(3)]
    objective = Objective(ld=1.0 * LD(), crosskd=1.0 * CrossKD(box_scales=scales))
    distiller = Distiller(student, objective, task=Detection(3), teacher=teacher, sample=batch)
    losses = distiller(batch, distiller.observe(batch))
    losses.total.backward()
    assert {"ld.main", "crosskd.cls", "crosskd.box", "task.edges"} <= set(losses.parts)
    assert all(part.isfinite() for part in losses.parts.values())
    assert all(losses.parts[name] > 0 for name in ("ld.main", "crosskd.cls", "crosskd.box"))
    towers = dict(student.module.named_parameters())
    assert all(towers[f"head.{side}_tower.0.weight"].grad is not None for side in ("cls", "box"))
    distiller.close()
