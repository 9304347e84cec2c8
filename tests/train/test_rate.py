# SPDX-License-Identifier: Apache-2.0
import math
from itertools import pairwise

import pytest

from tutelage.core.error import UserError
from tutelage.train.rate import Rate


def factors(steps: int, **fields: object) -> list[float]:
    rate = Rate(**{"steps_per_epoch": 10, "total_steps": steps, **fields})  # type: ignore[arg-type]
    return [rate.at(step) for step in range(steps)]


def test_cosine_is_half_a_period_from_one_to_the_end() -> None:
    found = factors(8, decay="cosine", end=0.2)
    assert found == pytest.approx([0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * n / 8)) for n in range(8)])
    assert found[0] == 1.0
    assert found[4] == pytest.approx(0.6)


def test_linear_is_a_line() -> None:
    assert factors(5, decay="linear") == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


def test_poly_is_a_power_of_what_is_left() -> None:
    assert factors(4, decay="poly") == pytest.approx([1.0, 0.75**0.9, 0.5**0.9, 0.25**0.9])
    assert factors(4, decay="poly", power=2.0, end=0.2) == pytest.approx([1.0, 0.65, 0.4, 0.25])
    assert factors(5, decay="poly", power=1.0) == pytest.approx(factors(5, decay="linear"))


def test_constant_stays() -> None:
    assert set(factors(30, decay="constant")) == {1.0}


def test_multistep_falls_at_the_first_step_of_each_milestone() -> None:
    found = factors(40, decay="multistep", milestones=(1, 2.5), gamma=0.1)
    assert found == pytest.approx([1.0] * 10 + [0.1] * 15 + [0.01] * 15)


def test_exponential_falls_once_an_epoch() -> None:
    assert factors(30, decay="exponential", gamma=0.5) == [1.0] * 10 + [0.5] * 10 + [0.25] * 10


@pytest.mark.parametrize("decay", ["constant", "cosine", "linear"])
def test_warm_up_rises_in_equal_parts_to_the_full_rate(decay: str) -> None:
    found = factors(20, decay=decay, warmup=4)
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    assert found[4] == 1.0


def test_warm_up_starts_where_it_is_told() -> None:
    assert factors(20, decay="constant", warmup=2, warmup_start=0.5)[:3] == [0.75, 1.0, 1.0]


def test_decay_runs_over_what_the_warm_up_leaves() -> None:
    found = factors(14, decay="linear", warmup=4)
    assert found[4:] == pytest.approx([1 - n / 10 for n in range(10)])


@pytest.mark.parametrize("warmup", [0.5, 1.0, 1.5, 2.75])
def test_warm_up_of_part_of_a_step_never_passes_the_full_rate(warmup: float) -> None:
    found = factors(20, decay="constant", warmup=warmup)
    assert max(found) == 1.0
    assert all(factor > 0 for factor in found)


def test_a_warm_up_is_written_in_epochs_or_steps() -> None:
    assert Rate.warm("1.5 epochs", 20) == 30
    assert Rate.warm("7 steps", 20) == 7
    assert Rate.warm(None, 20) == 0
    with pytest.raises(UserError, match="cannot read '3' as a length"):
        Rate.warm("3", 20)


def test_a_late_cosine_is_flat_for_half_of_the_run() -> None:
    found = factors(20, decay="flat_cosine", end=0.1)
    assert found[:11] == [1.0] * 11
    assert found[15] == pytest.approx(0.55)
    assert all(a > b for a, b in pairwise(found[10:]))
