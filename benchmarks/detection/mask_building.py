# SPDX-License-Identifier: Apache-2.0
"""How long FGD's masks take: all boxes at once against a loop over boxes, and beside a whole training step.

python benchmarks/detection/mask_building.py [--device cpu] [--out FILE.json] [--no-step]

Both ways build foreground and background of every level of a pyramid of strides 8 to 128, and must agree to the last
bit. The step is forward and backward of a RetinaNet with ResNet-50 and pyramid over one image of the largest size,
with its own loss. Results are written as JSON beside this file, with the versions of what was run.
"""

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor

from tutelage.methods.detection.fgd import masks
from tutelage.models.detectors.retinanet import RetinaNet

STRIDES = (8, 16, 32, 64, 128)
IMAGES = ((128, 128), (416, 640), (800, 1333))
BOXES = (1, 10, 30, 100)  # of the batch
BATCH = 2

Masks = list[tuple[Tensor, Tensor]]


def grids(image: tuple[int, int]) -> list[tuple[int, int]]:
    """Return rows and columns of each level."""
    return [(math.ceil(image[0] / stride), math.ceil(image[1] / stride)) for stride in STRIDES]


def at_once(boxes: Tensor, owner: Tensor, size: Tensor, image: tuple[int, int]) -> Masks:
    """Return the masks of each level, as the method builds them."""
    return masks(boxes, owner, size, grids(image))


def by_loop(boxes: Tensor, owner: Tensor, size: Tensor, image: tuple[int, int]) -> Masks:
    """Return the same masks, painted box by box."""
    found = []
    for rows, columns in grids(image):
        foreground = boxes.new_zeros(len(size), rows, columns)
        scale = boxes.new_tensor([columns, rows, columns, rows])
        edges = boxes * scale / size.flip(1).repeat(1, 2)[owner].to(boxes.dtype)
        low, high = edges[:, :2].floor(), edges[:, 2:].ceil()
        value = 1 / (high + 1 - low).flip(1).prod(dim=1)
        for number in range(len(boxes)):
            (x, y), (right, bottom) = low[number].int().tolist(), high[number].int().tolist()
            span = foreground[int(owner[number]), y : bottom + 1, x : right + 1]
            torch.maximum(span, value[number], out=span)
        empty = (foreground == 0).to(foreground.dtype)
        background = empty / empty.sum((1, 2), keepdim=True).clamp(min=1)
        found.append((foreground, background))
    return found


def drawn(count: int, image: tuple[int, int], device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return boxes of 3 to 60 % of a side, whose images take turns, and the images' sizes."""
    generator = torch.Generator().manual_seed(count)
    uniform = torch.rand(count, 4, generator=generator)
    whole = torch.tensor([image[1], image[0]], dtype=torch.float32)
    extent = 0.03 * 20 ** uniform[:, 2:] * whole
    low = uniform[:, :2] * (whole - extent)
    owner = torch.arange(count) % BATCH
    size = torch.tensor([image] * BATCH)
    return torch.cat([low, low + extent], dim=1).to(device), owner.to(device), size.to(device)


def milliseconds(work: Callable[[], Any], device: str, *, seconds: float = 1.0, least: int = 5) -> float:
    """Return the median time of a call, over calls of about so many seconds."""
    taken: list[float] = []
    work()
    while len(taken) < least or sum(taken) < seconds:
        started = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return 1000 * statistics.median(taken)


def step(image: tuple[int, int], device: str) -> Callable[[], None]:
    """Return forward and backward of a RetinaNet over one image with ten boxes."""
    torch.manual_seed(0)
    model = RetinaNet(80, backbone="torchvision:resnet50").to(device)
    pixels = torch.rand(1, 3, *image, device=device)
    boxes, _, _ = drawn(10, image, device)
    target = [{"boxes": boxes, "labels": torch.zeros(len(boxes), dtype=torch.int64, device=device)}]

    def run() -> None:
        model.zero_grad()
        torch.stack(list(model(pixels).losses(target).values())).sum().backward()

    return run


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--no-step", action="store_true")
    asked = parser.parse_args()
    rows = []
    for image in IMAGES:
        for count in BOXES:
            given = (*drawn(count, image, asked.device), image)
            for one, other in zip(at_once(*given), by_loop(*given), strict=True):
                assert torch.equal(one[0], other[0])
                assert torch.equal(one[1], other[1])
            once = milliseconds(lambda given=given: at_once(*given), asked.device)  # type: ignore[misc]
            loop = milliseconds(lambda given=given: by_loop(*given), asked.device)  # type: ignore[misc]
            rows.append({"image": image, "boxes": count, "at_once_ms": round(once, 3), "loop_ms": round(loop, 3)})
            print(rows[-1], flush=True)
    found: dict[str, Any] = {
        "versions": {
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "python": platform.python_version(),
        },
        "device": torch.cuda.get_device_name() if asked.device != "cpu" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "batch": BATCH,
        "strides": STRIDES,
        "masks": rows,
    }
    if not asked.no_step:
        image = IMAGES[-1]
        whole = milliseconds(step(image, asked.device), asked.device, least=1 if asked.device == "cpu" else 5)
        boxes, owner, size = drawn(10, image, asked.device)
        mine = milliseconds(lambda: at_once(boxes, owner, size, image), asked.device)
        found["step"] = {
            "image": image,
            "boxes": 10,
            "step_ms": round(whole, 1),
            "masks_ms": round(mine, 3),
            "share": round(mine / whole, 6),
        }
        print(found["step"])
    asked.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
