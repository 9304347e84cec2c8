# SPDX-License-Identifier: Apache-2.0
"""Small image files of known content."""

from pathlib import Path

import numpy as np
from PIL import Image


def picture(path: Path, seed: int, size: tuple[int, int] = (8, 8)) -> Path:
    """Write an image of noise; width and height as Pillow counts them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def tree(root: Path, counts: dict[str, int], seed: int = 0, ending: str = "png") -> Path:
    """Write so many images into each folder."""
    for number, (folder, count) in enumerate(counts.items()):
        for place in range(count):
            picture(root / folder / f"{place}.{ending}", seed + 1000 * number + place)
    return root
