# SPDX-License-Identifier: Apache-2.0
"""Scenes of real handwritten digits, with boxes, instance masks and class maps: nothing to download.

Digits of scikit-learn's set are enlarged, coloured and laid over one another on an uneven ground. Training and
held-out scenes are made of other people's digits: those of the two splits of `tutelage.data.digits`.
"""

from dataclasses import dataclass
from functools import cache
from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F

from tutelage.core.error import UserError
from tutelage.data.digits import digits
from tutelage.data.samples import Arrays, class_words
from tutelage.functional.noise import mix, uniform

#: Names of the things in a scene; a class map has one more, the ground, as its class 0.
THINGS = class_words(range(10))
SMALLEST = 32  # pixels a side below which digits cannot be told apart
MOST = 5  # digits of a scene
EMPTY = 0.04  # share of scenes without any
SIDES = (0.16, 0.5)  # of a digit, as shares of the scene's shorter side
INK = 0.4  # opacity above which a pixel belongs to a digit
CONTRAST = 0.35  # least distance of ink and ground, in units of the whole range
VISIBLE = 0.5  # share of a digit that must be seen for it to count
SCENE, GROUND, GRAIN, DIGIT = 1, 2, 3, 4  # salts: what a random choice is about


@final
@dataclass(frozen=True)
class Scene:
    """One scene and all that is known of it.

    Args:
        image: `[3, H, W]` uint8.
        boxes: `[n, 4]` x1, y1, x2, y2 in pixels, tight around what is seen of each digit.
        labels: `[n]` int64, the digits.
        masks: `[n, H, W]` bool, what is seen of each digit; they do not overlap.
        class_map: `[H, W]` int64, 0 for the ground and 1 + digit.
    """

    image: Tensor
    boxes: Tensor
    labels: Tensor
    masks: Tensor
    class_map: Tensor


def scenes(number: int, size: int | tuple[int, int] = 96, seed: int = 0, *, held_out: bool = False) -> list[Scene]:
    """Return scenes; each is a function of seed, size and its place in the list.

    Args:
        number: how many.
        size: pixels of a square, or (height, width).
        seed: of what is drawn.
        held_out: of the digits of the validation split.

    Raises:
        UserError: if the scenes are too small, or fewer than one is asked for.

    Example:
        >>> one = scenes(4, 64)[1]
        >>> one.image.shape, one.boxes.shape[1], bool((one.masks.sum(0) == (one.class_map > 0)).all())
        (torch.Size([3, 64, 64]), 4, True)
    """
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < SMALLEST:
        raise UserError(f"scenes: size {height} x {width} is too small, a side has at least {SMALLEST} pixels")
    if number < 1:
        raise UserError(f"scenes: number counts scenes, at least 1, not {number}")
    salt = mix(seed, SCENE, int(held_out))
    return [_scene(mix(salt, index), (height, width), _glyphs(held_out)) for index in range(number)]


@cache
def _glyphs(held_out: bool) -> Arrays:
    return digits()[int(held_out)]


def _draw(key: int, *shape: int) -> Tensor:
    return uniform(key, torch.zeros(1, dtype=torch.long), shape)[0]


def _scene(key: int, size: tuple[int, int], glyphs: Arrays) -> Scene:
    image = _ground(mix(key, GROUND), size)
    count, empty = _draw(key, 2).tolist()
    owner = torch.full(size, -1)  # which digit is on top
    whole, labels = [], []
    for number in range(0 if empty < EMPTY else 1 + int(count * MOST)):
        draw = _draw(mix(key, DIGIT, number), 8).tolist()
        which = int(draw[0] * len(glyphs))
        opacity, place = _laid(glyphs.read(which), draw[1:4], size)
        image[:, *place] += opacity * (_ink(image[:, *place], draw[4:]) - image[:, *place])
        over = opacity[0] > INK
        owner[place] = owner[place].where(~over, number)
        whole.append(int(over.sum()))
        labels.append(int(glyphs.targets[which]))
    image += 0.05 * (_draw(mix(key, GRAIN), 3, *size) - 0.5)
    masks = owner == torch.arange(len(labels))[:, None, None]
    seen = masks.flatten(1).sum(1) >= VISIBLE * torch.tensor(whole)
    masks, label = masks[seen], torch.tensor(labels, dtype=torch.long)[seen]
    return Scene(
        (image.clamp(0, 1) * 255).round().to(torch.uint8), boxes_of(masks), label, masks, class_map(masks, label)
    )


def _ground(key: int, size: tuple[int, int]) -> Tensor:
    """Return `[3, H, W]`: one colour that changes slowly and a little over the picture."""
    colour = 0.15 + 0.7 * _draw(key, 1) + 0.2 * (_draw(mix(key, 1), 3) - 0.5)
    coarse = _draw(mix(key, 2), 3, 5, 5) - 0.5
    slow = F.interpolate(coarse[None], size, mode="bicubic", align_corners=False)[0]
    return (colour[:, None, None] + 0.35 * slow).clamp(0, 1)


def _laid(glyph: Tensor, draw: list[float], size: tuple[int, int]) -> tuple[Tensor, tuple[slice, slice]]:
    """Return the opacity `[1, h, w]` of a digit as large and where the numbers in [0, 1) say."""
    small, large = SIDES
    side = round(min(size) * small * (large / small) ** draw[0])
    top, left = (int(share * (room - side + 1)) for share, room in zip(draw[1:], size, strict=True))
    opacity = F.interpolate(glyph[None], (side, side), mode="bicubic", align_corners=False)[0].clamp(0, 1)
    return opacity, (slice(top, top + side), slice(left, left + side))


def _ink(ground: Tensor, draw: list[float]) -> Tensor:
    """Return a colour `[3, 1, 1]` that stands out from the ground it is laid on."""
    level = float(ground.mean())
    dark, light = max(level - CONTRAST, 0.0), max(1 - level - CONTRAST, 0.0)
    place = draw[0] * (dark + light)
    ink = place if place < dark else place - dark + level + CONTRAST
    return (ink + 0.2 * (torch.tensor(draw[1:]) - 0.5)).clamp(0, 1).view(3, 1, 1)


def boxes_of(masks: Tensor) -> Tensor:
    """Return the tight box of each mask, its far edges included: `[n, H, W]` bool to `[n, 4]`, 0 where empty.

    Example:
        >>> boxes_of(torch.tensor([[[False, True], [False, True]]]))
        tensor([[1., 0., 2., 2.]])
    """
    edges = []
    for dim in (1, 2):  # columns hit, then rows
        hit = masks.any(dim)
        length = hit.shape[1]
        first = hit.int().argmax(1)
        last = torch.where(hit.any(1), length - hit.flip(1).int().argmax(1), 0)
        edges.append((first, last))
    (left, right), (top, bottom) = edges
    return torch.stack([left, top, right, bottom], dim=1).float()


def class_map(masks: Tensor, labels: Tensor) -> Tensor:
    """Return what covers each pixel: `[n, H, W]` masks and `[n]` labels to `[H, W]`, 0 or 1 + label.

    Example:
        >>> class_map(torch.tensor([[[False, True]]]), torch.tensor([7]))
        tensor([[0, 8]])
    """
    return ((labels + 1)[:, None, None] * masks).sum(0)
