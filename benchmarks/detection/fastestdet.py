# SPDX-License-Identifier: Apache-2.0
"""FastestDet, a detector of 0.24 million parameters, under the names of its published weights.

Reference: github:dog-qiuqiu/FastestDet@50473cd (2022); its backbone: Ma et al., ShuffleNet V2, ECCV 2018.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from tutelage.core import InputSpec, Tap
from tutelage.models.detectors.dense import apart, clipped

#: Channels and blocks of the three stages.
STAGES = ((48, 4), (96, 8), (192, 4))
#: Published powers of objectness and class in a score.
OBJECTNESS, CLASS = 0.6, 0.4


@final
@dataclass(frozen=True)
class Answers:
    """What the network said of a batch: one box a cell.

    Args:
        said: `[B, 5 + K, H, W]`: objectness, place and size, and shares of the classes.
        size: padded (height, width) in pixels.
        image_size: `[B, 2]` height and width without padding.
        iou: overlap above which the lesser of two boxes of a class goes.
        most: boxes an image.
    """

    said: Tensor
    size: tuple[int, int]
    image_size: Tensor
    iou: float = 0.45
    most: int = 100

    def losses(self, targets: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Refuse: it is here to teach."""
        raise NotImplementedError("FastestDet has no loss here")

    def candidates_of(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return a box `[B, H W, 4]`, the score and the class `[B, H W]` of each cell."""
        height, width = self.said.shape[-2:]
        objectness, place, share, classes = self.said.split([1, 2, 2, self.said.shape[1] - 5], dim=1)
        y, x = torch.meshgrid(*(torch.arange(side, device=self.said.device) for side in (height, width)), indexing="ij")
        cells = self.said.new_tensor([width, height]).view(1, 2, 1, 1)
        centre, half = (torch.stack([x, y]) + place.tanh()) / cells, share.sigmoid() / 2
        sides = self.said.new_tensor([self.size[1], self.size[0]] * 2)
        boxes = torch.cat([centre - half, centre + half], dim=1).flatten(2).transpose(1, 2) * sides
        best, labels = classes.flatten(2).max(dim=1)
        scores = objectness.flatten(1) ** OBJECTNESS * best**CLASS
        return clipped(boxes, self.image_size), scores, labels

    def detections(self) -> list[dict[str, Tensor]]:
        """Return what was found in each image, best first, in the pixels of the batch."""
        boxes, scores, labels = self.candidates_of()
        return apart(boxes, scores, labels, iou=self.iou, most=self.most)


def layers(
    inputs: int, width: int, size: int = 1, stride: int = 1, groups: int = 1, *, active: bool = True
) -> list[nn.Module]:
    """Return a convolution, its norm and perhaps an activation."""
    conv = nn.Conv2d(inputs, width, size, stride, size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(width), *([nn.ReLU()] if active else [])]


class Block(nn.Module):
    """One block: half of the channels pass, or, where it halves the map, all are projected."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        taken = inputs if stride == 2 else inputs // 2
        middle = width // 2
        self.branch_main = nn.Sequential(
            *layers(taken, middle),
            *layers(middle, middle, 3, stride, middle, active=False),
            *layers(middle, width - taken),
        )
        self.branch_proj = (
            nn.Sequential(*layers(taken, taken, 3, 2, taken, active=False), *layers(taken, taken))
            if stride == 2
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return `[B, width, H / stride, W / stride]`."""
        if self.branch_proj is not None:
            return torch.cat([self.branch_proj(x), self.branch_main(x)], dim=1)
        passed, taken = x[:, 0::2], x[:, 1::2]
        return torch.cat([passed, self.branch_main(taken)], dim=1)


class Backbone(nn.Module):
    """Maps of strides 8, 16 and 32."""

    def __init__(self) -> None:
        super().__init__()
        self.first_conv = nn.Sequential(*layers(3, 24, 3, 2))
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        before = 24
        for number, (width, depth) in enumerate(STAGES, start=2):
            blocks = [Block(before if not place else width, width, 1 if place else 2) for place in range(depth)]
            setattr(self, f"stage{number}", nn.Sequential(*blocks))
            before = width

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the map of each stage."""
        x, found = self.maxpool(self.first_conv(x)), []
        for number in (2, 3, 4):
            x = getattr(self, f"stage{number}")(x)
            found.append(x)
        return found


class Named(nn.Module):
    """A row of layers under a further name, as the published weights have it."""

    def __init__(self, name: str, *row: nn.Module) -> None:
        super().__init__()
        self.row = name
        setattr(self, name, nn.Sequential(*row))

    def forward(self, x: Tensor) -> Tensor:
        """Return what the row gives."""
        out: Tensor = getattr(self, self.row)(x)
        return out


class Pooling(nn.Module):
    """Three rows of depthwise convolutions over one map, added to it."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.Conv1x1 = Named("conv1x1", *layers(inputs, width))
        for depth in (1, 2, 3):
            setattr(
                self, f"S{depth}", nn.Sequential(*(p for _ in range(depth) for p in layers(width, width, 5, 1, width)))
            )
        self.output = nn.Sequential(*layers(3 * width, width, active=False))

    def forward(self, x: Tensor) -> Tensor:
        """Return `[B, width, H, W]`."""
        x = self.Conv1x1(x)
        rows = torch.cat([self.get_submodule(f"S{depth}")(x) for depth in (1, 2, 3)], dim=1)
        out: Tensor = (x + self.output(rows)).relu()
        return out


class Head(nn.Module):
    """Objectness, box and class of each cell."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.conv1x1 = Named("conv1x1", *layers(width, width))
        for name, count in (("obj", 1), ("reg", 4), ("cls", num_classes)):
            row = Named("conv5x5", *layers(width, width, 5, 1, width), *layers(width, count, active=False))
            setattr(self, f"{name}_layers", row)

    def forward(self, x: Tensor) -> Tensor:
        """Return `[B, 5 + K, H, W]`."""
        x = self.conv1x1(x)
        objectness, place, classes = (self.get_submodule(f"{name}_layers")(x) for name in ("obj", "reg", "cls"))
        return torch.cat([objectness.sigmoid(), place, classes.softmax(dim=1)], dim=1)


@final
class FastestDet(nn.Module):
    """One map of stride 16 from three, and one box a cell."""

    pixels = InputSpec(bgr=True)

    def __init__(self, num_classes: int = 80) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.avg_pool = nn.AvgPool2d(3, 2, 1)
        self.upsample = nn.Upsample(scale_factor=2)
        self.SPP = Pooling(sum(width for width, _ in STAGES), 96)
        self.detect_head = Head(96, num_classes)

    def forward(self, pixels: Tensor, image_size: Tensor | None = None) -> Answers:
        """Return the answers of all cells.

        Args:
            pixels: `[B, 3, H, W]` in [0, 1], blue first.
            image_size: `[B, 2]` height and width without padding; without it nothing is padded.
        """
        fine, middle, coarse = self.backbone(pixels)
        said = self.detect_head(self.SPP(torch.cat([self.avg_pool(fine), middle, self.upsample(coarse)], dim=1)))
        height, width = pixels.shape[-2:]
        size = pixels.new_tensor([height, width]).expand(len(pixels), 2) if image_size is None else image_size
        return Answers(said, (height, width), size)

    def roles(self) -> dict[str, Tap]:
        """Return the place of the one map."""
        return {"fpn[0]": Tap("SPP")}


def fastestdet(num_classes: int = 80) -> FastestDet:
    """Return the detector, for `python:benchmarks/detection/fastestdet.py:fastestdet`."""
    return FastestDet(num_classes)
