# SPDX-License-Identifier: Apache-2.0
"""Plots as inline SVG: text stays text, colours are variables of the page, light or dark.

Each series has a colour, a dash pattern and a marker of its own and is named where it ends: nothing hangs on
colour alone. The colours keep apart under the common kinds of colour blindness (measured; see `page.css`).
"""

import hashlib
import io
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean, stdev
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from tutelage.report.metric import Metric
from tutelage.report.number import MINUS
from tutelage.report.paired import Paired, Summary
from tutelage.report.records import Curve

# Colours that matplotlib is given and that the finished SVG has as variables of the page, with what they are
# where there is no page around them.
INK, MUTED, GRID, PAPER = "#010101", "#020202", "#030303", "#040404"
SERIES = ("#0a0a01", "#0a0a02", "#0a0a03", "#0a0a04", "#0a0a05")
REFERENCE = "#0a0a00"
VARIABLES = {
    INK: ("ink", "#1d2127"),
    MUTED: ("muted", "#5c6570"),
    GRID: ("grid", "#e2e5e9"),
    PAPER: ("surface", "#ffffff"),
    REFERENCE: ("series-0", "#6a737d"),
    SERIES[0]: ("series-1", "#1769d6"),
    SERIES[1]: ("series-2", "#b85b17"),
    SERIES[2]: ("series-3", "#0c5b3c"),
    SERIES[3]: ("series-4", "#a0188f"),
    SERIES[4]: ("series-5", "#5e3d02"),
}
MARKERS = {"s": 7.5, "D": 7.5, "^": 9.5, "v": 9.5, "P": 9.0, "X": 9.0, "o": 8.0, "*": 13.0}  # and their sizes
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.5, 1.4)), (0, (6, 1.5, 1.5, 1.5)))

EMPTY = Markup("")
WIDTH = 430.0  # of every plot; units of the SVG are CSS pixels at this width
FONT = 12.0
LINE = 14.0  # distance between two lines of text
SMALL = 11.0


@dataclass(frozen=True)
class Plot:
    """A drawing with its words.

    Args:
        title: above it.
        svg: the drawing.
        caption: below it: what is drawn, and how.
    """

    title: str
    svg: Markup
    caption: str = ""


@dataclass(frozen=True)
class Style:
    """How one series looks, in every plot of a page."""

    color: str
    marker: str
    dash: Any

    @property
    def mark(self) -> dict[str, Any]:
        """What matplotlib draws a mark with; its rim lets it stand out from lines."""
        return {
            "marker": self.marker,
            "color": self.color,
            "markersize": MARKERS[self.marker],
            "markeredgecolor": PAPER,
            "linestyle": "none",
        }


@dataclass(frozen=True)
class Dot:
    """A model between its cost and its score.

    Args:
        cost: parameters, milliseconds.
        score: mean over seeds.
        deviation: over seeds, or None.
    """

    cost: float
    score: float
    deviation: float | None = None


def styles(names: Sequence[str], reference: str | None = None, teacher: str | None = None) -> dict[str, Style]:
    """Return the look of each series by its place, the same in every plot of a page that is given it.

    Args:
        names: in the order of showing.
        reference: the one that the others are compared with: grey.
        teacher: a star in the colour of the text.
    """
    special = {reference: Style(REFERENCE, "o", DASHES[0]), teacher: Style(INK, "*", DASHES[0])}
    found = {name: special[name] for name in (reference, teacher) if name is not None}
    for n, name in enumerate(name for name in dict.fromkeys(names) if name not in special):
        lap, place = divmod(n, len(SERIES))
        marker = list(MARKERS)[n % (len(MARKERS) - 2)]  # circle and star are taken
        found[name] = Style(SERIES[place], marker, DASHES[(place + lap + 1) % len(DASHES)])
    return found


def curves(
    runs: Mapping[str, Sequence[Curve]],
    metric: Metric,
    *,
    looks: Mapping[str, Style] | None = None,
    x: str = "epoch",
    title: str = "Learning curves",
) -> Plot:
    """Draw a score over training: the mean of each label's runs, and one sample standard deviation around it.

    Args:
        runs: the curve of each seed, by label; points that not all seeds of a label have are left out.
        metric: what is drawn.
        looks: from `styles`; by place otherwise.
        x: what runs along.
        title: of the plot.
    """
    looks = {**styles(list(runs)), **(looks or {})}
    scale = 100.0 if metric.percent else 1.0
    seeds = max((len(found) for found in runs.values()), default=0)
    caption = f"Mean of {seeds} seeds; the band is one sample standard deviation." if seeds > 1 else "One seed."
    drawn: dict[str, np.ndarray[Any, Any]] = {}
    for label, found in runs.items():
        maps = [dict(one) for one in found]
        shared = sorted(set.intersection(*(set(one) for one in maps))) if maps else []
        if shared:
            values = np.array([[scale * one[place] for place in shared] for one in maps])
            spread = values.std(axis=0, ddof=1) if len(maps) > 1 else np.zeros(len(shared))
            drawn[label] = np.stack([np.array(shared), values.mean(axis=0), spread])
    if not drawn:
        return _empty(title)
    with _drawing(_height(drawn), right=_room(drawn), title=title) as sheet:
        axes = sheet.axes
        for label, (places, mean, spread) in drawn.items():
            look = looks[label]
            if spread.any():
                axes.fill_between(places, mean - spread, mean + spread, color=look.color, alpha=0.16, linewidth=0)
            lone = {"marker": look.marker, "markersize": 4} if len(places) < 12 else {}
            axes.plot(places, mean, color=look.color, linewidth=1.8, linestyle=look.dash, **lone)
        _grid(axes, metric.head, x)
        _name_ends(axes, {label: (found[0][-1], found[1][-1]) for label, found in drawn.items()}, looks)
    return Plot(title, sheet.svg, caption)


def scores(
    found: Mapping[str, Sequence[float]],
    metric: Metric,
    *,
    looks: Mapping[str, Style] | None = None,
    teacher: float | None = None,
    title: str = "Scores",
) -> Plot:
    """Draw each label's score: small dots are seeds, the mark their mean, the bar one standard deviation.

    Args:
        found: the score of each seed, by label.
        metric: what is drawn.
        looks: from `styles`; by place otherwise.
        teacher: a line to see the others against.
        title: of the plot.
    """
    looks = {**styles(list(found)), **(looks or {})}
    scale = 100.0 if metric.percent else 1.0
    kept = {label: [scale * value for value in values] for label, values in found.items() if values}
    if not kept:
        return _empty(title)
    texts = {label: metric.show(s.mean, s.deviation) for label, s in ((k, Summary.of(found[k])) for k in kept)}
    top = 34.0 if teacher is not None else 12.0
    with _drawing(
        top + 42 + 34 * len(kept), left=_room(kept), right=_room(texts.values()), top=top, title=title
    ) as sheet:
        axes = sheet.axes
        for place, (label, values) in enumerate(kept.items()):
            look, mean = looks[label], fmean(values)
            if len(values) > 1:
                width = stdev(values)
                axes.plot([mean - width, mean + width], [place, place], color=look.color, linewidth=7, alpha=0.25)
                axes.plot(
                    values,
                    [place] * len(values),
                    "o",
                    color=look.color,
                    markersize=3.6,
                    alpha=0.6,
                    markeredgewidth=0,
                )
            axes.plot([mean], [place], **look.mark)
        _rows(axes, list(kept), list(texts.values()), looks)
        if teacher is not None:
            _upright(axes, scale * teacher, f"teacher {metric.show(teacher)}")
        _along(axes, metric.head)
    several = max(map(len, kept.values())) > 1
    caption = "Dots are seeds, the mark their mean, the bar one sample standard deviation." if several else "One seed."
    return Plot(title, sheet.svg, caption)


def differences(
    found: Mapping[str, Paired],
    metric: Metric,
    baseline: str,
    *,
    looks: Mapping[str, Style] | None = None,
    title: str = "Differences",
) -> Plot:
    """Draw each label's mean paired difference with its 95 % interval about zero.

    Args:
        found: paired differences by label.
        metric: what differs.
        baseline: what zero stands for.
        looks: from `styles`; by place otherwise.
        title: of the plot.
    """
    looks = {**styles([baseline, *found], reference=baseline), **(looks or {})}
    scale = 100.0 if metric.percent else 1.0
    kept = {label: pairs for label, pairs in found.items() if pairs.mean is not None}
    if not kept:
        return _empty(title)
    texts = [metric.difference(pairs.mean) for pairs in kept.values()]
    with _drawing(34 + 42 + 34 * len(kept), left=_room(kept), right=_room(texts), top=34, title=title) as sheet:
        axes = sheet.axes
        for place, (label, pairs) in enumerate(kept.items()):
            look, mean = looks[label], scale * (pairs.mean or 0.0)
            if pairs.low is not None and pairs.high is not None:
                ends = [scale * pairs.low, scale * pairs.high]
                axes.plot(ends, [place, place], "|-", color=look.color, linewidth=2, markersize=9, markeredgewidth=2)
            axes.plot([mean], [place], **look.mark)
        _rows(axes, list(kept), texts, looks)
        _upright(axes, 0.0, baseline)
        better = "right" if metric.higher else "left"
        _along(
            axes,
            f"difference of {metric.label}{' (points)' if metric.percent else ''}; better to the {better}",
        )
    caption = "Mean of the differences paired by seed, with its two-sided 95 % Student-t interval."
    return Plot(title, sheet.svg, caption)


def loss_parts(
    found: Mapping[str, Curve], *, looks: Mapping[str, Style] | None = None, title: str = "Parts of the loss"
) -> Plot:
    """Draw the parts of a training loss over steps, each before its weight, smoothed over a fortieth of it.

    Args:
        found: the curve of each part, by label.
        looks: from `styles`; by place otherwise.
        title: of the plot.
    """
    looks = {**styles(list(found)), **(looks or {})}
    finite = {label: [point for point in points if math.isfinite(point[1])] for label, points in found.items()}
    kept = {label: np.array(points, dtype=float).T for label, points in finite.items() if points}
    if not kept:
        return _empty(title)
    values = np.concatenate([points[1] for points in kept.values()])
    tall = bool((values > 0).all() and values.max() > 30 * values.min())
    with _drawing(_height(kept), right=_room(kept), title=title) as sheet:
        axes = sheet.axes
        ends = {}
        for label, (steps, line) in kept.items():
            look = looks[label]
            smooth = _smooth(line, max(1, len(line) // 40))
            axes.plot(steps, line, color=look.color, linewidth=0.8, alpha=0.25)
            lone = {"marker": look.marker, "markersize": 4} if len(steps) < 12 else {}
            axes.plot(steps, smooth, color=look.color, linewidth=1.8, linestyle=look.dash, **lone)
            ends[label] = (steps[-1], smooth[-1])
        if tall:
            axes.set_yscale("log")
        _grid(axes, "loss before its weight" + (", log scale" if tall else ""), "step")
        _name_ends(axes, ends, looks)
    return Plot(title, sheet.svg, "Thin lines are single records, thick ones their running mean.")


def trade(
    found: Mapping[str, Dot],
    metric: Metric,
    *,
    cost: Literal["parameters", "latency", "MACs"] = "parameters",
    looks: Mapping[str, Style] | None = None,
    title: str = "",
) -> Plot:
    """Draw score against cost, one mark a model.

    Args:
        found: by label.
        metric: the score.
        cost: what runs along; latency is in milliseconds.
        looks: from `styles`; by place otherwise.
        title: of the plot.
    """
    looks = {**styles(list(found)), **(looks or {})}
    title = title or f"{metric.label[:1].upper()}{metric.label[1:]} against {cost}"
    scale = 100.0 if metric.percent else 1.0
    if not found:
        return _empty(title)
    costs = [dot.cost for dot in found.values()]
    wide = min(costs) > 0 and max(costs) > 8 * min(costs)
    with _drawing(_height(found), title=title) as sheet:
        axes = sheet.axes
        for label, dot in found.items():
            look, score = looks[label], scale * dot.score
            if dot.deviation is not None:
                ends = [score - scale * dot.deviation, score + scale * dot.deviation]
                axes.plot([dot.cost] * 2, ends, "_-", color=look.color, linewidth=1.6, markersize=7)
            axes.plot([dot.cost], [score], **look.mark)
        if wide:
            axes.set_xscale("log")
        axes.margins(x=0.12, y=0.18)
        word = "latency of one sample (ms)" if cost == "latency" else cost
        _grid(axes, metric.head, word + (", log scale" if wide else ""), costs=True)
        _name_dots(axes, {label: (dot.cost, scale * dot.score) for label, dot in found.items()}, looks)
    several = any(dot.deviation is not None for dot in found.values())
    return Plot(title, sheet.svg, "Whiskers are one sample standard deviation over seeds." if several else "")


# --- paper ---------------------------------------------------------------------------------------------


@dataclass
class Sheet:
    """Axes to draw on, and the SVG once the drawing is done."""

    axes: Any
    svg: Markup = EMPTY


@contextmanager
def _drawing(
    height: float, *, title: str, left: float = 40, right: float = 24, top: float = 30, bottom: float = 42
) -> Iterator[Sheet]:
    """Yield a sheet with these margins in pixels; the user's own settings of matplotlib play no part."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": "tutelage",
                "font.size": FONT,
                "axes.edgecolor": GRID,
                "text.color": INK,
                "axes.unicode_minus": True,
                "lines.solid_capstyle": "round",
                "lines.dash_capstyle": "butt",
            }
        )
        figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72)
        figure.patch.set_visible(False)
        box = (left / WIDTH, bottom / height, 1 - (left + right) / WIDTH, 1 - (top + bottom) / height)
        axes = figure.add_axes(box)
        axes.patch.set_visible(False)
        for side in ("top", "left", "right"):
            axes.spines[side].set_visible(False)
        sheet = Sheet(axes)
        yield sheet
        buffer = io.StringIO()
        bare: dict[str, None] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=bare)
        sheet.svg = _inline(buffer.getvalue(), title)


def _inline(text: str, title: str) -> Markup:
    """Turn a file of matplotlib into an element of a page: no prolog, its own ids, variables for colours."""
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<(metadata|style).*?</\1>", "", text, flags=re.DOTALL)  # its style is one for every element
    head, _, body = text.partition(">")
    view = re.search(r'viewBox="[^"]*"', head)
    assert view is not None
    for sentinel, (variable, color) in VARIABLES.items():
        body = body.replace(sentinel, f"var(--{variable}, {color})")
    body = re.sub(r"font: ([0-9.]+)px [^;\"]*", r"font-size: \1px", body)  # one property until matplotlib 3.10
    body = re.sub(r" font-family: [^;\"]*;?", "", body)
    body = re.sub(r' transform="rotate\(-?0 [^"]*"', "", body)
    used = set(re.findall(r"url\(#([^)]+)\)", body)) | set(re.findall(r'href="#([^"]+)"', body))
    mark = hashlib.sha256(f"{title}{body}".encode()).hexdigest()[:8]
    body = re.sub(r' id="([^"]+)"', lambda m: f' id="{mark}-{m[1]}"' if m[1] in used else "", body)
    body = re.sub(r"url\(#", f"url(#{mark}-", body)
    body = re.sub(r'(?:xlink:)?href="#', f'href="#{mark}-', body)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" role="img" {view[0]} stroke-linejoin="round">'
    return Markup(head) + Markup("<title>{}</title>").format(title) + Markup(body)


def _empty(title: str) -> Plot:
    """Return a plot that says there is nothing to draw."""
    with _drawing(90, title=title) as sheet:
        axes = sheet.axes
        axes.set_axis_off()
        axes.text(0.5, 0.5, "nothing recorded", ha="center", va="center", color=MUTED, transform=axes.transAxes)
    return Plot(title, sheet.svg)


def _grid(axes: Any, head: str, x: str, *, costs: bool = False) -> None:
    """Set quiet lines, few ticks, and the name of the upright axis above it, written level."""
    _ticks(axes)
    steps = [1, 2, 2.5, 5, 10]
    _plain(axes.yaxis, MaxNLocator(5, steps=steps), _number)
    _plain(axes.xaxis, MaxNLocator(6, steps=steps, integer=not costs), _amount if costs else _number)
    axes.yaxis.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    low, high = axes.get_ylim()
    widest = max((_width(_number(tick, None)) for tick in axes.get_yticks() if low <= tick <= high), default=0.0)
    x0, y0, width, height = axes.get_position().bounds
    left = max(x0, (widest + 10) / WIDTH)
    axes.set_position((left, y0, x0 + width - left, height))
    axes.annotate(
        head, (6, 1), (0, 14), xycoords=("figure pixels", "axes fraction"), textcoords="offset points",
        color=MUTED, fontsize=SMALL, parse_math=False,
    )  # fmt: skip
    axes.set_xlabel(x, color=MUTED, fontsize=SMALL, labelpad=5, parse_math=False)


def _plain(axis: Any, locator: Any, write: Callable[[float, Any], str]) -> None:
    """Set ticks that are written without mathematics; a logarithmic axis gets 1, 2 and 5 of each decade."""
    if axis.get_scale() == "log":
        low, high = axis.get_view_interval()
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        places = [step * 10.0**decade for decade in decades for step in (1, 2, 5)]
        inside = [place for place in places if low <= place <= high]
        tens = [place for place in inside if f"{place:e}".startswith("1.")]
        axis.set_ticks(tens if len(inside) > 8 and len(tens) > 1 else inside)
    else:
        axis.set_major_locator(locator)
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(write))


def _number(value: float, place: Any) -> str:
    return f"{value:g}".replace("-", MINUS)


def _amount(value: float, place: Any) -> str:
    """Return a cost: millions of parameters are `5 M`."""
    for prefix, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{value / factor:g} {prefix}"
    return f"{value:g}"


def _ticks(axes: Any) -> None:
    axes.tick_params(length=0, labelcolor=MUTED, labelsize=SMALL, pad=5)


def _along(axes: Any, head: str) -> None:
    """Set the level axis of a plot with rows."""
    _ticks(axes)
    axes.yaxis.set_visible(False)
    _plain(axes.xaxis, MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]), _number)
    axes.xaxis.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.06)
    axes.set_xlabel(head, color=MUTED, fontsize=SMALL, labelpad=5, parse_math=False)


def _rows(axes: Any, labels: Sequence[str], texts: Sequence[str], looks: Mapping[str, Style]) -> None:
    """Write a label to the left of each row and its number to the right."""
    axes.set_ylim(len(labels) - 0.5, -0.5)
    for place, (label, text) in enumerate(zip(labels, texts, strict=True)):
        where = axes.get_yaxis_transform()
        options = {"va": "center", "transform": where, "parse_math": False, "clip_on": False}
        axes.text(-0.03, place, _wrapped(label), ha="right", color=looks[label].color, linespacing=1.1, **options)
        axes.text(1.03, place, text, ha="left", color=INK, **options)


def _upright(axes: Any, value: float, name: str) -> None:
    """Draw a dashed reference line with its name above."""
    axes.axvline(value, color=MUTED, linewidth=1.2, linestyle=(0, (3, 2)))
    low, high = axes.get_xlim()
    place = (value - low) / (high - low)
    side = "right" if place > 0.8 else "left" if place < 0.2 else "center"
    axes.annotate(
        name, (value, 1), (0, 6), xycoords=axes.get_xaxis_transform(), textcoords="offset points", ha=side,
        color=MUTED, fontsize=SMALL, parse_math=False, annotation_clip=False,
    )  # fmt: skip


def _name_ends(axes: Any, ends: Mapping[str, tuple[float, float]], looks: Mapping[str, Style]) -> None:
    """Write each label to the right of where its line ends, moved apart where they would touch."""
    finite = {label: end for label, end in ends.items() if math.isfinite(end[1])}
    right = axes.transAxes.transform((1, 0))[0]
    places = {label: (right, axes.transData.transform(end)[1]) for label, end in finite.items()}
    _write(axes, places, {label: _wrapped(label) for label in finite}, looks, gap=8)


def _name_dots(axes: Any, dots: Mapping[str, tuple[float, float]], looks: Mapping[str, Style]) -> None:
    """Write each label beside its mark, on the side with room; those above one another are moved apart."""
    right = axes.transAxes.transform((1, 0))[0] + 20
    places = {label: axes.transData.transform(dot) for label, dot in dots.items()}
    words = {label: _wrapped(label) for label in dots}
    spans: list[tuple[float, float, int, str]] = []
    for label, (x, _) in places.items():
        reach = 10 + max(map(_width, words[label].split("\n")))
        side = 1 if x + reach < right else -1
        start, end = sorted((x, x + side * reach))
        spans.append((start, end, side, label))
    columns: list[list[tuple[float, float, int, str]]] = []
    for span in sorted(spans):
        if columns and span[0] < max(one[1] for one in columns[-1]):
            columns[-1].append(span)
        else:
            columns.append([span])
    for column in columns:
        sides = {label: side for _, _, side, label in column}
        _write(axes, {label: places[label] for label in sides}, words, looks, 10, sides)


def _write(
    axes: Any,
    places: Mapping[str, tuple[float, float]],
    words: Mapping[str, str],
    looks: Mapping[str, Style],
    gap: float,
    sides: Mapping[str, int] | None = None,
) -> None:
    """Write words beside places in pixels, one above the other, with a thin line to what had to move."""
    sheet = axes.figure.bbox.height
    sizes = [LINE * (1 + words[label].count("\n")) for label in places]
    heights = apart([height for _, height in places.values()], sizes, 2, sheet - 2)
    for (label, (x, wanted)), height in zip(places.items(), heights, strict=True):
        side = sides[label] if sides else 1
        color = looks[label].color
        if abs(height - wanted) > LINE / 3:
            ends = axes.figure.transFigure.inverted().transform(
                [(x + side * (gap - 7), wanted), (x + side * (gap - 1), height)]
            )
            axes.plot(*ends.T, color=color, linewidth=0.8, transform=axes.figure.transFigure, clip_on=False)
        axes.annotate(
            words[label], (x + side * gap, height), xycoords="figure pixels", va="center",
            ha="left" if side > 0 else "right", color=color, linespacing=1.1,
            parse_math=False, annotation_clip=False,
        )  # fmt: skip


def apart(
    heights: Sequence[float], sizes: Sequence[float], low: float = -math.inf, high: float = math.inf
) -> list[float]:
    """Return the heights nearest to those given at which texts of these sizes do not overlap.

    With the room that the texts below take subtracted, heights only have to rise: an isotonic regression,
    done by pooling adjacent violators; limits clip its result.

    Args:
        heights: of the middles of the texts.
        sizes: of the texts, upwards.
        low: no text reaches below.
        high: no text reaches above, if all of them fit.

    Example:
        >>> apart([10.0, 11.0, 50.0], [10, 10, 10])
        [5.5, 15.5, 50.0]
    """
    order = sorted(range(len(heights)), key=lambda n: heights[n])
    below = dict(zip(order, accumulate((sizes[n] for n in order), initial=0.0), strict=False))
    pools: list[list[float]] = []
    for n in order:
        pools.append([heights[n] - below[n] - sizes[n] / 2])
        while len(pools) > 1 and fmean(pools[-2]) > fmean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    starts = [fmean(pool) for pool in pools for _ in pool]
    last = high - sum(sizes)
    found = [0.0] * len(heights)
    for n, start in zip(order, starts, strict=True):
        found[n] = max(min(start, last), low) + below[n] + sizes[n] / 2
    return found


def _smooth(values: "np.ndarray[Any, Any]", width: int) -> "np.ndarray[Any, Any]":
    """Return the running mean over a centred window, narrower at both ends."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    low, high = np.maximum(places - width // 2, 0), np.minimum(places + (width + 1) // 2, len(values))
    high = np.maximum(high, low + 1)
    return np.asarray((total[high] - total[low]) / (high - low))


def _wrapped(label: str) -> str:
    """Return a label in at most three lines of about 16 letters; a longer word is cut."""
    lines = textwrap.wrap(label, 16, max_lines=3, placeholder=" …", break_long_words=False) or [label]
    return "\n".join(line if len(line) <= 22 else f"{line[:21]}…" for line in lines)


def _height(labels: Iterable[str]) -> float:
    """Return the height of a plot in which so many labels can stand above one another."""
    return max(270.0, 76 + LINE * sum(1 + _wrapped(label).count("\n") for label in labels))


def _room(labels: Iterable[str]) -> float:
    """Return the width that the widest label needs beside the axes."""
    widths = [_width(line) for label in labels for line in _wrapped(label).split("\n")]
    return max([*widths, 16.0]) + 16


def _width(text: str) -> float:
    if not text.strip():
        return 0.0
    width, _, _ = text_to_path.get_text_width_height_descent(text, FontProperties(size=FONT), ismath=False)
    return float(width)
