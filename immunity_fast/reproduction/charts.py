"""Two figures of a reproduction: what networks measure beside each other, and how measures follow a coefficient.

Drawn as those of `reporting.curves` are, with its fonts, colours and layout.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, pairwise
from pathlib import Path
from statistics import median

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from immunity_fast.reporting.style import (
    COLORS,
    DPI,
    FONT_SIZE,
    MARKERS,
    PANEL_WIDTH,
    add_titles,
    marker_size,
    panel_figure,
    panel_style,
    save_png,
    say_empty,
    style_axes,
    text_width,
    wrapped,
)

LINE_HEIGHT = FONT_SIZE * 1.3 / 72  # inches, of one line of a row's name
ROW_HEIGHT = 0.19  # inches, at the least
SERIES_HEIGHT = 0.065  # inches between the points of two series in one row
NAME_WIDTH = 96.0  # points, of the rows' names
WIDEST = 2 * PANEL_WIDTH  # inches, of a figure of either kind: a page
SWEEP_HEIGHT = 1.1  # inches, of a panel's axes
BOLD = 1.35  # how much wider a title is than a name of the same letters, or a little more
MARK = "#777777"
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

Sample = tuple[float, float]


@dataclass(frozen=True)
class Panel:
    """One measure in `dot_chart`.

    Attributes:
        title: what is measured.
        axis: the label of the horizontal axis, such as a unit. One that has "%" makes a linear axis go from 0 to
            100 where no value is outside of that.
        values: series → row → (value, spread ≥ 0), both in the unit of `axis`. Any of them may be missing.
        log: whether the axis is logarithmic; from 0, where a value is 0, to the power of ten below the others it is
            linear. Without effect on values of one magnitude.
    """

    title: str
    axis: str
    values: Mapping[str, Mapping[str, Sample]]
    log: bool = False


def dot_chart(panels: Sequence[Panel], path: Path) -> None:
    """Draws every row's values in each panel, one point a series, into a PNG.

    Rows and series are in the order in which they are first met. A series has the same colour and marker in all panels;
    its points keep their place in a row where others are missing. A whisker reaches from value − spread to value +
    spread, cut at the edge of the axis; there is none where the spread is 0 or not finite. A value that is missing or
    not finite is left out. More than three panels stand in several lines, and each line begins with the rows' names.

    Args:
        panels: the measures, at least one, with at least one row among them.
        path: the PNG file to write.

    Raises:
        ValueError: if no panel has a row.
    """
    series = list(dict.fromkeys(name for panel in panels for name in panel.values))
    rows = list(dict.fromkeys(row for panel in panels for values in panel.values.values() for row in values))
    if not rows:
        raise ValueError(f"panels: expected a row of a series at least, got {len(panels)} panels without any")
    lines = math.ceil(len(panels) / 3)
    columns = math.ceil(len(panels) / lines)
    names = [wrapped(row, NAME_WIDTH) for row in rows]
    heights = [
        max(ROW_HEIGHT, LINE_HEIGHT * (name.count("\n") + 1) + 0.06, SERIES_HEIGHT * (len(series) - 1) + 0.14)
        for name in names
    ]
    ends = np.cumsum(heights)
    # The vertical axis is in inches from the top.
    middles = dict(zip(rows, (ends - np.array(heights) / 2).tolist(), strict=True))
    styles = dict(zip(series, zip(cycle(COLORS), cycle(MARKERS), strict=False), strict=False))
    offsets = {name: SERIES_HEIGHT * (i - (len(series) - 1) / 2) for i, name in enumerate(series)}
    with panel_style():
        figure = panel_figure(min(columns, 2), lines * (float(ends[-1]) + 2))  # more than it will have
        drawn = [figure.add_subplot(lines, columns, i + 1) for i in range(len(panels))]
        for i, (axes, panel) in enumerate(zip(drawn, panels, strict=True)):
            _draw_values(axes, panel)
            for name, values in panel.values.items():
                points = [(*values[row], middles[row] + offsets[name]) for row in rows if row in values]
                _draw_points(axes, points, *styles[name])
            axes.set_ylim(float(ends[-1]), 0)
            axes.set_yticks(list(middles.values()), names if i % columns == 0 else [""] * len(rows), linespacing=1.1)
            axes.tick_params(axis="y", length=0, pad=4)
            axes.set_xlabel(wrapped(panel.axis, _room(columns)), labelpad=2)
        for i in range(0, len(panels), columns):
            titles = [wrapped(panel.title, _room(columns) / BOLD) for panel in panels[i : i + columns]]
            add_titles(drawn[i : i + columns], titles)
        _add_legend(figure, [_sample(*style) for style in styles.values()], series)
        _save(figure, lines, float(ends[-1]), path)


def _draw_values(axes: Axes, panel: Panel) -> None:
    """The horizontal axis of a panel's values, with faint lines up from it; or that there are none."""
    samples = [pair for values in panel.values.values() for pair in values.values() if math.isfinite(pair[0])]
    style_axes(axes)
    axes.grid(axis="x", color="#efefef", linewidth=0.5)
    if samples:
        _scale_values(axes.xaxis, samples, panel.log, "%" in panel.axis)
    else:
        say_empty(axes)
        axes.set_xticks([])


def _sample(color: str, marker: str) -> Line2D:
    """A line and marker of this look, for the legend."""
    size = marker_size(marker) + 0.6
    return Line2D([], [], color=color, marker=marker, markersize=size, linewidth=1.1, markeredgewidth=0)


def sweep_figure(
    sweeps: Mapping[str, Mapping[str, Sequence[tuple[float, float, float]]]],
    path: Path,
    marked: Mapping[str, float] | None = None,
    log: Collection[str] = (),
) -> None:
    """Draws measures against coefficients into a PNG: a row of panels a measure, a column a coefficient.

    Points are drawn in the order of their coefficient, on an axis that is logarithmic from the least one above 0 and
    linear below; one whose coefficient is not finite is left out, and a value that is not finite leaves a gap in the
    line. A whisker reaches from value − spread to value + spread, cut at the edge of the axis; there is none where the
    spread is 0 or not finite. The vertical axes of a row are the same.

    Args:
        sweeps: coefficient, such as "β" → title of a measure → points (coefficient ≥ 0, value, spread ≥ 0), value and
            spread in the measure's unit, which its title should say. A measure may be missing for a coefficient.
        path: the PNG file to write.
        marked: coefficient → its default, where a thin vertical line is drawn. Other keys are ignored.
        log: titles of measures whose axis is to be logarithmic, as in `Panel`. Other titles are ignored.

    Raises:
        ValueError: if no coefficient has a point of a measure.
    """
    titles = list(dict.fromkeys(title for measures in sweeps.values() for title, points in measures.items() if points))
    if not titles:
        raise ValueError(f"sweeps: expected a point of a measure at least, got {len(sweeps)} coefficients without any")
    columns = len(sweeps)
    with panel_style():
        figure = panel_figure(min(columns, 2), len(titles) * (SWEEP_HEIGHT + 2))
        figure.set_figwidth(max(figure.get_figwidth(), WIDEST / 4 * columns))
        grid = figure.subplots(len(titles), columns, sharey="row", squeeze=False)
        for title, row in zip(titles, grid, strict=True):
            curves = [_finite_places(measures.get(title, ())) for measures in sweeps.values()]
            samples = [(value, spread) for points in curves for _, value, spread in points if math.isfinite(value)]
            for axes in row:
                style_axes(axes)
            if samples:
                _scale_values(row[0].yaxis, samples, title in log)
            for axes, points in zip(row, curves, strict=True):
                _draw_curve(axes, points)
            if not samples:
                row[0].set_yticks([])
            # Only above the first, since it is of the whole row.
            add_titles(row[:1], [wrapped(title, (figure.get_figwidth() * 72 - 50) / BOLD)])
        marks = []
        for column, (name, measures) in zip(grid.T, sweeps.items(), strict=True):
            mark = (marked or {}).get(name, math.nan)
            places = {x for points in measures.values() for x, _, _ in _finite_places(points)}
            places |= {mark} if math.isfinite(mark) else set()
            for axes in column:
                _scale_places(axes, sorted(places))
                if math.isfinite(mark):
                    marks.append(axes.axvline(mark, color=MARK, linewidth=0.7, dashes=(3, 2), zorder=1))
                axes.tick_params(axis="x", labelbottom=axes is column[-1])
            column[-1].set_xlabel(wrapped(name, _room(columns)), labelpad=2)
        if marks:
            _add_legend(figure, marks[:1], ["default"])
        _save(figure, len(titles), SWEEP_HEIGHT, path)


def _draw_points(axes: Axes, points: Sequence[tuple[float, float, float]], color: str, marker: str) -> None:
    """Draws points (value, spread, height) with whiskers as long as their spread."""
    finite = [point for point in points if math.isfinite(point[0])]
    if not finite:  # a line without points would upset the layout
        return
    left, right = axes.get_xlim()
    whiskers = [(y, *_whisker(value, spread, left, right)) for value, spread, y in finite if _is_spread(spread)]
    if whiskers:
        axes.hlines(*zip(*whiskers, strict=True), color=color, linewidth=1.0, zorder=2)
    line = axes.plot([x for x, _, _ in finite], [y for _, _, y in finite], color=color, linestyle="", marker=marker)[0]
    line.set(
        markersize=marker_size(marker) + 0.6, markeredgecolor="white", markeredgewidth=0.3, zorder=3, clip_on=False
    )


def _draw_curve(axes: Axes, points: Sequence[tuple[float, float, float]]) -> None:
    """Draws points (place, value, spread), in the order of their places, and a line that joins them."""
    if not any(math.isfinite(value) for _, value, _ in points):
        axes.text(0.5, 0.5, "no finite value", transform=axes.transAxes, ha="center", va="center")
        return
    bottom, top = axes.get_ylim()
    whiskers = [
        (x, *_whisker(value, spread, bottom, top))
        for x, value, spread in points
        if math.isfinite(value) and _is_spread(spread)
    ]
    if whiskers:
        axes.vlines(*zip(*whiskers, strict=True), color=COLORS[0], linewidth=0.9, zorder=2)
    values = [value if math.isfinite(value) else math.nan for _, value, _ in points]
    line = axes.plot([x for x, _, _ in points], values, color=COLORS[0], lw=1.1, marker=MARKERS[0])[0]
    line.set(markersize=marker_size(MARKERS[0]), markeredgecolor="white", markeredgewidth=0.3, zorder=3, clip_on=False)


def _finite_places(points: Sequence[tuple[float, float, float]]) -> list[tuple[float, float, float]]:
    """The points that have a place, by it."""
    return sorted((point for point in points if math.isfinite(point[0])), key=lambda point: point[0])


def _is_spread(spread: float) -> bool:
    return math.isfinite(spread) and spread > 0


def _whisker(value: float, spread: float, low: float, high: float) -> tuple[float, float]:
    """Its ends, within the axis: a logarithmic one has no place for a value of 0 or less."""
    return max(value - spread, low), min(value + spread, high)


def _scale_values(axis: Axis, samples: Sequence[Sample], log: bool, percent: bool = False) -> None:
    """Gives an axis of values its scale, limits, ticks and labels. All values are finite, and there is one at least."""
    axes = axis.axes
    is_across = axis is axes.xaxis
    set_scale = axes.set_xscale if is_across else axes.set_yscale
    values = [value for value, _ in samples]
    sizes = [abs(value) for value in values if value != 0]
    least, most = min(values), max(values)
    ends = [*values, *(v + sign * spread for v, spread in samples if _is_spread(spread) for sign in (-1, 1))]
    # In a narrower range than a factor of 5, a logarithmic axis may have no labels.
    log = log and len(sizes) > 0 and (least <= 0 or most >= 5 * least)
    if log and least > 0:
        set_scale("log")
        ends = [max(end, least / 10) for end in ends]  # a whisker down to about 0 would take all of the axis
    elif log:
        # From 0 to the first power of ten is as far as from there to the next.
        set_scale("symlog", base=10, linthresh=10.0 ** math.floor(math.log10(min(sizes))), linscale=0.9)
        ends = [end if least < 0 else max(end, 0) for end in ends]
    low, high = _padded(axis, min(ends), max(ends))
    if percent and not log and least >= 0 and most <= 100:
        low, high = 0, 100
    if is_across:
        axes.set_xlim(low, high)
    else:
        axes.set_ylim(low, high)
    if log:
        _set_ticks(axis, _log_ticks(low, high, min(sizes)))
    else:
        axis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
        axis.set_major_formatter(FuncFormatter(lambda x, _: _number(x, not 1e-4 <= abs(x) < 1e7)))


def _scale_places(axes: Axes, places: Sequence[float]) -> None:
    """Makes the horizontal axis logarithmic, but linear from 0 to the least place above it; ticks where places are."""
    if not places:
        axes.set_xticks([])
        return
    positive = [x for x in places if x > 0]
    if positive:
        # From 0 to the least place is as far as from a place to the next, so that 0 does not lie on the least place of
        # a sweep in powers of ten.
        step = max(1.1, median(b / a for a, b in pairwise(positive))) if len(positive) > 1 else 2
        axes.set_xscale("symlog", base=step, linthresh=positive[0], linscale=1 - 1 / step)
    axes.set_xlim(*_padded(axes.xaxis, places[0], places[-1]))
    _set_ticks(axes.xaxis, places)


def _padded(axis: Axis, low: float, high: float) -> tuple[float, float]:
    """The limits, and a twentieth of what is between them at each side, as the axis' scale has it."""
    transform = axis.get_transform()
    start, end = transform.transform(np.array([low, high])).tolist()
    pad = 0.05 * (end - start) or abs(start) / 10 or 0.5
    low, high = transform.inverted().transform(np.array([start - pad, end + pad])).tolist()
    return low, high


def _set_ticks(axis: Axis, ticks: Sequence[float]) -> None:
    has_powers = any(x != 0 and not 1e-3 <= abs(x) < 1e5 for x in ticks)
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda x, _: _number(x, has_powers)))


def _log_ticks(low: float, high: float, first: float) -> list[float]:
    """Powers of ten between the limits, from that of `first` where 0 is there as well; about five a sign."""
    start = math.floor(math.log10(low if low > 0 else first))
    stop = math.floor(math.log10(max(high, -low))) + 1
    factors = (1, 2, 5) if stop - start < 3 else (1,)
    sizes = [factor * 10.0**power for power in range(start, stop, math.ceil((stop - start) / 5)) for factor in factors]
    return [x for x in sorted({0.0, *sizes, *(-size for size in sizes)}) if low <= x <= high]


def _number(x: float, has_powers: bool) -> str:
    """The number of a tick, as a multiple of a power of ten where that is wanted."""
    if x == 0:
        return "0"  # -0.0 as well
    if not has_powers:
        return f"{x:,.6g}".replace("-", "−")
    factor, power = f"{x:.6e}".split("e")
    factor = factor.rstrip("0").rstrip(".").replace("-", "−")
    power = f"10{str(int(power)).translate(SUPERSCRIPTS)}"
    return power if factor == "1" else f"{factor}·{power}"


def _room(columns: int) -> float:
    """Width in points, or a little less, of the horizontal axis of each of this many panels."""
    return (72 * max(PANEL_WIDTH * min(columns, 2), WIDEST / 4 * columns) - NAME_WIDTH) / columns - 16


def _add_legend(figure: Figure, handles: Sequence[Line2D], names: Sequence[str]) -> None:
    """Names the handles above all panels, in as few lines as the figure's width allows."""
    room = figure.get_figwidth() * 72 - 24
    # A name that begins with "_" would be left out.
    texts = [wrapped(name, room - 20) if not name.startswith("_") else f" {wrapped(name, room - 20)}" for name in names]
    widest = max((text_width(line) for text in texts for line in text.splitlines()), default=0.0) + 28
    figure.legend(
        handles,
        texts,
        loc="outside upper center",
        ncols=max(1, min(len(handles), int(room // widest))),
        frameon=False,
        fontsize=FONT_SIZE,
        handlelength=1.6,
        handletextpad=0.5,
        columnspacing=1.6,
        labelspacing=0.35,
        borderaxespad=0.6,
        borderpad=0.1,
    )


def _lay_out(figure: Figure) -> None:
    """Puts everything in its place, as saving would."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)


def _save(figure: Figure, rows: int, height: float, path: Path) -> None:
    """Writes the figure, its axes in so many rows, each of a height in inches.

    Labels of horizontal ticks are left out where they would touch the one before.
    """
    _lay_out(figure)
    # What the names, titles and labels around the axes need is now known.
    now = figure.axes[0].get_position().height * figure.get_figheight()
    figure.set_figheight(figure.get_figheight() + rows * (height - now))
    _lay_out(figure)
    for axes in figure.axes:
        end = -math.inf
        for label in axes.get_xticklabels():
            box = label.get_window_extent()
            label.set_visible(label.get_visible() and box.x0 > end)
            if label.get_visible():
                end = box.x1 + 3 * DPI / 72
    save_png(figure, path)
