# SPDX-License-Identifier: Apache-2.0
"""A folder of photographs: real handwriting at the sizes that cameras leave, each class with a look of its own."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

CLASSES = ("owl", "cat", "dog")


def photos(
    root: Path, count: int = 8, *, classes: Sequence[str] = CLASSES, sides: tuple[int, int] = (20, 40), skip: int = 0
) -> Path:
    """Write a folder a class with so many images, PNG and JPEG in turn.

    Args:
        root: the folder above.
        count: images a class.
        classes: names of the folders; each holds one digit.
        sides: smallest and largest width and height.
        skip: images of each digit that are left out.
    """
    found = load_digits()
    draw = np.random.default_rng(skip)
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for place, index in enumerate(np.flatnonzero(found.target == label)[skip : skip + count]):
            pixels = (found.images[index] * 15.9).astype(np.uint8)
            width, height = draw.integers(*sides, size=2).tolist()
            image = Image.fromarray(pixels).convert("RGB").resize((width, height))
            image.save(root / name / f"{place}.{'png' if place % 2 else 'jpg'}")
    return root
