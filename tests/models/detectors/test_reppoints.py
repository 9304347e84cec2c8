# SPDX-License-Identifier: Apache-2.0
import math
import re
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from models.detectors.overfit import exported, found, picture, train
from tutelage.core.error import UserError
from tutelage.core.tap import Recorder
from tutelage.models.detectors.dense import Padded
from tutelage.models.detectors.reppoints import RepPoints, nearest_points
from tutelage.models.load import load

SMALL: dict[str, Any] = {"backbone": "tiny8", "width": 32, "levels": (4, 8, 16), "extra": "none", "convolutions": 1}


def tiny(**options: Any) -> RepPoints:
    torch.manual_seed(0)
    return RepPoints(3, **{**SMALL, **options})


def test_one_picture_is_learned_by_heart() -> None:
    model, given = tiny(), picture()
    first, last = train(model, given, 150)
    assert last < first / 2
    answers = found(model, given)
    assert min(answers["overlaps"]) > 0.75, answers
    assert answers["confident"] <= 4


def test_the_box_around_points_is_their_mean_and_deviation() -> None:
    head = tiny().head
    points = torch.randn(1, 1, 9, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        head.moment.copy_(torch.tensor([0.1, -0.2]))
    box = head.around(points, torch.tensor([[40.0, 24.0]]), torch.tensor([8.0]))[0, 0].tolist()
    x, y = 40 + 8 * points[0, 0, :, 1], 24 + 8 * points[0, 0, :, 0]
    wide, tall = x.std().item() * math.exp(0.1), y.std().item() * math.exp(-0.2)
    assert box == pytest.approx(
        [x.mean().item() - wide, y.mean().item() - tall, x.mean().item() + wide, y.mean().item() + tall], rel=1e-5
    )


def test_points_that_are_one_have_a_finite_gradient() -> None:
    points = torch.zeros(1, 1, 9, 2, requires_grad=True)
    tiny().head.around(points, torch.zeros(1, 2), torch.ones(1)).sum().backward()
    assert points.grad is not None
    assert points.grad.isfinite().all()


def test_the_second_stage_moves_the_first_points_slowly() -> None:
    head = tiny().head
    one = torch.rand(1, 32, 6, 6)
    with torch.no_grad():
        for look in (head.cls_look, head.box_look):
            look.weight.normal_(std=0.2)
    last = head.get_parameter("first.2.bias")
    scores, first, second = head(one)
    [through] = torch.autograd.grad(scores.sum() + second.sum(), last, retain_graph=True)
    [direct] = torch.autograd.grad(first.sum(), last)
    assert through.any()
    assert direct.abs().max() == 36


def test_points_at_the_places_of_a_kernel_see_what_a_convolution_sees() -> None:
    head = tiny().head
    one = torch.rand(1, 32, 6, 6)
    with torch.no_grad():
        look = head.cls_look
        plain = F.conv2d(one, look.weight, look.bias, padding=1)
        torch.testing.assert_close(look(one, (head.grid - head.grid).expand(1, -1, 6, 6)), plain)
        shifted = torch.zeros(1, 9, 2, 6, 6)
        shifted[:, :, 0] = 1.0  # one row down: y comes first
        moved = look(one, shifted.flatten(1, 2))
        torch.testing.assert_close(moved[:, :, 1:4], plain[:, :, 2:5])


def test_first_points_belong_to_the_nearest_position_of_a_level() -> None:
    places, strides = [], []
    for stride in (8, 16, 32):
        side = torch.arange(64 // stride) * stride
        grid = torch.stack(torch.meshgrid(side, side, indexing="xy"), dim=2).flatten(0, 1).double()
        places.append(grid)
        strides.append(torch.full((len(grid),), float(stride)).double())
    place, step = torch.cat(places), torch.cat(strides)
    generator = torch.Generator().manual_seed(0)
    targets = []
    for count in (4, 0, 2):
        low = torch.rand(count, 2, generator=generator).double() * 30
        size = 8 + 90 * torch.rand(count, 2, generator=generator).double() ** 2
        targets.append({"boxes": torch.cat([low, low + size], 1), "labels": torch.zeros(count, dtype=torch.int64)})
    targets[2]["boxes"][1] = targets[2]["boxes"][0] + 0.5  # two boxes of one position: the nearer is learned
    which = nearest_points(place, step, Padded.of(targets))
    for image, target in enumerate(targets):
        expected = [-1] * len(place)
        nearest = [math.inf] * len(place)
        for number, (x1, y1, x2, y2) in enumerate(target["boxes"].tolist()):
            level = int((math.log2((x2 - x1) / 4) + math.log2((y2 - y1) / 4)) / 2)
            level = min(max(level, 3), 5)
            away = {
                a: math.hypot((x - (x1 + x2) / 2) / (x2 - x1), (y - (y1 + y2) / 2) / (y2 - y1))
                for a, (x, y) in enumerate(place.tolist())
                if step[a] == 2**level
            }
            a = min(away, key=lambda at: away[at])
            if away[a] < nearest[a]:
                expected[a], nearest[a] = number, away[a]
        assert which[image].tolist() == expected


def test_roles_are_the_answers() -> None:
    model = load({"model": "tutelage:reppoints", **SMALL}, task="detection", num_classes=3, seed=0)
    recorder = Recorder(model.module.eval(), dict(model.roles))
    with recorder, torch.no_grad():
        answers = model.module(torch.rand(2, 3, 64, 64))
    taken = recorder.release()
    scores = torch.cat([taken[f"head.cls[{n}]"].flatten(2).transpose(1, 2) for n in range(3)], dim=1)
    torch.testing.assert_close(scores, answers.logits)
    assert [tuple(taken[f"head.box[{n}]"].shape[1:]) for n in range(3)] == [(18, 16, 16), (18, 8, 8), (18, 4, 4)]
    assert taken["fpn[0]"].shape[1:] == (32, 16, 16)


def test_images_without_boxes_and_some_of_the_images() -> None:
    model, (pixels, targets) = tiny().eval(), picture()
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    both = model(pixels.repeat(2, 1, 1, 1))
    losses = both.losses([targets[0], none])
    torch.stack(list(losses.values())).sum().backward()
    torch.testing.assert_close(both.rows([0]).losses(targets), model(pixels).losses(targets))
    empty = model(pixels).losses([none])
    assert empty["boxes"] == empty["first"] == 0
    assert all(part.requires_grad for part in empty.values())


def test_half_precision_is_compared_in_full() -> None:
    model, (pixels, targets) = tiny(), picture()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(pixels).losses(targets)
    assert all(part.dtype == torch.float32 and part.isfinite() for part in losses.values())


def test_it_exports() -> None:
    assert exported(tiny(), torch.rand(1, 3, 64, 64), ("logits", "boxes"))


def test_options() -> None:
    with pytest.raises(UserError, match=f"^{re.escape('convolutions are at least 1, not 0')}$"):
        tiny(convolutions=0)


def test_group_norms_in_the_pyramid() -> None:
    names = [type(part).__name__ for part in tiny(norm="group").backbone.fpn.modules()]
    assert names.count("GroupNorm") == 6
