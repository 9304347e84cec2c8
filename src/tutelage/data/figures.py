# SPDX-License-Identifier: Apache-2.0
"""Rendered articulated figures with the 133 whole-body keypoints: nothing to download.

A figure stands before an uneven ground, seen from the front or turned to a side; limbs bend at random, hands open and
close. Something may stand before it, and it may reach beyond the picture. Keypoints outside the picture are not
annotated (visibility 0); of those that are covered, the body's are (visibility 1) and the others are not, as it is the
custom in COCO-WholeBody.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F

from tutelage.core.error import UserError
from tutelage.core.keypoints import WHOLEBODY
from tutelage.functional.noise import mix, uniform

SMALLEST = 48  # pixels a side below which hands cannot be told from arms
CHUNK = 64  # figures that are painted together
HIDDEN = 0.35  # share of figures with something before them
CUT = 0.25  # share of figures that are moved toward an edge
MARGIN = 0.03  # of the box around the keypoints, in heights of a figure
FILLED = 0.5  # share of its box that a figure covers: the area by which distances are scaled
POSE, COLOUR, GROUND, GRAIN, COVER, PLACE = range(1, 7)  # salts: what a random choice is about
HAND_SCALE = 1.5
# of each finger: angle to the middle of the hand, length from the root to its first joint, length of a segment
FINGERS = ((0.95, 0.030, 0.017), (0.32, 0.052, 0.016), (0.05, 0.054, 0.017), (-0.2, 0.050, 0.016), (-0.5, 0.046, 0.013))


@final
@dataclass(frozen=True)
class Figures:
    """Rendered figures, one a picture.

    Args:
        images: `[N, 3, H, W]` uint8.
        points: `[N, 133, 3]` x, y in pixels and visibility (0 not annotated, 1 covered, 2 visible).
        boxes: `[N, 4]` x1, y1, x2, y2 around what is annotated.
        area: `[N]` square pixels that a figure covers.
    """

    images: Tensor
    points: Tensor
    boxes: Tensor
    area: Tensor


def figures(number: int, size: tuple[int, int] = (96, 72), seed: int = 0, *, first: int = 0) -> Figures:
    """Return figures; each is a function of seed, size and its number.

    Args:
        number: how many.
        size: (height, width) of a picture.
        seed: of what is drawn.
        first: number of the first.

    Raises:
        UserError: if the pictures are too small, or fewer than one is asked for.

    Example:
        >>> found = figures(2, (64, 48))
        >>> found.images.shape, found.points.shape
        (torch.Size([2, 3, 64, 48]), torch.Size([2, 133, 3]))
    """
    if min(size) < SMALLEST:
        raise UserError(f"figures: size {size[0]} x {size[1]} is too small, a side has at least {SMALLEST} pixels")
    if number < 1:
        raise UserError(f"figures: number counts figures, at least 1, not {number}")
    parts = [
        _rendered(torch.arange(start, min(start + CHUNK, first + number)), size, mix(seed, POSE))
        for start in range(first, first + number, CHUNK)
    ]
    return Figures(*(torch.cat(list(one)) for one in zip(*parts, strict=True)))


def _rendered(index: Tensor, size: tuple[int, int], key: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    points, frame = _posed(index, key)
    points, unit = _placed(points, index, size, key)
    frame = frame * unit[:, None, None]
    image = _ground(index, size, key)
    canvas = _Canvas(image)
    _paint(canvas, points, frame, unit, _colours(index, key))
    cover = _cover(canvas, points, index, key)
    edge = torch.tensor([size[1] - 1, size[0] - 1])
    inside = ((points >= 0) & (points <= edge)).all(-1)
    body = torch.arange(points.shape[1]) < 17
    visible = torch.where(cover, torch.where(body, 1.0, 0.0), 2.0) * inside
    grain = uniform(mix(key, GRAIN), index, (1, *size)) - 0.5
    pixels = ((canvas.image + 0.06 * grain).clamp(0, 1) * 255).round().to(torch.uint8)
    far = 1e6
    low = torch.where(inside[..., None], points, far).amin(1) - MARGIN * unit[:, None]
    high = torch.where(inside[..., None], points, -far).amax(1) + MARGIN * unit[:, None]
    boxes = torch.cat([low.clamp(min=0), torch.minimum(high, edge + 1.0)], 1)
    area = FILLED * (boxes[:, 2:] - boxes[:, :2]).clamp(min=1).prod(1)
    shown = torch.cat([points * (visible > 0)[..., None], visible[..., None]], -1)
    return pixels, shown, boxes, area


# --- poses ---------------------------------------------------------------------------------------------------


def _down(angle: Tensor) -> Tensor:
    """Return the unit vector at an angle from straight down, toward the right: `[..., 2]`."""
    return torch.stack([angle.sin(), angle.cos()], -1)


def _posed(index: Tensor, key: int) -> tuple[Tensor, Tensor]:
    """Return keypoints `[N, 133, 2]` in heights of a figure, and the head: centre, its right and down `[N, 3, 2]`."""
    drawn = iter(uniform(mix(key, POSE), index, (64,)).unbind(1))

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * next(drawn)

    lean, yaw = between(-0.35, 0.35), between(-1.0, 1.0)
    wide = yaw.cos()[:, None]
    side = torch.stack([lean.cos(), -lean.sin()], -1)
    trunk = -_down(lean)
    hips = torch.zeros_like(side)
    chest = 0.31 * between(0.88, 1.12)[:, None] * trunk
    tilt = lean + between(-0.3, 0.3)
    across, below = torch.stack([tilt.cos(), -tilt.sin()], -1), _down(tilt)
    head = chest - 0.15 * below
    radius = 0.088 * between(0.92, 1.1)[:, None]
    points: dict[int, Tensor] = {}
    turn = 0.45 * yaw.sin()[:, None]
    for number, (x, y) in enumerate(_face().tolist()):
        points[23 + number] = head + radius * ((0.82 * x * wide + turn) * across + y * below)
    points[0] = points[23 + 30]
    points[2] = torch.stack([points[23 + number] for number in range(36, 42)]).mean(0)
    points[1] = torch.stack([points[23 + number] for number in range(42, 48)]).mean(0)
    arm, leg = between(0.9, 1.1)[:, None], between(0.9, 1.1)[:, None]
    for sign, offset in ((1.0, 0), (-1.0, 1)):  # the person's left lies to the right of the picture
        points[3 + offset] = head + sign * radius * (0.95 * wide + sign * 0.1 * turn) * across
        shoulder = chest + sign * 0.115 * wide * side + 0.03 * _down(lean)
        hip = hips + sign * 0.075 * wide * side
        upper = lean + sign * between(-0.35, 2.5)
        fore = upper + sign * between(-1.6, 2.0)
        elbow = shoulder + 0.165 * arm * _down(upper)
        wrist = elbow + 0.15 * arm * _down(fore)
        thigh = lean * 0.3 + sign * between(-0.25, 0.85)
        shin = thigh - sign * between(-0.1, 0.8)
        knee = hip + 0.235 * leg * _down(thigh)
        ankle = knee + 0.22 * leg * _down(shin)
        for number, point in ((5, shoulder), (7, elbow), (9, wrist), (11, hip), (13, knee), (15, ankle)):
            points[number + offset] = point
        toward = shin + sign * between(0.7, 1.3)
        for number, length, more in ((17, 0.082, -0.1), (18, 0.072, 0.25), (19, -0.03, 0.0)):
            points[number + 3 * offset] = ankle + length * _down(toward + sign * more)
        points |= _hand(91 + 21 * offset, wrist, fore + between(-0.5, 0.5), sign, [next(drawn) for _ in FINGERS])
    found = torch.stack([points[number] for number in range(len(WHOLEBODY))], 1)
    return found, torch.stack([head, radius * across, radius * below], 1)


def _hand(root: int, wrist: Tensor, angle: Tensor, sign: float, curls: Sequence[Tensor]) -> dict[int, Tensor]:
    points = {root: wrist + 0.012 * HAND_SCALE * _down(angle)}
    for finger, ((spread, base, segment), curl) in enumerate(zip(FINGERS, curls, strict=True)):
        toward = angle - sign * spread
        point = points[root] + base * HAND_SCALE * _down(toward)
        for joint in range(4):
            points[root + 1 + 4 * finger + joint] = point
            toward = toward + sign * 0.5 * curl * (finger > 0)
            point = point + segment * HAND_SCALE * _down(toward)
    return points


def _face() -> Tensor:
    """Return the 68 points of a face seen from the front, `[68, 2]`, in radii of the head; x to the right."""

    def arc(count: int, centre: tuple[float, float], radii: tuple[float, float], start: float, stop: float) -> Tensor:
        angle = torch.linspace(start, stop, count) * torch.pi
        return torch.stack([centre[0] + radii[0] * angle.cos(), centre[1] + radii[1] * angle.sin()], 1)

    def line(count: int, start: tuple[float, float], stop: tuple[float, float]) -> Tensor:
        return torch.tensor(start) + torch.linspace(0, 1, count)[:, None] * (torch.tensor(stop) - torch.tensor(start))

    eye = [arc(6, (x, -0.12), (0.16, 0.08), 1.0, 2 + 2 / 3) for x in (-0.36, 0.36)]
    return torch.cat(
        [
            arc(17, (0.0, -0.05), (0.92, 0.95), 1.0, 0.0),  # jaw, from the person's right ear to the left
            arc(5, (-0.38, -0.25), (0.24, 0.16), 1.05, 1.9),
            arc(5, (0.38, -0.25), (0.24, 0.16), 1.1, 1.95),
            line(4, (0.0, -0.12), (0.0, 0.22)),
            arc(5, (0.0, 0.26), (0.16, 0.07), 1.0, 0.0),
            *eye,
            arc(7, (0.0, 0.52), (0.32, 0.11), 1.0, 2.0),
            arc(5, (0.0, 0.52), (0.32, 0.13), 1 / 6, 5 / 6),
            arc(5, (0.0, 0.52), (0.24, 0.04), 1.0, 2.0),
            arc(3, (0.0, 0.52), (0.24, 0.05), 1 / 4, 3 / 4),
        ]
    )


def _placed(points: Tensor, index: Tensor, size: tuple[int, int], key: int) -> tuple[Tensor, Tensor]:
    """Return keypoints in pixels, and the pixels of one height of a figure `[N]`."""
    draw = uniform(mix(key, PLACE), index, (6,))
    low, high = points.amin(1), points.amax(1)
    room = torch.tensor([size[1], size[0]]) / (high - low)
    unit = room.amin(1) * (0.72 + 0.2 * draw[:, 0])
    middle = torch.tensor([size[1], size[0]]) * (0.5 + 0.12 * (draw[:, 1:3] - 0.5))
    moved = torch.where((draw[:, 3:4] < CUT), 0.8 * (draw[:, 4:6] - 0.5), 0.0) * torch.tensor([size[1], size[0]])
    centre = middle + moved
    return (points - ((low + high) / 2)[:, None]) * unit[:, None, None] + centre[:, None], unit


# --- painting ------------------------------------------------------------------------------------------------


class _Canvas:
    """Pictures `[N, 3, H, W]` in [0, 1] that are painted on together."""

    def __init__(self, image: Tensor) -> None:
        self.image = image
        height, width = image.shape[2:]
        self.x = torch.arange(width, dtype=torch.float32)[None, None, :]
        self.y = torch.arange(height, dtype=torch.float32)[None, :, None]

    def lay(self, opacity: Tensor, colour: Tensor) -> None:
        """Lay a colour `[N, 3]` over the pictures."""
        self.image += opacity[:, None] * (colour[:, :, None, None] - self.image)

    def stroke(self, path: Tensor, radius: Tensor, colour: Tensor) -> None:
        """Draw a line through points `[N, P, 2]` with round ends."""
        nearest = torch.full((len(path), *self.image.shape[2:]), 1e9)
        for one, other in zip(path.unbind(1), path[:, 1:].unbind(1), strict=False):
            dx, dy = (other - one)[:, :, None, None].unbind(1)
            px, py = self.x - one[:, 0, None, None], self.y - one[:, 1, None, None]
            along = ((px * dx + py * dy) / (dx * dx + dy * dy).clamp(min=1e-6)).clamp(0, 1)
            nearest = torch.minimum(nearest, (px - along * dx).square_().add_((py - along * dy).square_()))
        self.lay((radius[:, None, None] + 0.5 - nearest.sqrt_()).clamp_(0, 1), colour)

    def oval(self, centre: Tensor, across: Tensor, below: Tensor, colour: Tensor, there: Tensor | None = None) -> None:
        """Fill an oval with half axes `[N, 2]`, in those pictures where it is `[N]` bool."""
        px, py = self.x - centre[:, 0, None, None], self.y - centre[:, 1, None, None]
        far = torch.zeros_like(px + py)
        for axis in (across, below):
            x, y = (axis / axis.square().sum(1, keepdim=True).clamp(min=1e-6))[:, :, None, None].unbind(1)
            far = far + (px * x + py * y).square()
        size = torch.linalg.vector_norm(below, dim=1)[:, None, None]
        opacity = ((1 - far.sqrt()) * size + 0.5).clamp(0, 1)
        self.lay(opacity if there is None else opacity * there[:, None, None], colour)


def _colours(index: Tensor, key: int) -> dict[str, Tensor]:
    draw = uniform(mix(key, COLOUR), index, (16,))
    skin = torch.tensor([0.55, 0.38, 0.28]) + draw[:, :1] * torch.tensor([0.4, 0.38, 0.34])
    return {
        **{"skin": skin, "dark": 0.35 * skin, "lips": skin * torch.tensor([0.9, 0.5, 0.5])},
        **{"shirt": draw[:, 1:4], "trousers": draw[:, 4:7], "shoes": draw[:, 7:10] * 0.5, "hair": 0.5 * draw[:, 10:13]},
    }


def _paint(canvas: _Canvas, points: Tensor, frame: Tensor, unit: Tensor, colours: dict[str, Tensor]) -> None:
    head, across, below = frame.clone().unbind(1)
    head = points[:, 23 + 27] * 0.6 + 0.4 * points[:, 23 + 30]  # where the face is, whichever way it looks

    def limb(numbers: Sequence[int], radius: float, colour: str) -> None:
        canvas.stroke(points[:, list(numbers)], radius * unit, colours[colour])

    for offset in (0, 1):
        limb((15 + offset, 17 + 3 * offset), 0.022, "shoes")
        limb((15 + offset, 18 + 3 * offset), 0.020, "shoes")
        limb((15 + offset, 19 + 3 * offset), 0.022, "shoes")
        limb((11 + offset, 13 + offset, 15 + offset), 0.042, "trousers")
    limb((11, 12), 0.05, "trousers")
    middle = (points[:, 11] + points[:, 12]) / 2
    chest = (points[:, 5] + points[:, 6]) / 2
    canvas.stroke(torch.stack([chest, head], 1), 0.035 * unit, colours["skin"])
    for offset in (0, 1):
        canvas.stroke(torch.stack([points[:, 5 + offset], points[:, 11 + offset]], 1), 0.045 * unit, colours["shirt"])
    canvas.stroke(torch.stack([chest + 0.2 * (middle - chest), middle], 1), 0.07 * unit, colours["shirt"])
    limb((5, 6), 0.045, "shirt")
    canvas.oval(head - 0.25 * below, 1.12 * across, 1.15 * below, colours["hair"])
    canvas.oval(head + 0.08 * below, 0.95 * across, 1.02 * below, colours["skin"])
    for first in (17, 22):
        limb(range(23 + first, 23 + first + 5), 0.004, "hair")
    for first in (36, 42):
        limb((*range(23 + first, 23 + first + 6), 23 + first), 0.005, "dark")
    limb((23 + 27, 23 + 30, 23 + 33), 0.003, "dark")
    limb((23 + 48, 23 + 51, 23 + 54, 23 + 57, 23 + 48), 0.005, "lips")
    for offset in (0, 1):
        limb((5 + offset, 7 + offset), 0.032, "shirt")
        limb((7 + offset, 9 + offset), 0.026, "skin")
        root = 91 + 21 * offset
        palm = [root, *(root + 1 + 4 * finger for finger in (1, 2, 3, 4)), root]
        canvas.stroke(points[:, palm], 0.012 * unit, colours["skin"])
        for finger in range(5):
            limb((root, *range(root + 1 + 4 * finger, root + 5 + 4 * finger)), 0.007, "skin")


def _ground(index: Tensor, size: tuple[int, int], key: int) -> Tensor:
    """Return a colour that changes slowly over the picture, with a few patches."""
    base = 0.15 + 0.7 * uniform(mix(key, GROUND), index, (3, 1, 1))
    coarse = uniform(mix(key, GROUND, 1), index, (3, 5, 4)) - 0.5
    fine = uniform(mix(key, GROUND, 2), index, (3, 12, 9)) - 0.5
    slow = F.interpolate(coarse, size, mode="bicubic", align_corners=False)
    quick = F.interpolate(fine, size, mode="nearest")
    return (base + 0.5 * slow + 0.15 * quick).clamp(0, 1).contiguous()


def _cover(canvas: _Canvas, points: Tensor, index: Tensor, key: int) -> Tensor:
    """Paint what stands before some of the figures; return the keypoints it covers, `[N, 133]` bool."""
    draw = uniform(mix(key, COVER), index, (9,))
    low, high = points.amin(1), points.amax(1)
    span = high - low
    centre = low + span * draw[:, 0:2]
    half = span * (0.1 + 0.16 * draw[:, 2:4])
    angle = 3.2 * draw[:, 4]
    across = _down(angle) * half[:, :1]
    below = torch.stack([-angle.cos(), angle.sin()], -1) * half[:, 1:]
    there = draw[:, 5] < HIDDEN
    canvas.oval(centre, across, below, draw[:, 6:9], there)
    gap = points - centre[:, None]
    far = sum(
        (gap * (axis / axis.square().sum(1, keepdim=True).clamp(min=1e-6))[:, None]).sum(-1).square()
        for axis in (across, below)
    )
    covered: Tensor = (far < 1) & there[:, None]
    return covered
