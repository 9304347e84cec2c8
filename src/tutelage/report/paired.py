# SPDX-License-Identifier: Apache-2.0
"""Statistics over seeds: what was measured, how much it moves, and differences between runs of one seed."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean, stdev

from tutelage.core.error import UserError


@dataclass(frozen=True)
class Summary:
    """Numbers in brief.

    Args:
        n: how many.
        mean: None if there are none.
        deviation: sample standard deviation (n - 1 in the denominator); None for fewer than two.
    """

    n: int
    mean: float | None
    deviation: float | None

    @classmethod
    def of(cls, values: Iterable[float]) -> "Summary":
        """Return the summary of finite numbers.

        Raises:
            UserError: if one is not finite.

        Example:
            >>> Summary.of([1.0, 2.0, 6.0])
            Summary(n=3, mean=3.0, deviation=2.6457...)
        """
        found = [float(value) for value in values]
        if not all(math.isfinite(value) for value in found):
            raise UserError("a score is not finite: a run that diverged has no place in a mean; leave it out by name")
        return cls(len(found), fmean(found) if found else None, stdev(found) if len(found) > 1 else None)


@dataclass(frozen=True)
class Paired:
    """Differences, each between two runs of one seed: same initial weights, same data, same number of steps.

    Args:
        n: number of pairs.
        mean: of the differences, value minus baseline; None without a pair.
        deviation: sample standard deviation of the differences; None for fewer than two.
        low: lower end of the two-sided 95 % Student-t interval of the mean; None without a spread.
        high: its upper end.
        wins: pairs in which the value is better.
        ties: pairs in which both are equal.
        losses: pairs in which it is worse.
    """

    n: int
    mean: float | None
    deviation: float | None
    low: float | None
    high: float | None
    wins: int
    ties: int
    losses: int


def paired(values: Mapping[int, float], baseline: Mapping[int, float], *, higher: bool = True) -> Paired:
    """Return the paired differences over the seeds that both sides have.

        d_i = value_i - baseline_i,   mean(d) ± t(0.975; n - 1) * s(d) / sqrt(n)

    Convention:
        - value minus baseline, in the unit given; `higher` says which sign is a win
        - the interval speaks of seeds, not of other data; it assumes roughly normal differences
        - one pair has no spread and no interval: None, never NaN; nor have differences that are all the same and not 0,
          as two seeds on a small set may be by chance

    Args:
        values: by seed.
        baseline: by seed.
        higher: more is better.

    Raises:
        UserError: if a number is not finite; the seed is named.

    Example:
        >>> paired({0: 3.0, 1: 5.0, 2: 7.0}, {0: 2.0, 1: 3.0, 2: 4.0})
        Paired(n=3, mean=2.0, deviation=1.0, low=-0.484..., high=4.484..., wins=3, ties=0, losses=0)
    """
    seeds = sorted(values.keys() & baseline.keys())
    for seed in seeds:
        if not (math.isfinite(values[seed]) and math.isfinite(baseline[seed])):
            raise UserError(
                f"the score of seed {seed} is not finite: leave the seed out on both sides, or run it again"
            )
    differences = [values[seed] - baseline[seed] for seed in seeds]
    summary = Summary.of(differences)
    wins = sum((d > 0) if higher else (d < 0) for d in differences)
    ties = sum(d == 0 for d in differences)
    low = high = None
    if summary.mean is not None and summary.deviation is not None and (summary.deviation or not summary.mean):
        half = quantile(summary.n - 1) * summary.deviation / math.sqrt(summary.n)
        low, high = summary.mean - half, summary.mean + half
    return Paired(summary.n, summary.mean, summary.deviation, low, high, wins, ties, summary.n - wins - ties)


def quantile(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t distribution with so many degrees of freedom.

    Example:
        >>> quantile(4)
        2.776...
    """
    from scipy.special import (
        stdtrit,
    )  # scipy comes with scikit-learn; this function needs none of scipy.stats

    return float(stdtrit(freedom, 0.975))
