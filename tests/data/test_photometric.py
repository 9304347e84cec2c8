# SPDX-License-Identifier: Apache-2.0
"""Blur and colour against loops over pixels, `colorsys`, and counts over many keys."""

import colorsys
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor

from tutelage.core.error import UserError
from tutelage.data.augment import build
from tutelage.data.load import load
from tutelage.data.photometric import HSV, SIDES, Blur, MedianBlur, moves_of, to_hsv, to_rgb
from tutelage.functional.noise import keys, uniform


def picture(count: int = 4, height: int = 9, width: int = 7, channels: int = 3, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, height, width), generator=draw).to(torch.uint8)


def sides_of(view: Tensor, probability: float) -> list[int]:
    """The side of the square that each key draws; 0 for no blur."""
    draw = uniform(0, view, (2,))
    return [SIDES[int(3 * u)] if float(p) < probability else 0 for p, u in draw.tolist()]


def looked_up(plane: Tensor, row: int, column: int, *, mirrored: bool) -> float:
    place = []
    for at, size in ((row, plane.shape[0]), (column, plane.shape[1])):
        if mirrored:
            at = abs(at)
            at = at if at < size else 2 * (size - 1) - at
        place.append(min(max(at, 0), size - 1))
    return float(plane[place[0], place[1]])


@pytest.mark.parametrize("kind", [Blur, MedianBlur])
def test_a_blur_is_what_a_loop_over_pixels_finds(kind: Any) -> None:
    images, view = picture(6), keys(1, torch.arange(6))
    found = kind(0.9)(images, view)
    sides = sides_of(view, 0.9)
    assert {*SIDES} <= {*sides}
    for number, side in enumerate(sides):
        for channel in range(3):
            plane = images[number, channel]
            for row in range(9):
                for column in range(7):
                    around = range(-(side // 2), side // 2 + 1)
                    square = [
                        looked_up(plane, row + y, column + x, mirrored=kind is Blur) for y in around for x in around
                    ]
                    expected = sum(square) / len(square) if kind is Blur else median(square)
                    assert abs(float(found[number, channel, row, column]) - expected) <= 0.5


def test_colours_are_those_of_colorsys() -> None:
    pixels = torch.cat([picture(1, 16, 16), torch.zeros(1, 3, 16, 16).to(torch.uint8)]).float()
    hue, saturation, value = to_hsv(pixels)
    for number in range(2):
        for row in range(16):
            for column in range(16):
                expected = colorsys.rgb_to_hsv(*(pixels[number, :, row, column].double() / 255).tolist())
                given = [float(one[number, row, column]) for one in (hue / 180, saturation / 255, value / 255)]
                assert given == pytest.approx(expected, abs=1e-5)
    assert torch.allclose(to_rgb(hue, saturation, value), pixels, atol=1e-3)


def test_colours_are_moved_as_their_key_says() -> None:
    images, view = picture(8), keys(2, torch.arange(8))
    found = HSV(20, 40, 60)(images, view)
    parts, switches = uniform(0, view, (3,)).double(), uniform(1, view, (3,)) < 0.5
    met = set()
    for number in range(8):
        moves = [
            int((2 * float(u) - 1) * largest) * bool(on)
            for u, largest, on in zip(parts[number], (20, 40, 60), switches[number], strict=True)
        ]
        met |= {place for place, move in enumerate(moves) if move}
        for row in range(9):
            for column in range(7):
                h, s, v = colorsys.rgb_to_hsv(*(images[number, :, row, column].double() / 255).tolist())
                s, v = min(max(s + moves[1] / 255, 0), 1), min(max(v + moves[2] / 255, 0), 1)
                expected = colorsys.hsv_to_rgb((h + moves[0] / 180) % 1, s, v)
                given = found[number, :, row, column].double() / 255
                assert given.tolist() == pytest.approx(expected, abs=0.51 / 255)
    assert met == {0, 1, 2}


def test_nothing_is_done_where_nothing_is_asked() -> None:
    images, view = picture(32), keys(3, torch.arange(32))
    for step in (HSV(0, 0, 0), Blur(0.0), MedianBlur(0.0)):
        assert torch.equal(step(images, view), images)


def test_grey_images_have_a_value_alone() -> None:
    images, view = picture(16, channels=1), keys(3, torch.arange(16))
    assert torch.equal(HSV(5, 200, 0)(images, view), images)
    moved = HSV(0, 0, 30)(images.float() / 255, view) - images / 255
    assert 0.02 < float(moved.abs().amax()) <= 30 / 255 + 1e-6


@pytest.mark.parametrize("step", [Blur(0.1), MedianBlur(0.1)])
def test_as_many_are_blurred_as_the_probability_says(step: Any) -> None:
    images = picture(2000, 6, 6)
    found = step(images, keys(5, torch.arange(2000)))
    share = float((found != images).flatten(1).any(1).float().mean())
    assert abs(share - 0.1) < 0.02  # three deviations


def test_an_image_too_small_to_be_mirrored_repeats_its_edge() -> None:
    images = picture(8, 2, 2)
    assert Blur(1.0)(images, keys(1, torch.arange(8))).shape == images.shape


def test_moves_are_read() -> None:
    assert moves_of(None) is None
    assert moves_of(True) == (5.0, 30.0, 30.0)
    assert moves_of([1, 2, 3]) == (1.0, 2.0, 3.0)
    for wrong in ([1, 2], 5, "hue"):
        with pytest.raises(UserError, match=r"data\.augment\.hsv is \[hue, saturation, value\], the largest moves"):
            moves_of(wrong)
    with pytest.raises(UserError, match=r"augment\.hsv takes the largest moves"):
        moves_of([1, -2, 3])
    for kind, word in ((Blur, "blur"), (MedianBlur, "median_blur")):
        with pytest.raises(UserError, match=rf"augment\.{word} is a probability in \[0, 1\], not 2"):
            kind(2)


@pytest.mark.parametrize("given", [[5, 60, 70], {"hue": 5, "saturation": 60, "value": 70}])
def test_moves_are_said_alike_in_every_task(given: Any) -> None:
    found = build([{"hsv": given}], train=True)
    assert found is not None
    assert found.steps == (HSV(5, 60, 70),)
    with pytest.raises(UserError, match=r"data\.augment\.hsv is \[hue, saturation, value\]"):
        build([{"hsv": [5, 60]}], train=True)


SOURCES: dict[str, dict[str, Any]] = {
    "pose": {"source": "figures", "pose": {"number": 4, "held_out": 2}},
    "segmentation": {"source": "scenes", "segmentation": {"scenes": [4, 2], "side": 48}},
}


@pytest.mark.parametrize("task", SOURCES)
@pytest.mark.parametrize("word", [{"hsv": [5, 60, 60]}, {"blur": 1.0}, {"median_blur": 1.0}, ["hsv", "blur"]])
def test_pixels_change_and_their_truth_does_not(task: str, word: Any) -> None:
    spec = {**SOURCES[task], "batch_size": 4}
    plain = next(load({**spec, "augment": "none"}, task=task, seed=1).train.epoch())
    batch, again = (next(load({**spec, "augment": word}, task=task, seed=1).train.epoch()) for _ in range(2))
    assert torch.equal(batch.inputs, again.inputs)
    assert torch.equal(batch.target, plain.target)
    assert not torch.equal(batch.inputs, plain.inputs)
    if word == {"blur": 1.0}:
        assert float(batch.inputs.diff(dim=3).abs().mean()) < 0.8 * float(plain.inputs.diff(dim=3).abs().mean())


@pytest.mark.parametrize("task", SOURCES)
def test_wrong_words_are_named(task: str) -> None:
    for word, said in (({"blur": 3}, r"augment\.blur"), ({"hsv": 3}, r"augment\.hsv"), ({"blurr": 1}, "mean blur?")):
        with pytest.raises(UserError, match=said):
            load({**SOURCES[task], "augment": word}, task=task)
