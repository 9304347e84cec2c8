# SPDX-License-Identifier: Apache-2.0
import math
import statistics

import numpy as np
import pytest
from scipy import stats

from tutelage.core.error import UserError
from tutelage.report.metric import Metric
from tutelage.report.paired import Paired, Summary, paired, quantile
from tutelage.report.verdict import judge, sentence


def draws(n: int, seed: int) -> tuple[dict[int, float], dict[int, float]]:
    rng = np.random.default_rng(seed)
    base = rng.normal(0.7, 0.02, n)
    return dict(enumerate((base + rng.normal(0.01, 0.01, n)).tolist())), dict(enumerate(base.tolist()))


@pytest.mark.parametrize("n", [2, 3, 5, 30])
def test_the_interval_is_that_of_the_paired_t_test(n: int) -> None:
    values, baseline = draws(n, seed=n)
    found = paired(values, baseline)
    oracle = stats.ttest_rel(list(values.values()), list(baseline.values())).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((oracle.low, oracle.high), rel=1e-9)
    assert found.mean == pytest.approx(np.mean(list(values.values())) - np.mean(list(baseline.values())))
    assert found.deviation == pytest.approx(np.std([values[s] - baseline[s] for s in values], ddof=1))


def test_the_quantile_is_scipy_s() -> None:
    for freedom in (1, 2, 4, 9, 99):
        assert quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-10)


def test_the_interval_covers_the_truth_in_95_of_100() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(2000):
        sample = dict(enumerate(rng.normal(1.0, 3.0, 5).tolist()))
        found = paired(sample, dict.fromkeys(sample, 0.0))
        assert found.low is not None
        assert found.high is not None
        inside += found.low <= 1.0 <= found.high
    assert inside / 2000 == pytest.approx(0.95, abs=0.015)  # three standard errors


def test_seeds_are_paired_by_name_not_by_place() -> None:
    found = paired({2: 5.0, 1: 3.0}, {1: 2.0, 2: 3.0, 7: 100.0})
    assert (found.n, found.mean, found.wins) == (2, 1.5, 2)


def test_wins_ties_and_losses_follow_the_direction() -> None:
    values, baseline = {0: 1.0, 1: 2.0, 2: 3.0, 3: 9.0}, {0: 2.0, 1: 2.0, 2: 1.0, 3: 1.0}
    up, down = paired(values, baseline), paired(values, baseline, higher=False)
    assert (up.wins, up.ties, up.losses) == (2, 1, 1)
    assert (down.wins, down.ties, down.losses) == (1, 1, 2)
    assert up.mean == down.mean


def test_one_seed_has_neither_spread_nor_interval() -> None:
    assert paired({3: 0.5}, {3: 0.25}) == Paired(1, 0.25, None, None, None, wins=1, ties=0, losses=0)
    assert Summary.of([0.5]) == Summary(1, 0.5, None)


def test_nothing_in_common_says_nothing() -> None:
    assert paired({0: 1.0}, {1: 1.0}) == Paired(0, None, None, None, None, wins=0, ties=0, losses=0)
    assert Summary.of([]) == Summary(0, None, None)


def test_summaries_are_those_of_the_standard_library() -> None:
    values = [0.1, 0.4, 0.35, 0.8]
    found = Summary.of(iter(values))
    assert found.n == 4
    assert found.mean == pytest.approx(statistics.mean(values))
    assert found.deviation == pytest.approx(statistics.stdev(values))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_diverged_run_is_named_not_averaged(bad: float) -> None:
    with pytest.raises(UserError, match="seed 4 is not finite"):
        paired({4: bad, 5: 1.0}, {4: 1.0, 5: 1.0})
    with pytest.raises(UserError, match="not finite"):
        Summary.of([1.0, bad])


def test_equal_differences_have_no_interval_unless_they_are_nothing() -> None:
    same = paired({0: 3.0, 1: 5.0}, {0: 2.0, 1: 4.0})
    assert (same.mean, same.deviation, same.low, same.high) == (1.0, 0.0, None, None)
    nothing = paired({0: 3.0, 1: 5.0}, {0: 3.0, 1: 5.0})
    assert (nothing.low, nothing.high) == (0.0, 0.0)
    assert judge(same) == "unclear"
    assert sentence(Metric.of("loss"), "kd", "alone", same).endswith(
        "on each of 2 seeds; equal differences have no spread, and so no interval."
    )
