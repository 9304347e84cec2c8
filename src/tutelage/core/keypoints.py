# SPDX-License-Identifier: Apache-2.0
"""What the keypoints of a person are: names, sides, how far annotators disagree, which are joined."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, final

from tutelage.core.error import UserError, nearest

_BODY = (
    *("nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder", "left_elbow"),
    *("right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle"),
    "right_ankle",
)
_FOOT = tuple(f"{side}_{part}" for side in ("left", "right") for part in ("big_toe", "small_toe", "heel"))
_FACE = tuple(f"face_{number}" for number in range(68))
_FINGERS = ("thumb", "forefinger", "middle_finger", "ring_finger", "pinky_finger")
_HANDS = tuple(
    f"{side}_{part}"
    for side in ("left", "right")
    for part in ("hand_root", *(f"{finger}{joint}" for finger in _FINGERS for joint in (1, 2, 3, 4)))
)
#: Numbers of the face that change places in the mirror: those of one row add up to the same.
_FACE_ROWS = (
    *((16, range(17)), (43, range(17, 27)), (66, range(31, 36)), (81, (36, 37, 38, 39, 42, 43, 44, 45))),
    *((87, (40, 41, 46, 47)), (102, range(48, 55)), (114, range(55, 60)), (124, range(60, 65)), (132, range(65, 68))),
)
# Standard deviations of annotators over the size of a person, as COCO and COCO-WholeBody publish them.
_BODY_SIGMAS = (
    *(0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072, 0.062, 0.062, 0.107, 0.107, 0.087, 0.087),
    *(0.089, 0.089),
)
_FOOT_SIGMAS = (0.068, 0.066, 0.066, 0.092, 0.094, 0.094)
_FACE_SIGMAS = (
    *(0.042, 0.043, 0.044, 0.043, 0.040, 0.035, 0.031, 0.025, 0.020, 0.023, 0.029, 0.032, 0.037, 0.038, 0.043),
    *(0.041, 0.045, 0.013, 0.012, 0.011, 0.011, 0.012, 0.012, 0.011, 0.011, 0.013, 0.015, 0.009, 0.007, 0.007),
    *(0.007, 0.012, 0.009, 0.008, 0.016, 0.010, 0.017, 0.011, 0.009, 0.011, 0.009, 0.007, 0.013, 0.008, 0.011),
    *(0.012, 0.010, 0.034, 0.008, 0.008, 0.009, 0.008, 0.008, 0.007, 0.010, 0.008, 0.009, 0.009, 0.009, 0.007),
    *(0.007, 0.008, 0.011, 0.008, 0.008, 0.008, 0.010, 0.008),
)
_HAND_SIGMAS = (
    *(0.029, 0.022, 0.035, 0.037, 0.047, 0.026, 0.025, 0.024, 0.035, 0.018, 0.024, 0.022, 0.026, 0.017, 0.021),
    *(0.021, 0.032, 0.020, 0.019, 0.022, 0.031),
)
_BODY_LINKS = (
    *((15, 13), (13, 11), (16, 14), (14, 12), (11, 12), (5, 11), (6, 12), (5, 6), (5, 7), (6, 8), (7, 9), (8, 10)),
    *((1, 2), (0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6)),
)


@final
@dataclass(frozen=True)
class Layout:
    """The keypoints of a data set, in order.

    Args:
        name: of the set of keypoints.
        names: of each.
        swap: the keypoint that takes each one's place in a mirror image.
        sigmas: how far annotators disagree on each, over the square root of the person's area.
        links: pairs that are joined by a line in a drawing.
        parts: first keypoint and the one after the last of each part that is scored by itself.
        upper: keypoints of the upper half of the body.
        lower: of the lower half.

    Raises:
        UserError: if the lengths do not agree.
    """

    name: str
    names: tuple[str, ...]
    swap: tuple[int, ...]
    sigmas: tuple[float, ...]
    links: tuple[tuple[int, int], ...] = ()
    parts: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    upper: tuple[int, ...] = ()
    lower: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for word in ("swap", "sigmas"):
            if len(getattr(self, word)) != len(self.names):
                given = len(getattr(self, word))
                raise UserError(f"keypoints {self.name!r}: {given} {word} are given for {len(self.names)} keypoints")
        if sorted(self.swap) != list(range(len(self.names))):
            raise UserError(f"keypoints {self.name!r}: swap must name each keypoint once")
        if any(not sigma > 0 for sigma in self.sigmas):
            raise UserError(f"keypoints {self.name!r}: sigmas must be > 0")

    def __len__(self) -> int:
        return len(self.names)

    def plain(self) -> "str | dict[str, Any]":
        """Return it as plain data: its name, if it is one of those known here."""
        return self.name if KNOWN.get(self.name) == self else asdict(self)

    @classmethod
    def parse(cls, given: "str | Mapping[str, Any] | Layout") -> "Layout":
        """Read a name or the fields.

        Raises:
            UserError: on an unknown name or word.

        Example:
            >>> len(Layout.parse("body")), len(Layout.parse("wholebody"))
            (17, 133)
        """
        if isinstance(given, Layout):
            return given
        if isinstance(given, str):
            if given not in KNOWN:
                raise UserError(f"keypoints {given!r} are not known{nearest(given, KNOWN)}")
            return KNOWN[given]
        words: dict[str, Any] = {
            word: tuple(map(tuple, value)) if word == "links" else tuple(value) if isinstance(value, list) else value
            for word, value in given.items()
        }
        try:
            return cls(**words)
        except TypeError as error:
            raise UserError(f"keypoints: {error}") from error

    @classmethod
    def of_names(
        cls, names: Sequence[str], sigmas: Sequence[float] | None, links: Sequence[Sequence[int]] = ()
    ) -> "Layout":
        """Return the layout of named keypoints; `left` and `right` in a name tell which change sides.

        Raises:
            UserError: if they are none of the known ones and sigmas are missing.
        """
        for known in KNOWN.values():
            if tuple(names) == known.names and sigmas is None:
                return known
        if sigmas is None:
            raise UserError(
                f"{len(names)} keypoints ({', '.join(names[:3])}, ...) are no known set, and how far annotators "
                "disagree on each is unknown: give data.pose.sigmas, one number a keypoint"
            )
        index = {name: number for number, name in enumerate(names)}
        swap = tuple(index.get(_mirrored(name), number) for number, name in enumerate(names))
        joined = tuple((int(one), int(other)) for one, other in links)
        return cls("own", tuple(names), swap, tuple(float(sigma) for sigma in sigmas), joined)

    @classmethod
    def of_count(cls, count: int) -> "Layout | None":
        """Return the known layout with so many keypoints."""
        return next((known for known in KNOWN.values() if len(known) == count), None)


def _mirrored(name: str) -> str:
    for one, other in (("left", "right"), ("right", "left")):
        if one in name:
            return name.replace(one, other)
    return name


def _swaps(names: Sequence[str]) -> tuple[int, ...]:
    face = {f"face_{number}": f"face_{total - number}" for total, row in _FACE_ROWS for number in row}
    index = {name: number for number, name in enumerate(names)}
    return tuple(index[face.get(name, _mirrored(name))] for name in names)


def _hand_links(root: int) -> tuple[tuple[int, int], ...]:
    chains = [(root, *range(root + 1 + 4 * finger, root + 5 + 4 * finger)) for finger in range(5)]
    return tuple((one, other) for chain in chains for one, other in pairwise(chain))


BODY = Layout(
    "body",
    _BODY,
    _swaps(_BODY),
    _BODY_SIGMAS,
    _BODY_LINKS,
    {"body": (0, 17)},
    tuple(range(11)),
    tuple(range(11, 17)),
)
_WHOLE = (*_BODY, *_FOOT, *_FACE, *_HANDS)
WHOLEBODY = Layout(
    "wholebody",
    _WHOLE,
    _swaps(_WHOLE),
    (*_BODY_SIGMAS, *_FOOT_SIGMAS, *_FACE_SIGMAS, *_HAND_SIGMAS, *_HAND_SIGMAS),
    (
        *_BODY_LINKS,
        *((15, 17), (15, 18), (15, 19), (16, 20), (16, 21), (16, 22)),
        *_hand_links(91),
        *_hand_links(112),
    ),
    {"body": (0, 17), "foot": (17, 23), "face": (23, 91), "left_hand": (91, 112), "right_hand": (112, 133)},
    tuple(range(11)),
    tuple(range(11, 23)),
)
#: Layouts by name.
KNOWN = {known.name: known for known in (BODY, WHOLEBODY)}
