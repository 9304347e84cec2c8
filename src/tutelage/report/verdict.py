# SPDX-License-Identifier: Apache-2.0
"""What the numbers allow to be said, in a sentence. Nothing here knows what was hoped for."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tutelage.report.metric import Metric
from tutelage.report.paired import Paired

Kind = Literal["gain", "no gain", "unclear", "not compared"]


@dataclass(frozen=True)
class Verdict:
    """A judgement and the sentences that carry it.

    Args:
        kind: `gain` if the whole 95 % interval lies on the better side of zero, `no gain` if none of it does,
            `unclear` if it has both sides or there is none, `not compared` without a baseline; of several
            methods, that of the best.
        sentence: the judgement with its numbers.
        details: one sentence a method where several were compared, and what to bear in mind.
    """

    kind: Kind
    sentence: str
    details: tuple[str, ...] = ()

    @classmethod
    def of_run(
        cls, metric: Metric, student: float, *, teacher: float | None = None, baseline: float | None = None
    ) -> "Verdict":
        """Return what one run of one seed shows.

        Args:
            metric: the headline.
            student: its score after the last step.
            teacher: on the same data.
            baseline: of the same student trained alone with the same seed, if that was run.
        """
        text = f"The student ends at {_value(metric, student)} {metric.label}"
        if teacher is not None:
            text += f", {_beside(metric, student - teacher)} the teacher ({_value(metric, teacher)})"
        if baseline is None:
            return cls("not compared", f"{text}. No student was trained alone, so nothing is known of a gain.")
        alone = f"{_beside(metric, student - baseline)} the student trained alone ({_value(metric, baseline)})"
        return cls("unclear", f"{text}{',' if teacher is None else ' and'} {alone}; one seed has no interval.")

    @classmethod
    def of_comparison(cls, metric: Metric, baseline: str, found: Mapping[str, Paired]) -> "Verdict":
        """Return what a comparison over seeds shows.

        Args:
            metric: the headline.
            baseline: label of what the others are compared with.
            found: paired differences by label.
        """
        if not found:
            return cls("not compared", f"Nothing was compared with {baseline}.")
        sentences = {label: sentence(metric, label, baseline, pairs) for label, pairs in found.items()}
        kinds = {label: judge(pairs, higher=metric.higher) for label, pairs in found.items()}
        if len(found) == 1:
            (label,) = found
            return cls(kinds[label], sentences[label])
        gains, unclear, rest = (list(kinds.values()).count(kind) for kind in ("gain", "unclear", "no gain"))
        said = [f"{gains or 'none'} {'improve' if gains > 1 else 'improves'} {metric.label}"]
        if unclear:
            said.append(f"{unclear} {'are' if unclear > 1 else 'is'} unclear")
        if rest:
            said.append(f"{rest} {'do' if rest > 1 else 'does'} not")
        text = " and ".join(filter(None, (", ".join(said[:-1]), said[-1])))
        headline = f"Of {len(found)} methods compared with {baseline}, {text}."
        kind: Kind = "gain" if gains else "unclear" if unclear else "no gain"
        caution = "Each interval stands for itself: none is corrected for the number of methods compared."
        return cls(kind, headline, (*sentences.values(), caution))


def judge(pairs: Paired, *, higher: bool = True) -> Kind:
    """Return what an interval of differences says of a gain.

    Example:
        >>> judge(Paired(5, 0.2, 0.1, 0.1, 0.3, wins=5, ties=0, losses=0))
        'gain'
    """
    if pairs.low is None or pairs.high is None:
        return "unclear"
    worst, best = (pairs.low, pairs.high) if higher else (-pairs.high, -pairs.low)
    return "gain" if worst > 0 else "no gain" if best <= 0 else "unclear"


def sentence(metric: Metric, label: str, baseline: str, pairs: Paired) -> str:
    """Return one method's result against the baseline, with interval, seeds and wins."""
    if pairs.mean is None:
        return f"{label} and {baseline} have no seed in common: nothing can be said."
    mean = f"{metric.difference(pairs.mean)}{metric.unit}"
    if pairs.low is None or pairs.high is None:
        differs = f"{label} differs from {baseline} by {mean} of {metric.label}"
        if pairs.n > 1:
            return f"{differs} on each of {pairs.n} seeds; equal differences have no spread, and so no interval."
        return f"{differs} on one seed; one seed has no interval."
    proof = f"95 % interval {metric.interval(pairs.low, pairs.high)}; better in {pairs.wins} of {pairs.n} seeds"
    proof += f", equal in {pairs.ties}" if pairs.ties else ""
    kind = judge(pairs, higher=metric.higher)
    if kind == "unclear":
        differs = f"Whether {label} differs from {baseline} in {metric.label}"
        return f"{differs} is unclear: {mean} on average ({proof})."
    if not pairs.mean:
        return f"{label} changes {metric.label} by nothing against {baseline} ({proof})."
    verb = "improves" if kind == "gain" else "worsens"
    size = f"{metric.difference(abs(pairs.mean)).lstrip('+')}{metric.unit}"
    return f"{label} {verb} {metric.label} by {size} against {baseline} ({proof})."


def _value(metric: Metric, value: float) -> str:
    return f"{metric.show(value)} %" if metric.percent else metric.show(value)


def _beside(metric: Metric, difference: float) -> str:
    text = metric.difference(difference)
    if text.strip("0.") == "":
        return "level with"
    return f"{text[1:]}{metric.unit} {'above' if difference > 0 else 'below'}"
