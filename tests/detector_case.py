# SPDX-License-Identifier: Apache-2.0
"""Pictures with boxes, and torchvision's own detector made of the parts of one of ours."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from tutelage.core.batch import Batch, Frame
from tutelage.core.tap import Recorder
from tutelage.models.detectors.pyramid import Pyramid

SIDE = 64
CLASSES = 3


class Maps(nn.Module):
    """A pyramid as torchvision's detectors take a backbone."""

    def __init__(self, pyramid: Pyramid) -> None:
        super().__init__()
        self.pyramid, self.out_channels = pyramid, pyramid.width

    def forward(self, pixels: Tensor) -> "OrderedDict[str, Tensor]":
        return OrderedDict((str(number), one) for number, one in enumerate(self.pyramid(pixels)))


def unresized() -> Any:
    """Return torchvision's transform that changes nothing."""
    return GeneralizedRCNNTransform(SIDE, SIDE, [0.0] * 3, [1.0] * 3).eval()  # else it draws a size


def pictures(count: int = 3, seed: int = 0) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Return `[count, 3, 64, 64]` and their boxes; the last picture has none."""
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randn(count, 3, SIDE, SIDE, generator=draw)
    targets = []
    for number in range(count):
        things = 0 if number == count - 1 else 4
        corner = torch.rand(things, 2, generator=draw) * 32
        # areas of a picture differ by more than 8: see `tutelage.models.detectors.fcos.assigned`
        size = 8 + 6 * torch.arange(things)[:, None] + 2 * torch.rand(things, 2, generator=draw)
        labels = torch.randint(CLASSES, (things,), generator=draw)
        boxes = torch.cat([corner, corner + size], dim=1)
        targets.append({"boxes": boxes, "labels": labels, "masks": masks_of(boxes)})
    return pixels, targets


def masks_of(boxes: Tensor) -> Tensor:
    """Return the left upper half of each box as its mask."""
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    left, top, right, bottom = (edge[:, None, None] for edge in boxes.unbind(1))
    share = (x - left) / (right - left) + (y - top) / (bottom - top)
    return (x >= left) & (y >= top) & (share < 1)


def sharpened(model: nn.Module, seed: int = 1) -> nn.Module:
    """Make a network say something: larger random weights, and no prior against things."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for part in model.modules():
            if isinstance(part, (nn.Conv2d, nn.Linear, nn.ConvTranspose2d)):
                nn.init.kaiming_normal_(part.weight, nonlinearity="linear")
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
    return model.eval()


def same(found: Sequence[dict[str, Tensor]], theirs: Sequence[dict[str, Tensor]]) -> int:
    """Hold what two detectors found against each other; return how much that was."""
    for one, other in zip(found, theirs, strict=True):
        assert torch.equal(one["labels"], other["labels"])
        torch.testing.assert_close(one["scores"], other["scores"])
        torch.testing.assert_close(one["boxes"], other["boxes"], rtol=1e-4, atol=1e-3)
    return sum(len(one["scores"]) for one in found)


def taps_fire(model: Any) -> dict[str, Tensor]:
    """Return what the taps of every role record in a forward."""
    roles = model.roles()
    recorder = Recorder(model, roles)
    with recorder:
        model(pictures(2)[0])
    taken = recorder.release()
    recorder.close()
    return taken


def framed(pixels: Tensor, targets: Sequence[dict[str, Tensor]]) -> Batch:
    """Return pictures as a batch."""
    counts = torch.tensor([len(one["labels"]) for one in targets])
    size = torch.tensor([pixels.shape[-2:]] * len(pixels))
    frame = Frame(
        (pixels.shape[-2], pixels.shape[-1]),
        size,
        torch.cat([one["boxes"] for one in targets]),
        torch.arange(len(targets)).repeat_interleave(counts),
    )
    index = torch.arange(len(pixels))
    return Batch(pixels, list(targets), torch.ones(len(pixels), dtype=torch.bool), index, index, frame)
