# SPDX-License-Identifier: Apache-2.0
import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest
from sklearn.isotonic import IsotonicRegression

from tutelage.report import plot as home
from tutelage.report.metric import Metric
from tutelage.report.paired import paired
from tutelage.report.plot import (
    SERIES,
    VARIABLES,
    Dot,
    Plot,
    apart,
    curves,
    differences,
    loss_parts,
    scores,
    styles,
    trade,
)

TOP1 = Metric.of("top1")
SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "<b>$x_1$ & \\frac"


def a_curve(*values: float) -> list[tuple[float, float]]:
    return [(float(epoch), value) for epoch, value in enumerate(values, 1)]


def every_plot(name: str) -> dict[str, Plot]:
    """One plot of each kind with a series of this name."""
    pairs = paired({0: 0.8, 1: 0.82}, {0: 0.7, 1: 0.75})
    return {
        "curves": curves({name: [a_curve(0.1, 0.5, 0.6), a_curve(0.2, 0.6, 0.7)], "alone": [a_curve(0.1, 0.2)]}, TOP1),
        "scores": scores({name: [0.8, 0.82], "alone": [0.7]}, TOP1, teacher=0.9),
        "differences": differences({name: pairs}, TOP1, "alone"),
        "parts": loss_parts({name: a_curve(3.0, 2.0, 1.0), "task": a_curve(300.0, 200.0, 100.0)}),
        "trade": trade({name: Dot(1e6, 0.8, 0.01), "teacher": Dot(2e7, 0.9)}, TOP1),
    }


def texts(plot: Plot) -> list[str]:
    return ["".join(node.itertext()) for node in ElementTree.fromstring(plot.svg).iter(f"{SVG}text")]


def line(plot: Plot, color: str, width: str = "1.8") -> "np.ndarray[tuple[int, ...], np.dtype[np.float64]]":
    """Return the points of the one line with this colour and width, in pixels: `[N, 2]`."""
    variable = VARIABLES[color][0]
    found = [
        node.attrib["d"]
        for node in ElementTree.fromstring(plot.svg).iter(f"{SVG}path")
        if f"stroke: var(--{variable}," in node.attrib.get("style", "")
        and f"stroke-width: {width}" in node.attrib["style"]
    ]
    assert len(found) == 1
    return np.array([[float(x), float(y)] for x, y in re.findall(r"[ML] (\S+) (\S+)", found[0])])


@pytest.mark.parametrize("kind", list(every_plot("KD")))
def test_each_plot_is_one_self_contained_element(kind: str) -> None:
    plot = every_plot("KD")[kind]
    root = ElementTree.fromstring(plot.svg)
    assert root.tag == f"{SVG}svg"
    assert root.attrib["role"] == "img"
    assert root.find(f"{SVG}title") is not None
    assert "width" not in root.attrib  # the page decides
    names = [node.attrib["id"] for node in root.iter() if "id" in node.attrib]
    links = re.findall(r'(?:href="|url\()([^")]*)', plot.svg)
    assert len(names) == len(set(names))
    assert {f"#{name}" for name in names} == set(links)
    assert not re.findall(r"<script|<style|<!DOCTYPE|<metadata|font-family|DejaVu", plot.svg)
    assert "KD" in " ".join(texts(plot))


@pytest.mark.parametrize("kind", list(every_plot("KD")))
def test_every_colour_is_a_variable_of_the_page(kind: str) -> None:
    svg = every_plot("KD")[kind].svg
    bare = re.sub(r"var\(--[a-z0-9-]+, #[0-9a-f]{6}\)", "", svg)
    assert set(re.findall(r"#[0-9a-f]{6}\b", re.sub(r"url\([^)]*\)|(?:id|href)=\"[^\"]*\"", "", bare))) == set()
    declared = (Path(home.__file__).parent / "page.css").read_text(encoding="utf-8")
    used = set(re.findall(r"var\(--([a-z0-9-]+),", svg))
    assert used
    for variable in used:
        assert declared.count(f"--{variable}:") == 2, f"{variable}: one for light, one for dark"


def test_the_light_colours_of_the_page_are_those_without_a_page() -> None:
    declared = (Path(home.__file__).parent / "page.css").read_text(encoding="utf-8")
    light = declared[: declared.index("@media")]
    for variable, color in VARIABLES.values():
        assert f"--{variable}: {color};" in light


@pytest.mark.parametrize("kind", list(every_plot("KD")))
def test_names_are_text_and_never_markup_or_mathematics(kind: str) -> None:
    plot = every_plot(HOSTILE)[kind]
    assert HOSTILE.split()[0] in " ".join(texts(plot))
    assert "<b>" not in plot.svg


def test_two_plots_share_no_id() -> None:
    plots = [*every_plot("KD").values(), *every_plot("MGD").values()]
    names = [name for plot in plots for name in re.findall(r' id="([^"]+)"', plot.svg)]
    assert len(names) > 10
    assert len(names) == len(set(names))


def test_the_same_data_give_the_same_drawing() -> None:
    assert every_plot("KD") == every_plot("KD")


def test_settings_of_matplotlib_neither_matter_nor_change() -> None:
    plain = every_plot("KD")
    with mpl.rc_context({"axes.facecolor": "black", "font.size": 30, "axes.grid": True, "svg.fonttype": "path"}):
        before = dict(mpl.rcParams)
        assert every_plot("KD") == plain
        assert dict(mpl.rcParams) == before


def test_no_state_of_pyplot_is_used() -> None:
    assert "pyplot" not in Path(home.__file__).read_text(encoding="utf-8")


def test_a_learning_curve_is_the_mean_over_seeds() -> None:
    runs = {"KD": [a_curve(0.1, 0.5, 0.4), a_curve(0.3, 0.7, 1.2)]}
    across, down = line(curves(runs, TOP1), SERIES[0]).T
    assert across[2] - across[1] == pytest.approx(across[1] - across[0])
    assert (down[2] - down[1]) / (down[1] - down[0]) == pytest.approx((0.8 - 0.6) / (0.6 - 0.2), abs=1e-4)


def test_points_that_not_all_seeds_have_are_left_out() -> None:
    runs = {"KD": [a_curve(0.1, 0.5, 0.6, 0.7), a_curve(0.3, 0.7)]}
    assert len(line(curves(runs, TOP1), SERIES[0])) == 2


def test_a_band_needs_two_seeds() -> None:
    one, two = (
        curves({"KD": [a_curve(0.1, 0.5)]}, TOP1),
        curves({"KD": [a_curve(0.1, 0.5), a_curve(0.2, 0.7)]}, TOP1),
    )
    assert "opacity: 0.16" not in one.svg
    assert "opacity: 0.16" in two.svg
    assert (one.caption, two.caption[:15]) == ("One seed.", "Mean of 2 seeds")


def test_scores_are_written_beside_their_rows() -> None:
    found = texts(scores({"KD": [0.8, 0.82], "alone": [0.7]}, TOP1, teacher=0.9))
    assert {"KD", "81.0 ± 1.4", "alone", "70.0", "teacher 90.0", "top-1 accuracy (%)"} <= set(found)


def test_differences_name_the_baseline_at_zero_and_the_better_side() -> None:
    pairs = {"KD": paired({0: 0.5}, {0: 0.6})}
    assert any("better to the right" in text for text in texts(differences(pairs, TOP1, "alone")))
    found = texts(differences(pairs, Metric.of("loss"), "alone"))
    assert any("better to the left" in text for text in found)
    assert "alone" in found


def test_parts_of_very_different_size_share_a_logarithmic_axis() -> None:
    far = loss_parts({"a": a_curve(1.0, 2.0), "b": a_curve(1000.0, 2000.0)})
    near = loss_parts({"a": a_curve(1.0, 2.0), "b": a_curve(3.0, 4.0)})
    negative = loss_parts({"a": a_curve(-1.0, 2.0), "b": a_curve(1000.0, 2000.0)})
    logarithmic = [any("log scale" in text for text in texts(plot)) for plot in (far, near, negative)]
    assert logarithmic == [True, False, False]


def test_what_is_not_finite_is_not_drawn() -> None:
    plot = loss_parts({"a": a_curve(1.0, float("nan"), 3.0), "b": a_curve(float("inf"))})
    assert len(line(plot, SERIES[0])) == 2
    assert "nan" not in plot.svg
    assert "b" not in texts(plot)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: curves({}, TOP1),
        lambda: curves({"KD": [], "alone": [[]]}, TOP1),
        lambda: scores({}, TOP1),
        lambda: scores({"KD": []}, TOP1, teacher=0.9),
        lambda: differences({}, TOP1, "alone"),
        lambda: differences({"KD": paired({}, {})}, TOP1, "alone"),
        lambda: loss_parts({}),
        lambda: loss_parts({"task": []}),
        lambda: trade({}, TOP1),
    ],
)
def test_nothing_to_draw_is_said(draw: Callable[[], Plot]) -> None:
    assert texts(draw()) == ["nothing recorded"]


def test_looks_stay_with_a_name_and_differ_between_names() -> None:
    names = [f"method {n}" for n in range(12)]
    found = styles(["alone", *names], "alone", "teacher")
    assert list(found) == ["alone", "teacher", *names]
    assert len({(look.color, look.dash) for look in found.values()}) == 14
    assert len({(look.color, look.marker) for look in found.values()}) == 14
    assert styles(["alone", *names[:3]], "alone")["method 2"] == found["method 2"]


def test_names_moved_apart_are_the_nearest_that_do_not_overlap() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        heights, sizes = rng.uniform(0, 100, 6), rng.uniform(5, 25, 6)
        found = np.array(apart(heights.tolist(), sizes.tolist()))
        order = np.argsort(heights)
        # the oracle: distances between neighbours' middles are at least offsets, least squares
        sized = sizes[order]
        offsets = np.concatenate([[0], np.cumsum((sized[:-1] + sized[1:]) / 2)])
        oracle = IsotonicRegression().fit_transform(np.arange(6), heights[order] - offsets) + offsets
        assert found[order] == pytest.approx(oracle, abs=1e-9)
    assert apart([], []) == []


def test_smoothing_is_the_mean_over_a_window() -> None:
    values = np.random.default_rng(0).normal(size=23)
    for width in (1, 2, 5):
        by_hand = [
            values[max(n - width // 2, 0) : max(n - width // 2, 0, n + (width + 1) // 2)].mean() for n in range(23)
        ]
        assert home._smooth(values, width) == pytest.approx(np.array(by_hand))


def test_limits_hold_names_inside_and_change_nothing_else() -> None:
    assert apart([1.0, 2.0, 50.0], [10, 10, 10], low=0.0) == [5.0, 15.0, 50.0]
    assert apart([50.0, 99.0], [10, 10], high=100.0) == [50.0, 95.0]
    inside = apart([5.0] * 3 + [95.0] * 3, [10] * 6, 0.0, 100.0)
    assert inside == [5.0, 15.0, 25.0, 75.0, 85.0, 95.0]


def test_names_of_many_series_stay_inside_the_drawing() -> None:
    runs = {f"method number {n}": [a_curve(0.1, 0.9 + n / 1e4)] for n in range(20)}
    root = ElementTree.fromstring(curves(runs, TOP1).svg)
    height = float(root.attrib["viewBox"].split()[3])
    names = [node for node in root.iter(f"{SVG}text") if "method" in "".join(node.itertext())]
    places = sorted(float(node.attrib["y"]) for node in names)
    assert len(names) == 20
    assert 0 < places[0] < places[-1] < height
    assert min(np.diff(places)) > 12


def test_long_names_are_wrapped_or_cut() -> None:
    found = " ".join(texts(scores({"a name of many words for a row": [0.5], "x" * 60: [0.6]}, TOP1)))
    assert "x" * 21 + "…" in found
    assert "x" * 22 not in found
    for word in ("many", "words", "row"):
        assert word in found
