# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from film import COLOURS, SIDES, filmed
from tutelage.core.error import UserError
from tutelage.data.folder import read_image, size_of
from tutelage.data.video import decoded, frames_of, is_frame, is_video, read_frame


def near(picture: object, number: int) -> bool:
    return bool(np.abs(np.asarray(picture).reshape(-1, 3).astype(float) - COLOURS[number]).max() < 40)


def test_frames_are_paths_below_their_video(tmp_path: Path) -> None:
    video = filmed(tmp_path / "walk.mp4")
    paths = frames_of(video)
    assert paths == [video / f"walk-00000{number}.png" for number in range(5)]
    assert all(is_frame(path) and not is_video(path) for path in paths)
    assert is_video(video)
    assert not is_frame(tmp_path / "a.png")
    assert all(near(frame, number) for number, frame in enumerate(decoded(video)))


def test_a_frame_is_read_like_an_image_in_any_order(tmp_path: Path) -> None:
    paths = frames_of(filmed(tmp_path / "walk.mp4"))
    for number in (0, 1, 1, 4, 2, 3, 0):
        image = read_image(paths[number], 3)
        assert image.shape == (3, SIDES[1], SIDES[0])
        assert near(image.permute(1, 2, 0).numpy(), number)
    assert read_image(paths[3], 1).shape == (1, SIDES[1], SIDES[0])
    assert size_of(paths[0]) == size_of(paths[4]) == (SIDES[1], SIDES[0])
    with pytest.raises(OSError, match="the video ends after 5 frames"):
        read_frame(paths[0].with_name("walk-000007.png"))
    assert near(read_frame(paths[4]), 4)  # the last one is still there


def test_a_video_that_is_replaced_is_read_anew(tmp_path: Path) -> None:
    first = frames_of(filmed(tmp_path / "a.mp4"))[0]
    assert near(read_frame(first), 0)
    kept = filmed(tmp_path / "b.mp4", 2)
    kept.replace(tmp_path / "a.mp4")
    assert len(frames_of(tmp_path / "a.mp4")) == 2
    assert near(read_frame(first), 0)


def test_what_cannot_be_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(b"no video")
    with pytest.raises(UserError, match=r"damaged\.mp4 cannot be read as a video: "):
        frames_of(damaged)
    with pytest.raises(OSError, match="cannot be read as a video"):
        read_image(damaged / "damaged-000000.png", 3)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(
        UserError, match=r"reading videos needs PyAV: pip install 'tutelage\[video\]', or give a folder"
    ):
        frames_of(damaged)


def test_pytorch_is_not_imported() -> None:
    code = "import sys; import tutelage.data.video; sys.exit('torch' in sys.modules or 'av' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
