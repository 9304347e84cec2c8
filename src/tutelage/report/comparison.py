# SPDX-License-Identifier: Apache-2.0
"""Methods side by side over seeds."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from tutelage.core.error import UserError, nearest
from tutelage.report.metric import Metric
from tutelage.report.number import MISSING
from tutelage.report.paired import Paired, Summary, paired
from tutelage.report.table import Table
from tutelage.report.verdict import Verdict


@dataclass(frozen=True)
class Comparison:
    """The same student trained in several ways.

    Args:
        metric: the headline, after the last step.
        scores: of each label by seed, in the order of showing.
        baseline: the label that the others are compared with.
        teacher: the teacher's own score, if there is one teacher for all.
        published: what the papers print for each label, in the unit of the metric (a fraction for a percentage).

    Raises:
        UserError: if no scores carry the baseline's label.
    """

    metric: Metric
    scores: Mapping[str, Mapping[int, float]]
    baseline: str
    teacher: float | None = None
    published: Mapping[str, float] = field(default_factory=dict)
    pairs: Mapping[str, Paired] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        if self.baseline not in self.scores:
            raise UserError(
                f"nothing to compare with: no scores of {self.baseline!r}{nearest(self.baseline, self.scores)}"
            )
        alone = self.scores[self.baseline]
        others = {label: found for label, found in self.scores.items() if label != self.baseline}
        pairs = {label: paired(found, alone, higher=self.metric.higher) for label, found in others.items()}
        object.__setattr__(self, "pairs", pairs)

    @property
    def summaries(self) -> dict[str, Summary]:
        """Mean and spread of each label."""
        return {label: Summary.of(found.values()) for label, found in self.scores.items()}

    @property
    def verdict(self) -> Verdict:
        """What the differences allow to be said."""
        return Verdict.of_comparison(self.metric, self.baseline, self.pairs)

    def table(self, title: str = "Results") -> Table:
        """Return one row a label: seeds, score, difference to the baseline, interval, wins."""
        rows: list[tuple[str | None, ...]] = []
        if self.teacher is not None:
            rows.append(("teacher", None, self.metric.show(self.teacher), None, None, None))
        for label, summary in self.summaries.items():
            score = self.metric.show(summary.mean, summary.deviation)
            rows.append((label, str(summary.n), score, *self._against(self.pairs.get(label))))
        unit = " (points)" if self.metric.percent else ""
        columns: tuple[str, ...] = (
            "method",
            "seeds",
            self.metric.head,
            f"difference{unit}",
            "95 % interval",
            "better / equal / worse",
        )
        note = (
            "Mean ± sample standard deviation over seeds, after the last step. Differences to "
            f"{self.baseline} are paired by seed, with their 95 % Student-t interval over seeds."
        )
        if self.published:
            columns = (*columns, "published")
            rows = [(*row, self.metric.show(self.published.get(str(row[0])))) for row in rows]
        return Table(columns, rows, title=title, note=note)

    def _against(self, pairs: Paired | None) -> tuple[str | None, ...]:
        """Return the cells of a difference; the baseline has none."""
        if pairs is None:
            return None, None, None
        ends = None if pairs.low is None or pairs.high is None else (pairs.low, pairs.high)
        width = MISSING if ends is None else self.metric.interval(*ends)
        return self.metric.difference(pairs.mean), width, f"{pairs.wins} / {pairs.ties} / {pairs.losses}"
