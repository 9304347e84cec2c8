# SPDX-License-Identifier: Apache-2.0
import base64
import io
from pathlib import Path

import torch
from PIL import Image

from tutelage.report.gallery import WIDTH
from tutelage.report.page import Page
from tutelage.run.pictures import COLUMNS, gallery, save, take_over, three


def drawn(folder: Path, name: str, value: int, width: int = 12) -> None:
    save(torch.full((3, 8, width), value, dtype=torch.uint8), folder / "pictures" / name)


def test_a_row_an_image_and_a_column_only_where_there_are_pictures(tmp_path: Path) -> None:
    for number in (0, 1):
        drawn(tmp_path, f"{number}-truth.png", 0)
        drawn(tmp_path, f"{number}-after.png", 255)
    drawn(tmp_path, "0-before.png", 9)
    found = gallery(tmp_path)
    assert found.heads == ("truth", "student before", "student after")
    assert list(found.names) == ["image 0", "image 1"]
    assert found.rows[1][1] is None
    assert not gallery(tmp_path / "none").rows


def test_a_page_holds_its_pictures_itself(tmp_path: Path) -> None:
    drawn(tmp_path, "0-truth.png", 77, width=2 * WIDTH)
    html = Page("run", gallery=gallery(tmp_path)).html()
    address = html.partition('src="data:image/jpeg;base64,')[2].partition('"')[0]
    with Image.open(io.BytesIO(base64.b64decode(address))) as picture:
        assert picture.size == (WIDTH, 4)
        assert abs(picture.getpixel((5, 1))[0] - 77) < 3  # type: ignore[index]
    assert 'alt="image 0, truth"' in html
    assert "<img" not in Page("run").html()


def test_a_staged_run_shows_what_was_before_its_first_and_after_its_last_stage(tmp_path: Path) -> None:
    for stage, value in (("one", 10), ("two", 20)):
        for what in COLUMNS:
            drawn(tmp_path / stage, f"0-{what}.png", value)
    take_over(tmp_path, tmp_path / "one", tmp_path / "two")
    pixels = {}
    for what in COLUMNS:
        with Image.open(tmp_path / "pictures" / f"0-{what}.png") as picture:
            pixels[what] = picture.getpixel((0, 0))[0]  # type: ignore[index]
    assert pixels == {"truth": 10, "teacher": 10, "before": 10, "after": 20}


def test_images_of_one_channel_and_in_unit_floats_can_be_drawn_on() -> None:
    assert three(torch.ones(1, 2, 2)).tolist() == [[[255, 255]] * 2] * 3
    assert three(torch.full((3, 1, 1), 7, dtype=torch.uint8)).flatten().tolist() == [7, 7, 7]
