# SPDX-License-Identifier: Apache-2.0
import math
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models.detectors.overfit import exported, found, picture, train
from tutelage.core.error import UserError
from tutelage.core.tap import Recorder
from tutelage.models.detectors.dense import Padded
from tutelage.models.detectors.solo import SOLO, cells, decay
from tutelage.models.load import load

SMALL: dict[str, Any] = {
    **{"backbone": "tiny8", "width": 32, "hidden": 32, "levels": (4, 8, 16), "extra": "none", "convolutions": 2},
    **{"grids": (12, 8, 4), "ranges": ((1, 24), (12, 48), (40, 200))},
}


def tiny(**options: Any) -> SOLO:
    torch.manual_seed(0)
    return SOLO(3, **{**SMALL, **options})


def test_one_picture_is_learned_by_heart() -> None:
    model, given = tiny(), picture()
    first, last = train(model, given, 200)
    assert last < first / 2
    answers = found(model, given, masks=True)
    assert min(answers["overlaps"]) > 0.65, answers  # masks are drawn at a quarter of the size
    assert answers["confident"] <= 4
    model.train()
    with torch.no_grad():
        [said] = model(given[0]).detections()
    truth = given[1][0]
    for mask, label in zip(truth["masks"], truth["labels"], strict=True):
        same = said["masks"][said["labels"] == label]
        overlaps = (same & mask).sum((1, 2)) / (same | mask).sum((1, 2))
        assert overlaps.max() > 0.75


def things(seed: int, counts: tuple[int, ...] = (4, 0, 2)) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Ellipses of several sizes."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(96.0), indexing="ij")
    targets, padded = [], torch.zeros(len(counts), max(*counts, 1) + 1, 64, 96, dtype=torch.float64)
    for image, count in enumerate(counts):
        drawn = torch.rand(count, 4, generator=generator)
        masks = torch.zeros(count, 64, 96, dtype=torch.bool)
        boxes = torch.zeros(count, 4, dtype=torch.float64)
        for n, (a, b, c, d) in enumerate(drawn.tolist()):
            wide, tall = 4 + 24 * c, 4 + 18 * d
            masks[n] = ((x - 90 * a) / wide) ** 2 + ((y - 60 * b) / tall) ** 2 <= 1
            rows, columns = masks[n].nonzero(as_tuple=True)
            boxes[n] = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        padded[image, :count] = masks
        targets.append({"boxes": boxes, "labels": torch.arange(count), "masks": masks})
    return padded, targets


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("grid", "within"), [(12, (1.0, 40.0)), (5, (20.0, 200.0))])
def test_cells_are_those_of_the_rule(seed: int, grid: int, within: tuple[float, float]) -> None:
    padded, targets = things(seed)
    which, cell, learned = cells(padded, Padded.of(targets), grid, within)
    for image, target in enumerate(targets):
        expected = np.full((grid, grid), -1)
        for n, (mask, box) in enumerate(zip(target["masks"].numpy(), target["boxes"].tolist(), strict=True)):
            wide, tall = box[2] - box[0], box[3] - box[1]
            if not within[0] <= math.sqrt(wide * tall) <= within[1]:
                continue
            rows, columns = mask.nonzero()
            spans = []
            for centre, half, extent in ((rows.mean(), 0.1 * tall, 64), (columns.mean(), 0.1 * wide, 96)):
                own = int(centre / extent * grid)
                low = max(0, math.floor((centre - half) / extent * grid), own - 1)
                high = min(grid - 1, math.floor((centre + half) / extent * grid), own + 1)
                spans.append(range(low, high + 1))
            for row in spans[0]:
                for column in spans[1]:
                    expected[row, column] = n
        np.testing.assert_array_equal(which[image].view(grid, grid).numpy(), expected)
        slots = {(n, int(c)) for n in range(cell.shape[1]) for c in cell[image, n][learned[image, n]]}
        assert slots == {(int(n), c) for c, n in enumerate(expected.flatten()) if n >= 0}
        assert int(learned[image].sum()) == int((expected >= 0).sum())


def test_suppression_is_the_equation() -> None:
    masks = (torch.rand(6, 8, 8, generator=torch.Generator().manual_seed(0)) > 0.4).double()
    labels = torch.tensor([0, 0, 1, 0, 1, 0])
    iou = np.zeros((6, 6))
    for i in range(6):
        for j in range(i + 1, 6):
            if labels[i] == labels[j]:
                iou[i, j] = ((masks[i] * masks[j]).sum() / ((masks[i] + masks[j]) > 0).sum()).item()
    expected = []
    for j in range(6):
        values = [math.exp(-2.0 * (iou[i, j] ** 2 - max(iou[k, i] for k in range(6)) ** 2)) for i in range(j)]
        expected.append(min([1.0, *values]))
    np.testing.assert_allclose(decay(masks, labels, 2.0).numpy(), expected, rtol=1e-9)


def test_the_loss_of_masks_is_the_dice_loss_of_the_cells_that_learn() -> None:
    model = tiny().eval()
    padded, targets = things(3, (2, 1))
    with torch.no_grad():
        answers = model(torch.rand(2, 3, 64, 96))
        losses = answers.losses(targets)
    total, count = 0.0, 0
    for scores, drawn, within in zip(answers.logits, answers.masks, answers.ranges, strict=True):
        which, _, _ = cells(padded, Padded.of(targets), scores.shape[2], within)
        true = torch.nn.functional.interpolate(padded, drawn.shape[2:], mode="bilinear") >= 0.5
        for image, cell in (which >= 0).nonzero().tolist():
            p, q = drawn[image, cell].sigmoid().double(), true[image, which[image, cell]].double()
            total += 1 - 2 * (p * q).sum().item() / (p.square().sum().item() + q.sum().item() + 2e-3)
            count += 1
    assert count > 2
    assert losses["masks"].item() == pytest.approx(3 * total / count, rel=1e-5)


def test_roles_are_the_answers() -> None:
    model = load({"model": "tutelage:solo", **SMALL}, task="detection", num_classes=3, seed=0)
    recorder = Recorder(model.module.eval(), dict(model.roles))
    with recorder, torch.no_grad():
        answers = model.module(torch.rand(2, 3, 64, 64))
    taken = recorder.release()
    for level in range(3):
        assert torch.equal(taken[f"head.cls[{level}]"], answers.logits[level])
        assert torch.equal(taken[f"head.box[{level}]"], answers.masks[level])
    assert [tuple(taken[f"fpn[{n}]"].shape[1:]) for n in range(3)] == [(32, 16, 16), (32, 8, 8), (32, 4, 4)]
    assert [tuple(one.shape[1:]) for one in answers.masks] == [(144, 16, 16), (64, 16, 16), (16, 16, 16)]


def test_published_grids_and_levels() -> None:
    with torch.device("meta"):
        model = SOLO(80, backbone="torchvision:resnet50")
    assert model.head.grids == (40, 36, 24, 16, 12)
    assert model.backbone.strides == (4, 8, 16, 32, 64)


def test_images_without_objects_and_some_of_the_images() -> None:
    model, (pixels, targets) = tiny().eval(), picture()
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "masks": torch.zeros(0, 64, 64)}
    both = model(pixels.repeat(2, 1, 1, 1))
    losses = both.losses([targets[0], {**none, "masks": none["masks"].bool()}])
    torch.stack(list(losses.values())).sum().backward()
    torch.testing.assert_close(both.rows([0]).losses(targets), model(pixels).losses(targets))
    empty = model(pixels).losses([none])
    assert empty["masks"] == 0
    assert all(part.requires_grad for part in empty.values())


def test_sides_of_any_length_and_padding() -> None:
    model = tiny(threshold=0.0, last=0.0).eval()
    with torch.no_grad():
        [said] = model(torch.rand(1, 3, 50, 70), torch.tensor([[40, 61]])).detections()
    assert said["masks"].shape[1:] == (50, 70)
    assert len(said["masks"]) > 0
    assert not said["masks"][:, 40:].any()
    assert not said["masks"][:, :, 61:].any()
    assert (said["scores"].diff() <= 0).all()
    shape = torch.zeros(1, 50, 70, dtype=torch.bool)
    shape[0, 10:40, 10:30] = True
    target = {"boxes": torch.tensor([[10.0, 10, 30, 40]]), "labels": torch.tensor([0]), "masks": shape}
    losses = model(torch.rand(1, 3, 50, 70)).losses([target])
    assert losses["masks"] > 0


def test_half_precision_is_compared_in_full() -> None:
    model, (pixels, targets) = tiny(), picture()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(pixels).losses(targets)
    assert all(part.dtype == torch.float32 and part.isfinite() for part in losses.values())


def test_an_exported_copy_tells_the_same() -> None:
    model = tiny(threshold=0.0, last=0.0, most=20).eval()
    with torch.no_grad():
        answers = model(torch.rand(1, 3, 64, 64))
        [said] = answers.detections()
        boxes, scores, labels, masks = answers.exported()
    assert masks.shape == (20, 64, 64)
    there = scores > 0
    for name, value in (("boxes", boxes), ("scores", scores), ("labels", labels), ("masks", masks > 0.5)):
        assert torch.equal(value[there], said[name])
    assert exported(Told(model), torch.rand(1, 3, 64, 64), ("boxes", "scores", "masks"))


class Told(torch.nn.Module):
    def __init__(self, model: SOLO) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Any:
        return SimpleNamespace(
            **dict(zip(("boxes", "scores", "labels", "masks"), self.model(pixels).exported(), strict=True))
        )


def test_boxes_alone_are_not_enough() -> None:
    model, (pixels, targets) = tiny(), picture()
    said = "solo learns from instance masks, and this data has boxes only: use another detector"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        model(pixels).losses([{name: targets[0][name] for name in ("boxes", "labels")}])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"grids": (12, 8)},
            "solo needs a grid and a range of sizes for each of the 3 levels of its pyramid, not 2 and 3",
        ),
        ({"convolutions": 0}, "solo has at least 2 levels and 1 convolution, not 3 and 0"),
    ],
)
def test_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        tiny(**options)
