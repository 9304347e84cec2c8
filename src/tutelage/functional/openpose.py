# SPDX-License-Identifier: Apache-2.0
"""The order of keypoints that OpenPose made customary: a neck between the shoulders, then limb after limb.

Nothing is imported here: the engines that run without PyTorch read it, too.
"""

#: Where the neck is inserted, and the points it is the mean of.
NECK, SHOULDERS = 17, (5, 6)
#: Places that change once the neck is inserted, and the points that take them; the others stay.
TO = (1, 2, 3, 4, 6, 7, 8, 9, 10, 12, 13, 14, 15, 16, 17)
FROM = (17, 6, 8, 10, 7, 9, 12, 14, 16, 13, 15, 2, 1, 4, 3)
#: Lines of the body: shoulders, right arm, left arm, right leg, left leg, eyes and ears.
LINKS = (
    *((1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13), (1, 0)),
    *((0, 14), (14, 16), (0, 15), (15, 17)),
)


def order(count: int) -> tuple[int, ...]:
    """Return which point of the list with the neck stands at each place.

    Args:
        count: points without the neck, at least the 17 of the body.

    Example:
        >>> order(17)
        (0, 17, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
    """
    found = list(range(count + 1))
    for place, source in zip(TO, FROM, strict=True):
        found[place] = source
    return tuple(found)


def links(others: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    """Return the lines of a drawing.

    Args:
        others: lines in the order without the neck; those beyond the body are kept, one place later.

    Example:
        >>> links(((5, 6), (20, 21)))[-1]
        (21, 22)
    """
    return (*LINKS, *((one + 1, other + 1) for one, other in others if min(one, other) >= NECK))
