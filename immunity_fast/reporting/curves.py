"""How training went, and what attacks do: accuracy against their radius, loss against their steps."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from immunity_fast.reporting.style import (
    COLORS,
    LEGEND_WIDTH,
    MARKERS,
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

MARKED_RECORDS = 30  # up to as many records each point has a marker
HEIGHT = 2.25  # inches, without the names of the curves
AXIS_WIDTH = 190.0  # points, a little less than the horizontal axis of a panel whose vertical one has a label
Points = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class _Panel:
    """One of the small multiples: its title, its lines (record key → name), and how its values are shown."""

    title: str
    lines: Mapping[str, str]
    factor: float = 1.0
    log: bool = False
    from_zero: bool = False


PANELS = (
    _Panel(
        "Training loss",
        {"loss": "total", "cross_entropy": "cross-entropy", "mutual_information_loss": "mutual information"},
    ),
    _Panel(
        "Accuracy on validation images (%)",
        {
            "val_accuracy_sample": "gate sample",
            "val_accuracy_mean": "gate mean",
            "val_fgsm_accuracy_mean": "gate mean, under FGSM",
            "val_pgd10_accuracy_mean": "gate mean, under PGD-10",
        },
        factor=100,
    ),
    _Panel("Position stability", {"position_stability": "training, pixels⁴"}, log=True),
    _Panel(
        "Mutual information (nats)",
        {"mutual_information": "training", "val_mutual_information": "validation"},
        from_zero=True,
    ),
    _Panel("Dead heatmaps, validation (%)", {"val_dead_heatmaps": ""}, factor=100, from_zero=True),
    _Panel("Training images per second", {"images_per_second": ""}, from_zero=True),
)


def training_curves(records: Sequence[Mapping[str, float]], path: Path) -> None:
    """Draws what was recorded after each epoch as small multiples into a PNG.

    A panel shows the keys that are in at least one record, and is left out where there is none; a value that is not
    finite leaves a gap in its line.

    Args:
        records: one an epoch. "epoch" is the place on the horizontal axis (without it, 1, 2, …). Drawn are the losses
            "loss", "cross_entropy", "mutual_information_loss" and "position_stability"; as fractions,
            "val_accuracy_sample", "val_accuracy_mean", "val_fgsm_accuracy_mean", "val_pgd10_accuracy_mean" and
            "val_dead_heatmaps"; in nats, "mutual_information" and "val_mutual_information"; and "images_per_second".
        path: the PNG file to write.

    Raises:
        ValueError: if no record has any of these keys.
    """
    known = {key for record in records for key in record}
    panels = [panel for panel in PANELS if known.intersection(panel.lines)]
    if not panels:
        raise ValueError(f"records: expected at least one value to draw, got {len(records)} records with {known or {}}")

    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    epochs = [record.get("epoch", i + 1) for i, record in enumerate(records)]
    pad = 0.04 * (max(epochs) - min(epochs)) or 0.5
    with panel_style():
        figure = panel_figure(columns, height=1.8 * rows)
        drawn = [figure.add_subplot(rows, columns, i + 1) for i in range(len(panels))]
        for i, (axes, panel) in enumerate(zip(drawn, panels, strict=True)):
            _draw_panel(axes, panel, epochs, records)
            axes.set_xlim(min(epochs) - pad, max(epochs) + pad)
            if i + columns >= len(panels):
                axes.set_xlabel("epoch", labelpad=1)
        for i in range(0, len(panels), columns):
            titles = [panel.title for panel in panels[i : i + columns]]
            add_titles(drawn[i : i + columns], titles)
        save_png(figure, path)


def _draw_panel(axes: Axes, panel: _Panel, epochs: Sequence[float], records: Sequence[Mapping[str, float]]) -> None:
    drawn: list[float] = []
    for (key, name), color in zip(panel.lines.items(), COLORS, strict=False):
        points = [(x, r[key] * panel.factor) for x, r in zip(epochs, records, strict=True) if key in r]
        if not points:
            continue
        values = [value if math.isfinite(value) else math.nan for _, value in points]
        drawn += [value for value in values if not math.isnan(value)]
        marker = "o" if len(records) <= MARKED_RECORDS else ""
        axes.plot([x for x, _ in points], values, color=color, label=name, lw=1.1, marker=marker, ms=2.2, clip_on=False)

    style_axes(axes)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    if not drawn:
        say_empty(axes)
    elif panel.log and 0 < 5 * min(drawn) <= max(drawn):  # in a narrower range a log axis may have no labels
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
    elif panel.from_zero and min(drawn) >= 0:
        # Some room above, so that an all-zero line does not stretch rounding noise over the panel.
        axes.set_ylim(0, max(1.08 * max(drawn), panel.factor / 100))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))  # no power of ten above the axis, where the title is


def robustness_figure(
    accuracy_by_eps: Mapping[str, Points],
    loss_by_steps: Mapping[str, Points],
    path: Path,
    accuracy_by_draws: Mapping[str, Points] | None = None,
) -> None:
    """Draws accuracy against an attack's radius, its loss against its steps, and accuracy against draws into a PNG.

    There is no panel for an empty mapping. Points are drawn in the order of their eps, steps or draws, on an axis that
    is logarithmic from the least one above 0 and linear below; a point without a finite one is left out, and a value
    that is missing or not finite leaves a gap in its line or band.

    Args:
        accuracy_by_eps: name of a curve → points {"eps": radius ≥ 0 in units of [0, 1], "accuracy": fraction,
            "interval": its bounds [low, high], fractions, may be missing}.
        loss_by_steps: name of a curve → points {"steps": count ≥ 0, "loss": mean loss of the attacked images}; other
            keys, such as "accuracy" and its "interval", are ignored.
        path: the PNG file to write.
        accuracy_by_draws: name of a curve → points {"draws": count ≥ 1 that an attack averages, "accuracy": fraction,
            "interval": see above}.

    Raises:
        ValueError: if all mappings are empty.
    """
    by_draws = accuracy_by_draws or {}
    if not accuracy_by_eps and not loss_by_steps and not by_draws:
        raise ValueError("accuracy_by_eps, loss_by_steps: expected a curve in at least one, got empty mappings")
    names = dict.fromkeys([*accuracy_by_eps, *loss_by_steps, *by_draws])  # one name looks the same in all panels
    looks = dict(zip(names, zip(cycle(COLORS), cycle(MARKERS), strict=False), strict=False))
    panels = {
        "Accuracy against ε": accuracy_by_eps,
        "Loss against steps": loss_by_steps,
        "Accuracy against draws": by_draws,
    }
    titles = [title for title, curves in panels.items() if curves]
    with panel_style():
        figure = panel_figure(len(titles), HEIGHT)
        row = [figure.add_subplot(1, len(titles), i + 1) for i in range(len(titles))]
        if accuracy_by_eps:
            _draw_curves(row[0], accuracy_by_eps, looks, ("eps", "accuracy"), (255, 100))
            row[0].set_xlabel("ε, in 1/255", labelpad=1)
            row[0].set_ylabel("accuracy (%)", labelpad=2)
            row[0].set_ylim(0, 100)
        if loss_by_steps:
            panel = row[titles.index("Loss against steps")]
            _draw_curves(panel, loss_by_steps, looks, ("steps", "loss"))
            panel.set_xlabel("steps", labelpad=1)
            panel.set_ylabel("mean loss of the attacked images", labelpad=2)
            panel.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        if by_draws:
            _draw_curves(row[-1], by_draws, looks, ("draws", "accuracy"), (1, 100))
            row[-1].set_xlabel("draws in a gradient", labelpad=1)
            row[-1].set_ylabel("expected accuracy (%)", labelpad=2)
            row[-1].set_ylim(0, 100)
        pad = add_titles(row, titles, LEGEND_WIDTH - 12)
        figure.set_figheight(HEIGHT + pad / 72)
        save_png(figure, path)


def _draw_curves(
    axes: Axes,
    curves: Mapping[str, Points],
    looks: Mapping[str, tuple[str, str]],
    keys: tuple[str, str],
    factors: tuple[float, float] = (1, 1),
) -> None:
    """Draws the curves in their colours and markers.

    The keys of a point's place and value, and the factors that both are multiplied by, are in the order across, up; an
    accuracy's interval is drawn where there is one.
    """
    # A point's interval is that of its accuracy.
    interval = _interval if keys[1] == "accuracy" else (lambda _point: (math.nan, math.nan))
    drawn: list[float] = []
    places: set[float] = set()
    for name, points in curves.items():
        # Rounded, so that 8 / 255 * 255 and 8 are one place.
        rows = [
            [round(factors[0] * x, 6), *(factors[1] * y for y in (_number(point.get(keys[1])), *interval(point)))]
            for point in points
            if math.isfinite(x := _number(point.get(keys[0])))
        ]
        rows = sorted(rows, key=lambda row: row[0]) or [[math.nan] * 4]  # a line without points would upset the layout
        xs, values, low, high = np.array(rows).T
        color, marker = looks[name]
        if np.isfinite(low).any():
            axes.fill_between(xs, low, high, color=color, alpha=0.15, linewidth=0 if len(xs) > 1 else 3)
        line = axes.plot(
            xs, values, color=color, label=wrapped(name, AXIS_WIDTH), lw=1.1, marker=marker, clip_on=False
        )[0]
        # Above the axes' own lines, since curves end at 0.
        line.set(markersize=marker_size(marker), markeredgecolor="white", markeredgewidth=0.3, zorder=3)
        drawn += values[np.isfinite(values)].tolist()
        places.update(xs[np.isfinite(xs)].tolist())
    style_axes(axes)
    _scale(axes, sorted(places))
    if not drawn:
        say_empty(axes)


def _number(value: Any) -> float:
    """The value; NaN for what is missing or not finite."""
    return float(value) if value is not None and math.isfinite(value) else math.nan


def _interval(point: Mapping[str, Any]) -> tuple[float, float]:
    low, high = point.get("interval") or (None, None)
    return _number(low), _number(high)


def _scale(axes: Axes, places: Sequence[float]) -> None:
    """Makes the horizontal axis logarithmic, but linear from 0 to the least place above it; ticks where places are."""
    if not places:
        axes.set_xticks([])
        return
    if places[-1] > 0:
        # From 0 to the least place is as far as from there to its double.
        axes.set_xscale("symlog", base=2, linthresh=min(x for x in places if x > 0), linscale=0.5)
    transform = axes.xaxis.get_transform()
    positions = transform.transform(np.array(places))
    span = float(positions[-1] - positions[0])
    pad = 0.04 * span or 0.5
    left, right = transform.inverted().transform(np.array([positions[0] - pad, positions[-1] + pad])).tolist()
    axes.set_xlim(left, right)

    # Where labels would touch, the first and the last stay, and of the others those that have room, from the left.
    labels = [f"{x:,.6g}" for x in places]
    halves = [text_width(label) / 2 + 1.5 for label in labels]
    centres = (positions - positions[0]) / (span + 2 * pad) * AXIS_WIDTH
    kept = [0]
    for i in range(1, len(places)):
        clear = centres[i] - halves[i] >= centres[kept[-1]] + halves[kept[-1]]
        if clear and (i == len(places) - 1 or centres[i] + halves[i] <= centres[-1] - halves[-1]):
            kept.append(i)
    axes.set_xticks([places[i] for i in kept], [labels[i] for i in kept])
    axes.xaxis.set_minor_locator(NullLocator())
