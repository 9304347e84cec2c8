# SPDX-License-Identifier: Apache-2.0
import math
from typing import Any

import pytest

from tutelage.core import Schedule
from tutelage.core.error import UserError
from tutelage.core.schedule import Span


def values(schedule: Any, steps: Any, per_epoch: int = 10, total: int = 100) -> list[float]:
    parsed = Schedule.parse(schedule)
    return [parsed.at(step, steps_per_epoch=per_epoch, total_steps=total) for step in steps]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (0.5, {0: 0.5, 99: 0.5}),
        (2, {7: 2.0}),
        ({"linear": [0, 1]}, {0: 0.0, 25: 0.25, 100: 1.0, 500: 1.0}),
        ({"linear": [1, 0.5], "until": "2 epochs"}, {0: 1.0, 10: 0.75, 20: 0.5, 21: 0.5}),
        ({"linear": [0, 1], "until": "1.5 epochs"}, {15: 1.0, 3: 0.2}),
        ({"linear": [0, 1], "until": "4 steps"}, {1: 0.25, 4: 1.0}),
        ({"linear": [0, 1], "until": "1 step"}, {0: 0.0, 1: 1.0}),
        ({"linear": [0, 1], "until": "0 epochs"}, {0: 1.0}),
        ({"linear": [0, 1], "until": 0.5}, {25: 0.5, 50: 1.0}),
        ({"linear": [0, 1], "until": "2 epochs", "by": "epochs"}, {0: 0.0, 9: 0.0, 10: 0.5, 19: 0.5, 20: 1.0}),
        ({"cosine": [1, 0]}, {0: 1.0, 50: 0.5, 100: 0.0, 25: (1 + math.sqrt(0.5)) / 2}),
        ({"step": [0, 1], "until": "20 steps"}, {19: 0.0, 20: 1.0}),
        ({"step": [1, 0], "until": 0.1}, {9: 1.0, 10: 0.0}),
    ],
    ids=str,
)
def test_a_weight_over_time(schedule: Any, expected: dict[int, float]) -> None:
    assert values(schedule, expected) == pytest.approx(list(expected.values()), abs=1e-15)


def test_only_a_number_is_constant() -> None:
    assert Schedule.parse(3).constant
    assert not Schedule.parse({"linear": [1, 1]}).constant
    ramp = Schedule.parse({"linear": [0, 1]})
    assert Schedule.parse(ramp) is ramp


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ("0.5", "a weight is a number or a schedule, not '0.5'"),
        (True, "a weight is a number or a schedule, not True"),
        (None, "a weight is a number or a schedule, not None"),
        (math.nan, "a weight is a finite number, not nan"),
        ({"linear": [0, math.inf]}, "linear takes finite numbers, not [0.0, inf]"),
        ({"lineer": [0, 1]}, "unknown word 'lineer' in a schedule; did you mean linear?"),
        ({"linear": [0, 1], "unti": "2 steps"}, "unknown word 'unti' in a schedule; did you mean until?"),
        ({"linear": [0, 1], "cosine": [0, 1]}, "a schedule has one shape: linear, cosine or step, each [start, end]"),
        ({"until": "2 steps"}, "a schedule has one shape: linear, cosine or step, each [start, end]"),
        ({"linear": 1}, "linear takes two numbers, [start, end]"),
        ({"linear": [0, 1, 2]}, "linear takes two numbers, [start, end]"),
        ({"cosine": ["a", 1]}, "cosine takes two numbers, [start, end]"),
        ({"linear": [0, 1], "by": "batches"}, "by: 'batches' is not known; valid: epochs, steps"),
        ({"step": [0, 1]}, "a step needs to know when: step: [0, 1], until: 20 epochs"),
        ({"linear": [0, 1], "until": 20}, 'until: 20 is no share of the run in [0, 1]; write "20 epochs" for a length'),
        ({"linear": [0, 1], "until": "20"}, 'cannot read \'20\' as a length: write "20 epochs" or "500 steps"'),
        ({"linear": [0, 1], "until": "1.2.3 epochs"}, None),
        ({"linear": [0, 1], "until": "-2 epochs"}, None),
    ],
    ids=str,
)
def test_a_mistake_is_named(schedule: Any, said: str | None) -> None:
    with pytest.raises(UserError) as error:
        Schedule.parse(schedule)
    assert str(error.value) == said if said else "as a length" in str(error.value)


def test_a_length_in_steps() -> None:
    assert Span.parse(" 3 epochs ").steps(7) == 21
    assert Span.parse("3 steps").steps(7) == 3
