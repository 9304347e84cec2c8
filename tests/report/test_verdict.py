# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from tutelage.core.error import UserError
from tutelage.report.comparison import Comparison
from tutelage.report.metric import Metric
from tutelage.report.number import MINUS, MISSING
from tutelage.report.paired import Paired, paired
from tutelage.report.verdict import Verdict, judge, sentence

TOP1, LOSS = Metric.of("top1"), Metric.of("loss")
ALONE = {0: 0.70, 1: 0.72, 2: 0.74}


def shifted(*by: float) -> dict[int, float]:
    return {seed: ALONE[seed] + step for seed, step in enumerate(by)}


@pytest.mark.parametrize(
    ("low", "high", "higher", "kind"),
    [
        (0.1, 0.3, True, "gain"),
        (-0.3, -0.1, True, "no gain"),
        (-0.1, 0.3, True, "unclear"),
        (0.0, 0.3, True, "unclear"),
        (0.0, 0.0, True, "no gain"),
        (0.1, 0.3, False, "no gain"),
        (-0.3, -0.1, False, "gain"),
    ],
)
def test_a_gain_needs_the_whole_interval_on_the_better_side(low: float, high: float, higher: bool, kind: str) -> None:
    assert judge(Paired(3, (low + high) / 2, 0.1, low, high, 0, 3, 0), higher=higher) == kind


@pytest.mark.parametrize("metric", [TOP1, LOSS])
def test_no_sentence_claims_more_than_the_interval(metric: Metric) -> None:
    rng = np.random.default_rng(0)
    kinds = set()
    for scale in (0.0, 0.01, 0.05) * 40:
        base = dict(enumerate(rng.uniform(0.4, 0.6, 4).tolist()))
        given = {seed: value + rng.normal(0, scale) + rng.normal(0, 0.01) for seed, value in base.items()}
        pairs = paired(given, base, higher=metric.higher)
        kind, said = judge(pairs, higher=metric.higher), sentence(metric, "M", "B", pairs)
        kinds.add(kind)
        assert ("improves" in said, "worsens" in said, "is unclear" in said) == (
            kind == "gain",
            kind == "no gain",
            kind == "unclear",
        )
        assert pairs.low is not None
        assert pairs.high is not None
        assert metric.interval(pairs.low, pairs.high) in said
    assert kinds == {"gain", "no gain", "unclear"}


def test_one_method_is_the_headline_itself() -> None:
    verdict = Verdict.of_comparison(TOP1, "alone", {"KD": paired(shifted(0.02, 0.03, 0.025), ALONE)})
    # mean 2.5 points, s = 0.5, half width = 4.3027 * 0.5 / sqrt(3) = 1.242
    assert verdict.kind == "gain"
    assert verdict.sentence == (
        "KD improves top-1 accuracy by 2.5 points against alone (95 % interval +1.3 to +3.7; better in 3 of 3 seeds)."
    )
    assert verdict.details == ()


def test_a_loss_and_a_tie_are_said_as_such() -> None:
    worse = sentence(TOP1, "KD", "alone", paired(shifted(-0.02, -0.03, -0.025), ALONE))
    assert worse.startswith("KD worsens top-1 accuracy by 2.5 points against alone")
    same = sentence(TOP1, "KD", "alone", paired(ALONE, ALONE))
    assert same == (
        "KD changes top-1 accuracy by nothing against alone "
        "(95 % interval 0.0 to 0.0; better in 0 of 3 seeds, equal in 3)."
    )


def test_lower_is_better_for_a_loss() -> None:
    found = paired({0: 0.5, 1: 0.41}, {0: 0.6, 1: 0.5}, higher=LOSS.higher)
    assert sentence(LOSS, "KD", "alone", found).startswith("KD improves loss by 0.095 against alone")


def test_one_seed_is_unclear_and_none_says_nothing() -> None:
    one = paired({0: 0.75}, ALONE)
    assert judge(one) == "unclear"
    assert sentence(TOP1, "KD", "alone", one) == (
        "KD differs from alone by +5.0 points of top-1 accuracy on one seed; one seed has no interval."
    )
    assert "nothing can be said" in sentence(TOP1, "KD", "alone", paired({9: 0.75}, ALONE))


def test_several_methods_are_counted_and_each_has_its_sentence() -> None:
    found = {
        "good": paired(shifted(0.02, 0.03, 0.025), ALONE),
        "bad": paired(shifted(-0.02, -0.03, -0.025), ALONE),
        "noise": paired(shifted(0.05, -0.05, 0.01), ALONE),
    }
    verdict = Verdict.of_comparison(TOP1, "alone", found)
    assert verdict.kind == "gain"
    assert verdict.sentence == (
        "Of 3 methods compared with alone, 1 improves top-1 accuracy, 1 is unclear and 1 does not."
    )
    assert [text.split()[0] for text in verdict.details] == ["good", "bad", "Whether", "Each"]
    none = Verdict.of_comparison(TOP1, "alone", dict.fromkeys("ab", found["bad"]))
    assert (none.kind, none.sentence) == (
        "no gain",
        "Of 2 methods compared with alone, none improves top-1 accuracy and 2 do not.",
    )


def test_nothing_compared_is_said() -> None:
    assert Verdict.of_comparison(TOP1, "alone", {}).kind == "not compared"


def test_one_run_never_claims_a_gain() -> None:
    bare = Verdict.of_run(TOP1, 0.8)
    assert bare.kind == "not compared"
    assert bare.sentence == (
        "The student ends at 80.0 % top-1 accuracy. No student was trained alone, so nothing is known of a gain."
    )
    both = Verdict.of_run(TOP1, 0.8, teacher=0.9, baseline=0.7)
    assert both.kind == "unclear"
    assert both.sentence == (
        "The student ends at 80.0 % top-1 accuracy, 10.0 points below the teacher (90.0 %) "
        "and 10.0 points above the student trained alone (70.0 %); one seed has no interval."
    )
    assert "level with the student trained alone" in Verdict.of_run(TOP1, 0.7, baseline=0.7).sentence


def test_a_comparison_s_table_holds_the_numbers() -> None:
    scores = {"alone": ALONE, "KD": shifted(0.02, 0.03, 0.025), "half": {0: 0.7}, "empty": {}}
    table = Comparison(TOP1, scores, "alone", teacher=0.95).table()
    assert [list(row) for row in table.cells] == [
        ["teacher", MISSING, "95.0", MISSING, MISSING, MISSING],
        ["alone", "3", "72.0 ± 2.0", MISSING, MISSING, MISSING],
        ["KD", "3", "74.5 ± 2.3", "+2.5", "+1.3 to +3.7", "3 / 0 / 0"],
        ["half", "1", "70.0", "0.0", MISSING, "0 / 1 / 0"],
        ["empty", "0", MISSING, MISSING, MISSING, "0 / 0 / 0"],
    ]


def test_a_comparison_without_its_baseline_names_the_nearest() -> None:
    with pytest.raises(UserError, match="no scores of 'alnoe'; did you mean alone"):
        Comparison(TOP1, {"alone": ALONE}, "alnoe")


def test_metrics_know_their_unit_and_direction() -> None:
    assert (TOP1.head, TOP1.unit, TOP1.show(0.5, 0.01)) == ("top-1 accuracy (%)", " points", "50.0 ± 1.0")
    assert (LOSS.head, LOSS.unit, LOSS.show(0.5), LOSS.higher) == ("loss", "", "0.500", False)
    assert Metric.of("ece").difference(-0.012) == f"{MINUS}1.2"
    assert Metric.of("perplexity") == Metric("perplexity", "perplexity", percent=False, higher=False)
    assert Metric.of("speed") == Metric("speed", "speed", percent=False, higher=True)
