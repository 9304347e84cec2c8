# SPDX-License-Identifier: Apache-2.0
"""Changes of pixels that leave their places alone: blur and colour, a function of the images and of one key a sample.

As in the augmentation of YOLOX (Ge et al., 2021) and RTMPose (Jiang et al., 2023).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional as F

from tutelage.core.error import UserError
from tutelage.functional.noise import uniform

SIDES = (3, 5, 7)  # pixels of the square that a blur looks at
HUE, DEPTH = 180.0, 255.0  # a full turn of the hue, and the largest saturation and value, as 8 bits hold them


@final
@dataclass(frozen=True)
class Blur:
    """Take the mean of a square of 3, 5 or 7 pixels a side, with a probability; edges are mirrored."""

    probability: float = 0.1

    def __post_init__(self) -> None:
        _require_probability(self.probability, "blur")

    def __call__(self, images: Tensor, view: Tensor) -> Tensor:
        """Return the images, some blurred."""
        return _in_squares(images, view, self.probability, "reflect", lambda squares: squares.mean(1))


@final
@dataclass(frozen=True)
class MedianBlur:
    """Take the median of a square of 3, 5 or 7 pixels a side, with a probability; edges are repeated."""

    probability: float = 0.1

    def __post_init__(self) -> None:
        _require_probability(self.probability, "median_blur")

    def __call__(self, images: Tensor, view: Tensor) -> Tensor:
        """Return the images, some blurred."""
        return _in_squares(images, view, self.probability, "replicate", lambda squares: squares.median(1).values)


@final
@dataclass(frozen=True)
class HSV:
    """Add to hue, saturation and value, to each of the three half the time.

    What is added is even between the largest moves down and up, and cut to a whole number. Images of one channel have
    a value alone.

    Args:
        hue: largest move, of 180 that are a full turn.
        saturation: of 255.
        value: of 255.

    Raises:
        UserError: if a move is negative.
    """

    hue: float = 5.0
    saturation: float = 30.0
    value: float = 30.0

    def __post_init__(self) -> None:
        moves = (self.hue, self.saturation, self.value)
        if any(not isinstance(move, (int, float)) or isinstance(move, bool) or not move >= 0 for move in moves):
            raise UserError(f"augment.hsv takes the largest moves of hue, saturation and value, >= 0, not {moves}")

    def __call__(self, images: Tensor, view: Tensor) -> Tensor:
        """Return the images in other colours."""
        largest = torch.tensor([self.hue, self.saturation, self.value])
        moves = ((2 * uniform(0, view, (3,)) - 1) * largest).trunc() * (uniform(1, view, (3,)) < 0.5)
        hue_move, saturation_move, value_move = (move[:, None, None] for move in moves.T)
        pixels = _pixels(images)
        if images.shape[1] == 1:
            return _as(images, (pixels + value_move[:, None]).clamp(0, DEPTH))
        hue, saturation, value = to_hsv(pixels)
        hue = (hue + hue_move) % HUE
        saturation, value = (saturation + saturation_move).clamp(0, DEPTH), (value + value_move).clamp(0, DEPTH)
        return _as(images, to_rgb(hue, saturation, value))


def moves_of(given: Any) -> tuple[float, float, float] | None:
    """Read a section's `hsv`: [hue, saturation, value], the largest moves; true is the usual ones, null none.

    Raises:
        UserError: if it is none of these.

    Example:
        >>> moves_of([5, 30, 30]) == moves_of(True)
        True
    """
    if given is None or given is False:
        return None
    found = (HSV.hue, HSV.saturation, HSV.value) if given is True else given
    if not isinstance(found, Sequence) or isinstance(found, str) or len(found) != 3:
        raise UserError(f"data.augment.hsv is [hue, saturation, value], the largest moves, not {given!r}")
    moves = HSV(*found)
    return float(moves.hue), float(moves.saturation), float(moves.value)


def to_hsv(pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return hue in [0, 180), saturation and value in [0, 255], each `[B, H, W]`, of red, green and blue.

    Args:
        pixels: `[B, 3, H, W]` in [0, 255].

    Example:
        >>> [one.item() for one in to_hsv(torch.tensor([0.0, 100.0, 200.0]).view(1, 3, 1, 1))]
        [105.0, 255.0, 200.0]
    """
    red, green, blue = pixels.unbind(1)
    value, low = pixels.amax(1), pixels.amin(1)
    span = value - low
    room = torch.where(span > 0, span, 1.0)
    sixth = torch.where(
        value == red,
        ((green - blue) / room) % 6,
        torch.where(value == green, (blue - red) / room + 2, (red - green) / room + 4),
    )
    return sixth * (HUE / 6), DEPTH * span / torch.where(value > 0, value, 1.0), value


def to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """Return `[B, 3, H, W]` in [0, 255], of what `to_hsv` returns."""
    place = (torch.tensor([5.0, 3.0, 1.0])[:, None, None] + hue[:, None] * (6 / HUE)) % 6
    dark = torch.minimum(place, 4 - place).clamp(0, 1)
    return value[:, None] * (1 - saturation[:, None] / DEPTH * dark)


def _in_squares(
    images: Tensor, view: Tensor, probability: float, edges: str, made: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return images of which some have at each pixel what is made of `[N, side * side, H * W]`, the squares around."""
    draw = uniform(0, view, (2,))
    which = (draw[:, 1] * len(SIDES)).long().where(draw[:, 0] < probability, -1)
    changed = images.clone()
    for number, side in enumerate(SIDES):
        rows = (which == number).nonzero().flatten()
        if not len(rows):
            continue
        part, around = _pixels(images[rows]), side // 2
        mode = edges if min(images.shape[-2:]) > around else "replicate"  # too small to be mirrored
        padded = F.pad(part, (around,) * 4, mode=mode)
        squares = F.unfold(padded.flatten(0, 1)[:, None], side)
        changed[rows] = _as(images, made(squares).view(part.shape))
    return changed


def _pixels(images: Tensor) -> Tensor:
    """Return pixels in [0, 255], float."""
    return images.float() if images.dtype == torch.uint8 else images * DEPTH


def _as(images: Tensor, found: Tensor) -> Tensor:
    """Return pixels in [0, 255] as the images have them: uint8, or float in [0, 1]."""
    return found.round().clamp(0, DEPTH).to(torch.uint8) if images.dtype == torch.uint8 else found / DEPTH


def _require_probability(given: float, word: str) -> None:
    if not isinstance(given, (int, float)) or isinstance(given, bool) or not 0 <= given <= 1:
        raise UserError(f"augment.{word} is a probability in [0, 1], not {given!r}")
