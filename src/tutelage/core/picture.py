# SPDX-License-Identifier: Apache-2.0
"""What a dense task says of one image: as data, and drawn."""

from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from tutelage.core.batch import Batch
from tutelage.core.task import Task


@runtime_checkable
class Picture(Protocol):
    """An answer, or the truth, for one image, in the pixels of the image as it lies on disk."""

    def plain(self) -> dict[str, Any]:
        """Return it as plain data, for JSON."""

    def draw(self, image: Tensor) -> Tensor:
        """Return a copy of an image `[3, H, W]` uint8 with the answer drawn on it, uint8."""


@runtime_checkable
class Depicting(Task, Protocol):
    """A task whose answers can be looked at."""

    def pictures(self, output: Any, batch: Batch) -> list[Picture]:
        """Return one answer an image."""

    def truths(self, batch: Batch) -> list[Picture]:
        """Return what the data says of each image, to be held beside the answers."""
