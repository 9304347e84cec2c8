# SPDX-License-Identifier: Apache-2.0
"""Boxes and masks of images as they were annotated, and what is wrong with some of them."""

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch
from torch import Tensor

from tutelage.core.error import UserError

#: One thing's shape: polygons [[x, y, ...], ...] or a run-length code of COCO (`size` and `counts`).
Shape = Sequence[Sequence[float]] | Mapping[str, Any]
TOLERANCE = 1.0  # pixels by which a box may reach over an edge without a word: rounding


@final
@dataclass(frozen=True)
class Annotated:
    """What is known of one image, in its own pixels.

    Args:
        picture: its file, or `[3, H, W]` uint8.
        size: (height, width).
        boxes: `[n, 4]` x1, y1, x2, y2.
        labels: `[n]` int64.
        crowd: `[n]` bool: regions with many things of a class, which count as neither right nor wrong.
        area: `[n]` in square pixels, by which things are small or large.
        shapes: one a box, or none at all; a box of which no shape is known has None.
        name: what to call it in an error.
    """

    picture: Path | Tensor
    size: tuple[int, int]
    boxes: Tensor
    labels: Tensor
    crowd: Tensor
    area: Tensor
    shapes: tuple[Shape | None, ...] = ()
    name: str = ""

    @property
    def masks(self) -> Tensor:
        """`[n, H, W]` bool; the box itself where no shape is known."""
        masks = torch.zeros(len(self.boxes), *self.size, dtype=torch.bool)
        for number, code in enumerate(self.codes):
            masks[number] = decoded(code)
        return masks

    @property
    def codes(self) -> list[dict[str, Any]]:
        """One run-length code a box."""
        shapes = self.shapes or (None,) * len(self.boxes)
        return [
            encoded(shape if shape is not None else [_corners(box)], self.size)
            for shape, box in zip(shapes, self.boxes.tolist(), strict=True)
        ]


def _corners(box: Sequence[float]) -> list[float]:
    left, top, right, bottom = box
    return [left, top, right, top, right, bottom, left, bottom]


def encoded(shape: Shape | Tensor, size: tuple[int, int]) -> dict[str, Any]:
    """Return the run-length code of polygons, of a code that is not packed yet, or of a mask `[H, W]`."""
    from pycocotools import mask

    if isinstance(shape, Tensor):
        return dict(mask.encode(np.asfortranarray(shape.numpy().astype(np.uint8))))
    if isinstance(shape, Mapping):
        plain = dict(shape)
        return dict(mask.frPyObjects(plain, *size)) if isinstance(plain["counts"], list) else plain
    return dict(mask.merge(mask.frPyObjects([list(map(float, part)) for part in shape], *size)))


def decoded(code: Mapping[str, Any]) -> Tensor:
    """Return the mask `[H, W]` bool of a run-length code.

    Example:
        >>> decoded(encoded([[0, 0, 2, 0, 2, 1, 0, 1]], (2, 3)))
        tensor([[ True,  True, False],
                [False, False, False]])
    """
    from pycocotools import mask

    with warnings.catch_warnings():  # pycocotools speaks to numpy as numpy 1 wanted it
        warnings.filterwarnings("ignore", "__array__", DeprecationWarning)
        return torch.from_numpy(mask.decode(dict(code))).bool()


@final
@dataclass
class Troubles:
    """What is wrong with annotations, counted by kind; the first of each kind is named.

    Args:
        source: what is read, for the summary.
    """

    source: str
    kinds: dict[str, tuple[int, str]] = field(default_factory=dict)

    def note(self, kind: str, where: str) -> None:
        """Count one."""
        count, first = self.kinds.get(kind, (0, where))
        self.kinds[kind] = (count + 1, first)

    @property
    def summary(self) -> str:
        """One line on all of them."""
        said = [f"{count} {kind} (first {first})" for kind, (count, first) in self.kinds.items()]
        return f"{self.source}: {'; '.join(said)}"

    def settle(self, on_error: Literal["raise", "skip"]) -> None:
        """Say what was wrong, once.

        Raises:
            UserError: with the summary, if there is one and nothing may be skipped.
        """
        if not self.kinds:
            return
        if on_error == "raise":
            raise UserError(f"{self.summary}; data.on_error: skip leaves such annotations out")
        logging.getLogger(__name__).warning("%s: left out", self.summary)


@final
@dataclass(frozen=True)
class Table:
    """Annotated images, and the names of their classes.

    Args:
        images: in order.
        class_names: by index.
    """

    images: tuple[Annotated, ...]
    class_names: tuple[str, ...]

    def __iter__(self) -> Iterator[Annotated]:
        return iter(self.images)

    def __len__(self) -> int:
        return len(self.images)


def sound(
    boxes: Tensor, size: tuple[int, int], where: Sequence[str], troubles: Troubles, *, whole: bool = True
) -> tuple[Tensor, Tensor]:
    """Return boxes cut at the edges of their image, and which of them can be used.

    Args:
        boxes: `[n, 4]`.
        size: (height, width).
        where: what to call each box.
        troubles: told of boxes outside the image, beyond its edges, without area, or that are no numbers.
        whole: tell of boxes that reach over an edge; they are cut all the same.

    Example:
        >>> found = Troubles("it")
        >>> sound(torch.tensor([[0.0, 0.0, 2.0, 2.0], [1.0, 1.0, 1.0, 2.0]]), (2, 2), ["a", "b"], found)[1]
        tensor([ True, False])
        >>> found.summary
        'it: 1 boxes without area (first b)'
    """
    edge = torch.tensor([size[1], size[0]] * 2, dtype=boxes.dtype)
    finite = boxes.isfinite().all(dim=1)
    empty = finite & (boxes[:, 2:] <= boxes[:, :2]).any(dim=1)
    outside = finite & ~empty & ((boxes[:, 2:] <= 0).any(dim=1) | (boxes[:, :2] >= edge[:2]).any(dim=1))
    over = finite & ~empty & ~outside & ((boxes < -TOLERANCE) | (boxes > edge + TOLERANCE)).any(dim=1)
    kinds = [("boxes that are no numbers", ~finite), ("boxes without area", empty)]
    kinds += [("boxes outside their image", outside), *([("boxes over an edge", over)] if whole else [])]
    for kind, which in kinds:
        for number in which.nonzero().flatten().tolist():
            troubles.note(kind, where[number])
    return boxes.clamp(min=0).minimum(edge), finite & ~empty & ~outside
