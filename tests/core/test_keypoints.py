# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from tutelage.core.error import UserError
from tutelage.core.keypoints import BODY, WHOLEBODY, Layout


@pytest.mark.parametrize("layout", [BODY, WHOLEBODY])
def test_a_mirror_of_a_mirror_is_the_same(layout: Layout) -> None:
    assert [layout.swap[layout.swap[number]] for number in range(len(layout))] == list(range(len(layout)))
    assert all(layout.sigmas[number] == layout.sigmas[other] for number, other in enumerate(layout.swap[:17]))


def test_sides_change_and_the_middle_stays() -> None:
    names = WHOLEBODY.names
    assert names[WHOLEBODY.swap[names.index("left_wrist")]] == "right_wrist"
    assert names[WHOLEBODY.swap[names.index("left_ring_finger3")]] == "right_ring_finger3"
    assert WHOLEBODY.swap[23 + 8] == 23 + 8  # the chin
    assert WHOLEBODY.swap[23 + 36] == 23 + 45  # outer corners of the eyes
    assert WHOLEBODY.swap[23 + 41] == 23 + 46  # under the eyes
    assert sum(number == other for number, other in enumerate(WHOLEBODY.swap)) == 1 + 10


def test_parts_cover_all_keypoints() -> None:
    ends = [0]
    for start, stop in WHOLEBODY.parts.values():
        assert start == ends[-1]
        ends.append(stop)
    assert ends == [0, 17, 23, 91, 112, 133]
    assert max(max(pair) for pair in WHOLEBODY.links) < 133


def test_it_goes_through_json() -> None:
    own = Layout.of_names(["tail", "left_ear", "right_ear"], [0.1, 0.2, 0.2], [[0, 1]])
    assert own.swap == (0, 2, 1)
    for layout in (BODY, WHOLEBODY, own):
        assert Layout.parse(json.loads(json.dumps(layout.plain()))) == layout
    assert Layout.of_count(133) is WHOLEBODY
    assert Layout.of_count(5) is None


def test_known_names_are_found() -> None:
    assert Layout.of_names(list(BODY.names), None) is BODY


def test_what_is_wrong_is_named() -> None:
    with pytest.raises(UserError, match=r"2 keypoints \(a, b, ...\) are no known set.*give data.pose.sigmas"):
        Layout.of_names(["a", "b"], None)
    with pytest.raises(UserError, match="1 sigmas are given for 2 keypoints"):
        Layout.of_names(["a", "b"], [0.1])
    with pytest.raises(UserError, match="sigmas must be > 0"):
        Layout.of_names(["a"], [0.0])
    with pytest.raises(UserError, match="keypoints 'bodi' are not known; did you mean body"):
        Layout.parse("bodi")
    with pytest.raises(UserError, match=r"keypoints: .*colour"):
        Layout.parse({"name": "a", "colour": 1})
