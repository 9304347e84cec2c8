# SPDX-License-Identifier: Apache-2.0
"""Networks, terms and a batch as small as the core's tests need them."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tutelage.core import Batch, Card, Facts, Reads, Signals, Tap, Term
from tutelage.core.bridge import bridge

CLASSES = 5
BLANK = Card(
    name="Blank",
    title="None",
    authors="None",
    year=2020,
    venue="None",
    paper="arxiv:0000.00000",
    claims="None",
    reads={"student": ("logits",), "teacher": ("logits",)},
)


class Small(nn.Module):
    """A convolution, a batch norm that an in-place ReLU overwrites, a head."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.act = nn.ReLU(inplace=True)
        self.mix = nn.Conv2d(width, width, 1)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(width, CLASSES)

    def body(self, images: Tensor) -> Tensor:
        mixed: Tensor = self.mix(self.act(self.bn(self.conv(images))))
        return mixed

    def forward(self, images: Tensor) -> Any:
        return self.head(self.drop(self.body(images).mean((2, 3))))


class Checkpointed(Small):
    """The same with its body recomputed in backward."""

    def body(self, images: Tensor) -> Tensor:
        found: Tensor = checkpoint(super().body, images, use_reentrant=False)
        return found


class Twice(nn.Module):
    """A layer that runs twice in a forward, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.again = self.layer
        self.head = nn.Linear(3, CLASSES)

    def forward(self, images: Tensor) -> Any:
        return self.head(self.again(self.layer(images.mean((2, 3)))))


class Distance(Term):
    """Mean squared difference of two taps of one shape."""

    def __init__(self, tap: Any = "logits", teacher_tap: Any = None) -> None:
        super().__init__()
        self.student_tap = Tap.parse(tap)
        self.teacher_tap = Tap.parse(tap if teacher_tap is None else teacher_tap)

    @property
    def reads(self) -> Reads:
        return Reads((self.student_tap,), (self.teacher_tap,))

    def forward(self, student: Signals, teacher: Signals | None, batch: Batch, *draws: Any) -> Any:
        assert teacher is not None
        difference = student[self.student_tap.name] - teacher[self.teacher_tap.name]
        return difference.flatten(1).square().mean(1).mean()


class Bridged(Distance):
    """The same across widths."""

    def build(self, student: Signals, teacher: Signals | None, facts: Facts) -> None:
        assert teacher is not None
        self.bridge = bridge(student[self.student_tap.name], teacher[self.teacher_tap.name])

    def forward(self, student: Signals, teacher: Signals | None, batch: Batch, *draws: Any) -> Any:
        assert teacher is not None
        return (self.bridge(student[self.student_tap.name]) - teacher[self.teacher_tap.name]).square().mean()


def images(rows: int = 4, seed: int = 0) -> Tensor:
    return torch.rand(rows, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def small_batch(rows: int = 4, **more: Any) -> Batch:
    """Labels 0, 1, unlabelled, 2, 3, 4, unlabelled, ..."""
    target = torch.tensor([0, 1, -1, 2, 3, 4, -1, 0])[:rows]
    return Batch.of(images(rows), target, **more)
