# SPDX-License-Identifier: Apache-2.0
"""A video of a few frames, each of one colour."""

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

SIDES = (64, 48)  # width and height
COLOURS = ((200, 40, 40), (40, 200, 40), (40, 40, 200), (120, 120, 120), (220, 220, 40))


def filmed(path: Path, count: int = 5) -> Path:
    """Write a video and return its path."""
    av: Any = import_module("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = *SIDES, "yuv420p"
        for number in range(count):
            pixels = np.full((SIDES[1], SIDES[0], 3), COLOURS[number], np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path
