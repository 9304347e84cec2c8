# SPDX-License-Identifier: Apache-2.0
"""One picture learned by heart: what every detector of this library must be able to do."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou, masks_to_boxes

Picture = tuple[Tensor, list[dict[str, Tensor]]]


def picture(size: int = 64) -> Picture:
    """Return one image with a bright and a striped rectangle, and what it shows: boxes, labels and masks."""
    pixels = torch.zeros(1, 3, size, size)
    pixels += 0.1 * torch.rand(pixels.shape, generator=torch.Generator().manual_seed(0))
    spans = [(6, 8, 30, 28), (30, 34, 58, 60)]
    masks = torch.zeros(2, size, size, dtype=torch.bool)
    for number, (x, y, right, bottom) in enumerate(spans):
        masks[number, y:bottom, x:right] = True
    pixels[0, 0, masks[0]] += 2.0
    pixels[0, 1, masks[1]] += 2.0
    pixels[0, 2, :, ::4] -= 1.0
    boxes = torch.tensor(spans, dtype=torch.float32)
    return pixels, [{"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": masks}]


def train(model: nn.Module, given: Picture, steps: int, rate: float = 2e-3) -> list[float]:
    """Return the loss before and after so many steps of Adam; batch norms learn and then stand still."""
    pixels, targets = given
    optimizer = torch.optim.Adam(model.parameters(), rate)
    model.train()
    size = torch.tensor([pixels.shape[-2:]] * len(pixels))
    first = last = 0.0
    for step in range(steps):
        if 3 * step == 2 * steps:
            for group in optimizer.param_groups:
                group["lr"] /= 5
        loss = torch.stack(list(model(pixels, size).losses(targets).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        last = loss.item()
        first = first or last
    return [first, last]


def found(model: nn.Module, given: Picture, *, masks: bool = False) -> dict[str, Any]:
    """Return for each thing the overlap with the best answer of its class, and the number of confident answers."""
    pixels, targets = given
    model.train()  # one picture: its own statistics
    with torch.no_grad():
        [said] = model(pixels, torch.tensor([pixels.shape[-2:]])).detections()
    truth = targets[0]
    overlaps = []
    for box, label in zip(truth["boxes"], truth["labels"], strict=True):
        same = (said["labels"] == label) & (said["scores"] > 0.4)
        boxes = masks_to_boxes(said["masks"][same]) + torch.tensor([0, 0, 1, 1]) if masks else said["boxes"][same]
        overlaps.append(float(box_iou(box[None], boxes).max()) if len(boxes) else 0.0)
    return {"overlaps": overlaps, "confident": int((said["scores"] > 0.4).sum())}


class Plain(nn.Module):
    """A detector that returns some fields of its answers."""

    def __init__(self, model: nn.Module, fields: Sequence[str]) -> None:
        super().__init__()
        self.model, self.fields = model, tuple(fields)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Return the fields."""
        answers = self.model(pixels)
        return tuple(getattr(answers, name) for name in self.fields)


def exported(model: nn.Module, pixels: Tensor, fields: Sequence[str]) -> bool:
    """Return whether a traced program says of other pixels what the detector says."""
    plain = Plain(model.eval(), fields)
    program = torch.export.export(plain, (pixels,)).module()
    other = torch.rand_like(pixels)
    with torch.no_grad():
        pairs = zip(program(other), plain(other), strict=True)
        return all(torch.allclose(one, two, rtol=1e-4, atol=1e-5) for one, two in pairs)
