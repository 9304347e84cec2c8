# SPDX-License-Identifier: Apache-2.0
"""Videos as folders of their frames: frame 12 of `clip.mp4` is the path `clip.mp4/clip-000012.png`, counted from 0.

Frames are read with PyAV, which is imported on first use. PyTorch is not imported.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from tutelage.core.error import UserError

#: Endings that are read as videos.
VIDEOS = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm"})


def is_video(path: Path) -> bool:
    """Whether a path is a video file."""
    return path.suffix.lower() in VIDEOS and path.is_file()


def is_frame(path: Path) -> bool:
    """Whether a path is a frame of a video."""
    return is_video(path.parent)


def frames_of(video: Path) -> list[Path]:
    """Return the paths of all frames of a video, in order.

    Raises:
        UserError: if it cannot be read, or PyAV is missing.
    """
    with _opened(video) as container:
        count = sum(packet.size > 0 for packet in container.demux(container.streams.video[0]))
    if not count:
        raise UserError(f"{video} holds no frames")
    return [video / f"{video.stem}-{number:06d}.png" for number in range(count)]


def decoded(video: Path) -> Iterator[NDArray[np.uint8]]:
    """Yield the frames of a video, `[H, W, 3]`, red first.

    Raises:
        UserError: if it cannot be read, or PyAV is missing.
    """
    with _opened(video) as container:
        for frame in container.decode(video=0):
            yield frame.to_ndarray(format="rgb24")


def read_frame(path: Path) -> NDArray[np.uint8]:
    """Return a frame `[H, W, 3]`, red first; the next one of the same video is found without a search.

    Raises:
        OSError: if the video ends before it, or cannot be read.
    """
    video = path.parent
    number = int(path.stem.rpartition("-")[2])
    try:
        return _reader(video, video.stat().st_mtime_ns).read(number)
    except UserError as error:
        raise OSError(str(error)) from error


def size_of_frame(path: Path) -> tuple[int, int]:
    """Return (height, width) of a frame without decoding it.

    Raises:
        OSError: if the video cannot be read.
    """
    try:
        return _size(path.parent, path.parent.stat().st_mtime_ns)
    except UserError as error:
        raise OSError(str(error)) from error


@final
class _Reader:
    """The frames of one video, cheap in their order: it remembers the last one and goes on from there."""

    def __init__(self, video: Path) -> None:
        self.video, self.number, self.frames = video, -1, decoded(video)
        self.frame: NDArray[np.uint8] | None = None

    def read(self, number: int) -> NDArray[np.uint8]:
        """Return a frame by its number."""
        if number < self.number:  # back to the beginning
            self.number, self.frames = -1, decoded(self.video)
        while self.number < number:
            found = next(self.frames, None)
            if found is None:
                raise OSError(f"the video ends after {self.number + 1} frames")
            self.frame, self.number = found, self.number + 1
        assert self.frame is not None
        return self.frame


@lru_cache(maxsize=1)
def _reader(video: Path, changed: int) -> _Reader:
    return _Reader(video)


@lru_cache(maxsize=16)
def _size(video: Path, changed: int) -> tuple[int, int]:
    with _opened(video) as container:
        stream = container.streams.video[0]
        return stream.height, stream.width


@contextmanager
def _opened(video: Path) -> Iterator[Any]:
    """Open a video that has pictures.

    Raises:
        UserError: if it cannot be read, or PyAV is missing.
    """
    try:
        av: Any = import_module("av")
    except ImportError:
        raise UserError(
            f"{video}: reading videos needs PyAV: pip install 'tutelage[video]', or give a folder of its frames"
        ) from None
    try:
        with av.open(str(video)) as container:
            if not container.streams.video:
                raise UserError(f"{video} has no pictures, only sound")
            yield container
    except av.FFmpegError as error:
        raise UserError(f"{video} cannot be read as a video: {error.strerror or error}") from error
