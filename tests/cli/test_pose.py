# SPDX-License-Identifier: Apache-2.0
"""Pose by the command line: videos, and people who are not as they should be."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.test_pose import person, written
from film import COLOURS, SIDES, filmed
from tiny_recipe import tutelage
from tutelage.run.distill import distill
from tutelage.run.recipe import Recipe, parse

CAPSYS = pytest.CaptureFixture[str]


def recipe(root: Path, **data: Any) -> Recipe:
    return parse(
        {
            "task": "pose",
            "student": {"model": "tutelage:rtmpose_t", "widen": 0.125, "stages": 3, "hidden": 32, "s": 16},
            "data": {"source": f"coco:{root}", "image_size": [64, 48], "batch_size": 2, **data},
            "train": {"steps": 2, "save_every": None},
        }
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of two steps, and the set it saw."""
    home = tmp_path_factory.mktemp("pose")
    written(home / "set", [person(1, 1), person(2, 2)])
    written(home / "set", [person(3, 1), person(4, 2)], "person_keypoints_val.json")
    distill(recipe(home / "set"), home / "run", quiet=True)
    return home


def test_a_video_is_looked_at_frame_by_frame(capsys: CAPSYS, run: Path) -> None:
    filmed(Path("walk.mp4"), 3)
    told = tutelage(capsys, "predict", run / "run", "walk.mp4", "--out", "drawn", "--openpose", "--json")
    assert (told.code, told.err) == (0, [])
    names = [f"walk.mp4/walk-{number:06d}.png" for number in range(3)]
    assert [row["image"] for row in told.document["images"]] == names
    assert json.loads(Path("drawn/answers.json").read_text()) == told.document["images"]
    rows = json.loads(Path("drawn/coco.json").read_text())
    assert [row["image_id"] for row in rows] == [Path(name).stem for name in names]
    assert all(len(row["keypoints"]) == 3 * 18 for row in rows), "OpenPose's order has a neck"
    for number, name in enumerate(names):
        drawing = told.document["drawings"][name]
        assert drawing == f"drawn/{Path(name).stem}.png"
        with Image.open(drawing) as picture:
            assert picture.size == SIDES
            assert np.abs(np.asarray(picture)[0, 0].astype(float) - COLOURS[number]).max() < 40


def test_people_of_a_video_are_looked_for_in_the_boxes_of_a_detector(capsys: CAPSYS, run: Path) -> None:
    filmed(Path("walk.mp4"), 2)
    found = [{"image": "walk.mp4/walk-000001.png", "boxes": [[5, 5, 30, 40], [30, 5, 60, 40]], "scores": [0.9, 0.8]}]
    Path("boxes.json").write_text(json.dumps(found))
    told = tutelage(capsys, "predict", run / "run", "walk.mp4", "--boxes", "boxes.json", "--json")
    assert [len(row["people"]) for row in told.document["images"]] == [1, 2]


def test_a_video_without_its_reader_is_one_line(capsys: CAPSYS, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filmed(Path("walk.mp4"), 2)
    Path("damaged.mp4").write_bytes(b"no video")
    told = tutelage(capsys, "predict", run / "run", "damaged.mp4")
    assert (told.code, len(told.err)) == (2, 1)
    assert told.err[0].startswith("tutelage: damaged.mp4 cannot be read as a video: ")
    monkeypatch.setitem(sys.modules, "av", None)
    told = tutelage(capsys, "predict", run / "run", "walk.mp4")
    said = "walk.mp4: reading videos needs PyAV: pip install 'tutelage[video]', or give a folder of its frames"
    assert (told.code, told.err) == (2, [f"tutelage: {said}"])
