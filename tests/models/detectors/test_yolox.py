# SPDX-License-Identifier: Apache-2.0
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models.detectors.overfit import exported, found, picture, train
from tutelage.core.error import UserError
from tutelage.core.tap import Recorder
from tutelage.models.detectors.dense import Padded
from tutelage.models.detectors.yolox import SIZES, YOLOX, assigned
from tutelage.models.load import load

SMALL: dict[str, Any] = {"depth": 0.33, "width": 0.25}
PUBLISHED = {"yolox_nano": 0.91, "yolox_tiny": 5.06, "yolox_s": 9.0, "yolox_m": 25.3, "yolox_l": 54.2, "yolox_x": 99.1}


def tiny(**options: Any) -> YOLOX:
    torch.manual_seed(0)
    return YOLOX(3, **{**SMALL, **options})


def test_one_picture_is_learned_by_heart() -> None:
    model, given = tiny(edges=True), picture()
    first, last = train(model, given, 90)
    assert last < first / 2
    answers = found(model, given)
    assert min(answers["overlaps"]) > 0.75, answers
    assert answers["confident"] <= 4


@pytest.mark.parametrize("name", SIZES)
def test_sizes_have_as_many_parameters_as_printed(name: str) -> None:
    with torch.device("meta"):
        model = load(f"tutelage:{name}", task="detection", num_classes=80).module
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(PUBLISHED[name], abs=0.06)


def test_names_are_the_published_ones() -> None:
    names = set(tiny().state_dict())
    assert {
        "backbone.backbone.stem.conv.conv.weight",
        "backbone.backbone.dark5.1.conv2.bn.running_var",
        "backbone.backbone.dark3.1.m.0.conv1.conv.weight",
        "backbone.lateral_conv0.conv.weight",
        "backbone.C3_n4.conv3.bn.weight",
        "head.cls_convs.2.1.conv.weight",
        "head.stems.0.bn.bias",
        "head.obj_preds.1.bias",
    } <= names


# the assignment, by loops over boxes and positions


def rule(
    logits: Tensor, boxes: Tensor, objects: Tensor, places: Tensor, strides: Tensor, truth: Tensor, label: Tensor
) -> Any:
    """Which box each position of one image learns, -1 for none."""
    count, positions = len(truth), len(places)
    inside, near = np.zeros((count, positions), bool), np.zeros((count, positions), bool)
    cost, overlap = np.full((count, positions), np.inf), np.zeros((count, positions))
    for g in range(count):
        x1, y1, x2, y2 = truth[g].tolist()
        for a in range(positions):
            x, y = places[a].tolist()
            inside[g, a] = x1 < x < x2 and y1 < y < y2
            reach = 2.5 * strides[a].item()
            near[g, a] = abs(x - (x1 + x2) / 2) < reach and abs(y - (y1 + y2) / 2) < reach
    candidates = (inside | near).any(axis=0)
    for g in range(count):
        x1, y1, x2, y2 = truth[g].tolist()
        for a in np.flatnonzero(candidates).tolist():
            u1, v1, u2, v2 = boxes[a].tolist()
            inter = max(0.0, min(x2, u2) - max(x1, u1)) * max(0.0, min(y2, v2) - max(y1, v1))
            overlap[g, a] = inter / ((x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - inter)
            cost[g, a] = -3 * math.log(overlap[g, a] + 1e-8) + (0 if inside[g, a] and near[g, a] else 1e5)
            for k in range(logits.shape[1]):
                p = math.sqrt(torch.sigmoid(logits[a, k]).item() * torch.sigmoid(objects[a]).item())
                cost[g, a] -= math.log(p) if k == int(label[g]) else math.log(1 - p)
    claims = np.zeros((count, positions), bool)
    for g in range(count):
        k = max(1, int(sum(sorted(overlap[g], reverse=True)[:10])))
        for a in np.argsort(cost[g], kind="stable")[:k].tolist():
            claims[g, a] = np.isfinite(cost[g, a])
    which = np.full(positions, -1)
    for a in range(positions):
        if claims[:, a].sum() == 1:
            which[a] = int(claims[:, a].argmax())
        elif claims[:, a].any():
            which[a] = int(cost[:, a].argmin())
    return which, overlap


@pytest.mark.parametrize("seed", range(6))
def test_the_assignment_is_the_rule(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    grid = torch.stack(torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="xy"), dim=2).flatten(0, 1)
    places = torch.cat([(grid + 0.5) * 8, (grid[:16] + 0.5) * 16]).double()
    strides = torch.tensor([8.0] * 64 + [16.0] * 16).double()
    targets = []
    for count in (3, 0, 1):
        low = torch.rand(count, 2, generator=generator).double() * 40
        size = 4 + 24 * torch.rand(count, 2, generator=generator).double()
        targets.append({"boxes": torch.cat([low, low + size], 1), "labels": torch.arange(count) % 4})
    logits, objects = (
        torch.randn(3, 80, 4, generator=generator).double(),
        torch.randn(3, 80, generator=generator).double(),
    )
    around = places + 6 * torch.randn(3, 80, 2, generator=generator).double()
    half = 4 + 10 * torch.rand(3, 80, 2, generator=generator).double()
    boxes = torch.cat([around - half, around + half], dim=2)
    which, shared = assigned(logits, boxes, objects, places, strides, Padded.of(targets))
    for image, target in enumerate(targets):
        expected, overlap = rule(
            logits[image], boxes[image], objects[image], places, strides, target["boxes"], target["labels"]
        )
        np.testing.assert_array_equal(which[image].numpy(), expected)
        for a in np.flatnonzero(expected >= 0):
            assert shared[image, a].item() == pytest.approx(overlap[expected[a], a], rel=1e-6)
    assert (which[0] >= 0).sum() >= 3


def test_codes_become_boxes_and_positions_are_corners_of_cells() -> None:
    model = tiny().eval()
    with torch.no_grad():
        answers = model(torch.zeros(1, 3, 64, 96))
    assert answers.places[1].tolist() == [8.0, 0.0]
    assert answers.logits.shape == (1, 8 * 12 + 4 * 6 + 2 * 3, 3)
    middle = (answers.boxes[0, :, :2] + answers.boxes[0, :, 2:]) / 2
    torch.testing.assert_close(middle, answers.places + answers.codes[0, :, :2] * answers.strides[:, None])
    size = answers.boxes[0, :, 2:] - answers.boxes[0, :, :2]
    torch.testing.assert_close(size, answers.codes[0, :, 2:].exp() * answers.strides[:, None])


def test_sides_that_are_no_multiples_of_32_are_padded() -> None:
    model = tiny().eval()
    pixels = torch.rand(1, 3, 50, 70)
    padded = torch.nn.functional.pad(pixels, (0, 26, 0, 14))
    grey = torch.nn.functional.pad(pixels, (0, 26, 0, 14), value=114.0)
    with torch.no_grad():
        said = [model(pixels), model(padded, torch.tensor([[50, 70]])), model(grey)]
    for other in said[1:]:
        torch.testing.assert_close(other.logits, said[0].logits)


def test_roles_are_the_answers() -> None:
    model = load({"model": "tutelage:yolox", **SMALL}, task="detection", num_classes=3, seed=0)
    recorder = Recorder(model.module.eval(), model.roles)
    with recorder, torch.no_grad():
        answers = model.module(torch.rand(2, 3, 64, 64))
    taken = recorder.release()
    scores = torch.cat([taken[f"head.cls[{n}]"].flatten(2).transpose(1, 2) for n in range(3)], dim=1)
    torch.testing.assert_close(scores, answers.logits)
    boxes = torch.cat([taken[f"head.box[{n}]"].flatten(2).transpose(1, 2) for n in range(3)], dim=1)
    torch.testing.assert_close(boxes, answers.codes)
    assert [tuple(taken[f"fpn[{n}]"].shape[1:]) for n in range(3)] == [(64, 8, 8), (64, 4, 4), (64, 2, 2)]


def test_pixels_are_those_of_the_published_weights_unless_said_otherwise() -> None:
    pixels = torch.rand(1, 3, 32, 32)
    spec = tiny().pixels
    torch.testing.assert_close(spec.prepare(pixels, {}), 255 * pixels.flip(1))
    assert not hasattr(tiny(published_pixels=False), "pixels")


def test_images_without_boxes_and_some_of_the_images() -> None:
    model, (pixels, targets) = tiny().eval(), picture()
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    both = model(pixels.repeat(2, 1, 1, 1))
    losses = both.losses([targets[0], none])
    assert set(losses) == {"boxes", "objects", "classes"}
    torch.stack(list(losses.values())).sum().backward()
    torch.testing.assert_close(both.rows([0]).losses(targets), model(pixels).losses(targets))
    empty = model(pixels).losses([none])
    assert empty["boxes"] == empty["classes"] == 0
    assert empty["objects"] > 0
    assert all(part.requires_grad for part in empty.values())


def test_half_precision_is_compared_in_full() -> None:
    model, (pixels, targets) = tiny(), picture()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(pixels).losses(targets)
    assert all(part.dtype == torch.float32 and part.isfinite() for part in losses.values())


def test_it_exports() -> None:
    assert exported(tiny(), torch.rand(1, 3, 64, 64), ("logits", "boxes", "objects"))


@pytest.mark.parametrize("options", [{"depth": 0}, {"width": 0.01}])
def test_options(options: dict[str, Any]) -> None:
    made = {**SMALL, **options}
    said = f"depth is > 0 and width at least 1/32, not {made['depth']} and {made['width']}"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        tiny(**options)
