"""Plots of a record: what forward and backward together gain or reach, against the bytes that they have to move."""

import itertools
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.cases import BOTH, COMPILED, EAGER, NAIVE, TRITON

COLOURS = {NAIVE: "#999999", EAGER: "#0072B2", COMPILED: "#E69F00", TRITON: "#009E73"}  # told apart by the colour-blind
MARKERS = "osD^v"
Point = tuple[float, float]


def speedup(row: dict[str, Any], by_variant: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Of the subject over each baseline, by how many times."""
    return dict(row["speedup"])


def share_of_copy(row: dict[str, Any], by_variant: dict[str, dict[str, Any]]) -> dict[str, float]:
    """What each variant reaches, in %."""
    return {variant: 100 * other["share_of_copy"] for variant, other in by_variant.items()}


QUANTITIES = {
    "speedup": (speedup, "Speed-up of {subject}"),
    "share_of_copy": (share_of_copy, "Share of the copy's bandwidth, %"),
}


def plot(cases: list[Any], quantity: str, title: str, out: Path) -> None:
    """One of `QUANTITIES` to a PNG file; a panel a group, dtype and layout, in the order of `cases`."""
    found = [(row, by_variant) for row, by_variant in cases if row["mode"] == BOTH]
    groups = list(dict.fromkeys(row["group"] for row, _ in found))
    kinds = list(dict.fromkeys((row["dtype"], row["layout"]) for row, _ in found))
    shapes = list(dict.fromkeys(shape_of(row) for row, _ in found))
    value, name = QUANTITIES[quantity]
    figure, axes = pyplot.subplots(
        len(kinds),
        len(groups),
        figsize=(1 + 3.8 * len(groups), 1.5 + 2.6 * len(kinds)),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    drawn = set()
    for (i, kind), (j, group) in itertools.product(enumerate(kinds), enumerate(groups)):
        panel = axes[i][j]
        lines: dict[tuple[str, str], list[Point]] = {}
        for row, by_variant in found:
            if (row["group"], row["dtype"], row["layout"]) == (group, *kind):
                for variant, y in value(row, by_variant).items():
                    lines.setdefault((variant, shape_of(row)), []).append((row["bytes"] / 1e6, y))
        if not lines:
            panel.set_axis_off()
            continue
        for (variant, shape), points in lines.items():
            drawn.add(variant)
            marker = MARKERS[shapes.index(shape) % len(MARKERS)]
            panel.plot(*zip(*points, strict=True), marker=marker, color=COLOURS[variant], markersize=5, linewidth=1)
        panel.set_title(f"{group}\n{', '.join(kind)}", fontsize=9)
        panel.set_xlabel("MB moved", fontsize=8)
        panel.tick_params(labelsize=8, labelleft=True)
        panel.grid(alpha=0.3)
        panel.set_xscale("log")
        if quantity == "speedup":
            panel.set_yscale("log")
            panel.axhline(1, color="black", linewidth=0.8, linestyle=":")
        else:
            panel.axhline(100, color="black", linewidth=0.8, linestyle=":")
        for axis, mark in ((panel.xaxis, "{x:g}"), (panel.yaxis, "{x:g}×")):
            if axis.get_scale() == "log":
                smallest, largest = axis.get_view_interval()
                axis.set_major_locator(LogLocator(subs=(1, 2, 5) if largest / smallest < 100 else (1,)))
                axis.set_major_formatter(mark)
                axis.set_minor_formatter(NullFormatter())
    if quantity == "share_of_copy":
        axes[0][0].set_ylim(-3, max(105, axes[0][0].get_ylim()[1]))
    subject = next(row["variant"] for row, _ in found)
    prefix = "over " if quantity == "speedup" else ""
    handles = [Line2D([], [], color=colour, label=prefix + v) for v, colour in COLOURS.items() if v in drawn]
    for shape, marker in zip(shapes, itertools.cycle(MARKERS), strict=False):
        handles.append(Line2D([], [], color="black", marker=marker, linestyle="", markersize=5, label=shape))
    figure.suptitle(f"{name.format(subject=subject)}, forward and backward\n{title}", fontsize=10)
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6), fontsize=8, frameon=False)
    figure.savefig(out, dpi=120)
    pyplot.close(figure)


def shape_of(row: dict[str, Any]) -> str:
    """(C, h, w), or K."""
    sizes = "×".join(map(str, row["shape"]))
    return sizes if len(row["shape"]) > 1 else f"K = {sizes}"
