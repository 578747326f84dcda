"""Two figures of what attacks do: how accuracy falls and loss grows, and where the experts look before and after.

Drawn as those of `figures` are, with its fonts, colours and layout.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from matplotlib.ticker import NullLocator, StrMethodFormatter
from torch import Tensor

from immunity_fast.figures import (
    COLORS,
    FONT_SIZE,
    LEGEND_WIDTH,
    add_titles,
    check_heatmaps,
    draw_heatmaps,
    panel_figure,
    panel_style,
    save_png,
    say_empty,
    style_axes,
)

MARKERS = ("o", "s", "^", "D", "v", "X", "P")  # one more than COLORS, so that a seventh curve is not like the first
HEIGHT = 2.25  # inches, without the names of the curves
AXIS_WIDTH = 190.0  # points, a little less than the horizontal axis of a panel whose vertical one has a label

Points = Sequence[Mapping[str, Any]]


def robustness_figure(accuracy_by_eps: Mapping[str, Points], loss_by_steps: Mapping[str, Points], path: Path) -> None:
    """Draws accuracy against an attack's radius beside its loss against its number of steps into a PNG.

    There is one panel where the other mapping is empty. Points are drawn in the order of their eps or steps, on an axis
    that is logarithmic from the least one above 0 and linear below; a point without a finite eps or steps is left out,
    and a value that is missing or not finite leaves a gap in its line or band.

    Args:
        accuracy_by_eps: name of a curve → points {"eps": radius ≥ 0 in units of [0, 1], "accuracy": fraction,
            "interval": its bounds [low, high], fractions, may be missing}.
        loss_by_steps: name of a curve → points {"steps": count ≥ 0, "loss": mean loss of the attacked images}; other
            keys, such as "accuracy" and its "interval", are ignored.
        path: the PNG file to write.

    Raises:
        ValueError: if both mappings are empty.
    """
    if not accuracy_by_eps and not loss_by_steps:
        raise ValueError("accuracy_by_eps, loss_by_steps: at least one must hold a curve, got two empty mappings")
    names = dict.fromkeys([*accuracy_by_eps, *loss_by_steps])  # one name looks the same in both panels
    looks = dict(zip(names, zip(cycle(COLORS), cycle(MARKERS), strict=False), strict=False))
    titles = ["Accuracy against ε"] * bool(accuracy_by_eps) + ["Loss against steps"] * bool(loss_by_steps)
    with panel_style():
        figure = panel_figure(len(titles), HEIGHT)
        row = [figure.add_subplot(1, len(titles), i + 1) for i in range(len(titles))]
        if accuracy_by_eps:
            _draw_curves(row[0], accuracy_by_eps, looks, ("eps", "accuracy"), (255, 100))
            row[0].set_xlabel("ε, in 1/255", labelpad=1)
            row[0].set_ylabel("accuracy (%)", labelpad=2)
            row[0].set_ylim(0, 100)
        if loss_by_steps:
            _draw_curves(row[-1], loss_by_steps, looks, ("steps", "loss"))
            row[-1].set_xlabel("steps", labelpad=1)
            row[-1].set_ylabel("mean loss of the attacked images", labelpad=2)
            row[-1].yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        pad = add_titles(row, titles, LEGEND_WIDTH - 12)
        figure.set_figheight(HEIGHT + pad / 72)
        save_png(figure, path)


def attacked_heatmap_figure(
    clean: Tensor,
    attacked: Tensor,
    clean_heatmaps: Tensor,
    attacked_heatmaps: Tensor,
    row_labels: Sequence[tuple[str, str]],
    path: Path,
) -> None:
    """Draws `heatmap_figure` of every clean image with that of the attacked one directly beneath it into a PNG.

    The two rows of an image stand close together, those of different images apart. Each heatmap is scaled by its own
    maximum, as there.

    Args:
        clean: (n, 3, H, W), floats in [0, 1].
        attacked: (n, 3, H, W), floats in [0, 1], in the order of `clean`.
        clean_heatmaps: (N, n, H, W), ≥ 0, one an expert and clean image, unnormalised.
        attacked_heatmaps: (N, n, H, W), ≥ 0, those of the attacked images.
        row_labels: n pairs of texts, of the clean image and of the attacked one, such as ("clean\\ncat → cat",
            "attacked\\ncat → dog"); long lines are wrapped.
        path: the PNG file to write.

    Raises:
        ValueError: if a shape or the number of labels does not fit.
    """
    check_heatmaps(clean, clean_heatmaps, ("clean", "clean_heatmaps"))
    for name, tensor, like in (
        ("attacked", attacked, clean),
        ("attacked_heatmaps", attacked_heatmaps, clean_heatmaps),
    ):
        if tensor.shape != like.shape:
            raise ValueError(f"{name} must have the clean ones' shape {tuple(like.shape)}, got {tuple(tensor.shape)}")
    if len(row_labels) != len(clean) or any(len(pair) != 2 for pair in row_labels):
        lengths = [len(pair) for pair in row_labels]
        raise ValueError(f"row_labels must hold {len(clean)} pairs, one an image, got tuples of lengths {lengths}")
    images = _alternate(clean, attacked, 0)
    heatmaps = _alternate(clean_heatmaps, attacked_heatmaps, 1)
    draw_heatmaps(images, heatmaps, [text for pair in row_labels for text in pair], path, group=2)


def _alternate(first: Tensor, second: Tensor, axis: int) -> Tensor:
    """The slices of both along this axis by turns, in float32."""
    pair = [tensor.detach().float().cpu() for tensor in (first, second)]
    return torch.stack(pair, axis + 1).flatten(axis, axis + 1)


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


def wrapped(text: str, width: float) -> str:
    """The text in as many lines as it needs in a width in points."""
    for length in range(60, 0, -2):
        lines = textwrap.fill(text, length)
        if all(text_width(line) <= width for line in lines.splitlines()):
            break
    return lines.replace("$", r"\$")  # a dollar sign would start a formula


def marker_size(marker: str) -> float:
    """In points; crosses look smaller than what is filled."""
    return 4.6 if marker in "XP" else 3.4


def text_width(line: str) -> float:
    """Width in points of a line of text, as names and ticks are written."""
    width, _, _ = text_to_path.get_text_width_height_descent(line, FontProperties(size=FONT_SIZE - 0.5), ismath=False)
    return float(width)


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
