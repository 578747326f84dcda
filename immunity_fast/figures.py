"""Two figures of a run folder: where each expert looks, how training went. Those of attacks: `robustness_figures`.

All are drawn with `matplotlib.figure.Figure` itself, so that no display and no global pyplot state is involved.
"""

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.textpath import TextPath
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter
from matplotlib.transforms import ScaledTranslation
from torch import Tensor

from immunity_fast.runtime.files import write_atomically

DPI = 256  # a power of two: whole pixels are exact as inches, and an image's pixels stay equal squares
FONT_SIZE = 7.0  # points
INK = "#222222"

# Heatmaps
CELL = 256  # pixels, about the longer side of one picture in the heatmap figure
GAP = 10  # pixels between two pictures
GROUP_GAP = 44  # pixels between two groups of rows
COLORMAP = "inferno"


def heatmap_figure(images: Tensor, heatmaps: Tensor, row_labels: Sequence[str], path: Path) -> None:
    """Draws every image beside the heatmap of each expert (as Figure 2 of arXiv 2402.18787) into a PNG.

    Each heatmap is scaled by its own maximum, since Grad-CAM's magnitude differs between experts by orders of
    magnitude. One that is zero everywhere shows the bare image, marked "dead"; one that has a NaN or an infinity,
    marked "not finite".

    Args:
        images: (n, 3, H, W), floats in [0, 1].
        heatmaps: (N, n, H, W), ≥ 0, one an expert and image, unnormalised.
        row_labels: n texts, such as "cat → dog"; long ones are wrapped.
        path: the PNG file to write.

    Raises:
        ValueError: if a shape or the number of labels does not fit.
    """
    check_heatmaps(images, heatmaps)
    if len(row_labels) != len(images):
        raise ValueError(f"row_labels must hold {len(images)} texts, one an image, got {len(row_labels)}")
    draw_heatmaps(images, heatmaps, row_labels, path)


def save_png(figure: Figure, path: Path) -> None:
    """Writes a figure so that a reader of `path` never sees half of one; OSError, by its name, where that fails."""
    content = io.BytesIO()
    figure.savefig(content, dpi=DPI, format="png")
    write_atomically(path, content.getvalue())


def check_heatmaps(images: Tensor, heatmaps: Tensor, names: tuple[str, str] = ("images", "heatmaps")) -> None:
    """Raises ValueError, by these names, unless images are (n, 3, H, W) and heatmaps (N, n, H, W), none of them 0."""
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ValueError(f"{names[0]} must have shape (n, 3, H, W), none of them 0, got {tuple(images.shape)}")
    count, _, height, width = images.shape
    if heatmaps.ndim != 4 or heatmaps.shape[0] == 0 or heatmaps.shape[1:] != (count, height, width):
        expected = f"(N, {count}, {height}, {width}), N ≥ 1, to fit {names[0]} {tuple(images.shape)}"
        raise ValueError(f"{names[1]} must have shape {expected}, got {tuple(heatmaps.shape)}")


def draw_heatmaps(images: Tensor, heatmaps: Tensor, row_labels: Sequence[str], path: Path, group: int = 1) -> None:
    """`heatmap_figure`, its arguments checked, with a wider gap after each `group` rows where group > 1."""
    count, _, height, width = images.shape
    pictures = images.detach().float().clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
    maps = heatmaps.detach().float().cpu().numpy()
    greys = pictures @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    # Lines break before an arrow rather than after it; a dollar sign would otherwise start a formula.
    lines = [text.replace("→ ", "→\u00a0").splitlines() for text in row_labels]
    labels = ["\n".join(textwrap.fill(line, 18) for line in text).replace("$", r"\$") for text in lines]
    labels, families = drawable(labels)
    font = FontProperties(size=FONT_SIZE, family=families)

    # The layout is counted in whole pixels, from the top left; a small image is enlarged by a whole factor.
    scale = max(1, round(CELL / max(height, width))) if max(height, width) <= CELL else CELL / max(height, width)
    cell_width, cell_height = max(1, round(width * scale)), max(1, round(height * scale))
    label_width = max((_text_width(line, font) for label in labels for line in label.splitlines()), default=0)
    left, top = label_width + 3 * GAP, 42
    # Twice the gap after the input, to set it apart.
    columns = [left] + [left + i * (cell_width + GAP) + GAP for i in range(1, len(maps) + 1)]
    between = GROUP_GAP - GAP if group > 1 else 0
    rows = [top + i * (cell_height + GAP) + i // group * between for i in range(count)]
    bar_left, bar_height = columns[-1] + cell_width + 2 * GAP, min(rows[-1] + cell_height - top, CELL)
    total_width, total_height = bar_left + 100, rows[-1] + cell_height + 2 * GAP

    figure = Figure(figsize=(total_width / DPI, total_height / DPI), dpi=DPI, facecolor="white")

    def add_axes(x: int, y: int, w: int, h: int) -> Axes:
        # matplotlib 3.8 rounds the size of an image up: of 256 + 1e-13 pixels it makes 257, and rows come out shifted.
        extent = ((w - 1e-6) / total_width, (h - 1e-6) / total_height)
        return figure.add_axes((x / total_width, 1 - (y + h) / total_height, *extent))

    def add_text(x: float, y: float, text: str, align: str, valign: str) -> None:
        position = (x / total_width, 1 - y / total_height)
        figure.text(*position, text, ha=align, va=valign, color=INK, fontproperties=font, linespacing=1.15)

    for x, title in zip(columns, ["input", *(f"expert {i + 1}" for i in range(len(maps)))], strict=True):
        add_text(x + cell_width / 2, top - GAP, title, "center", "baseline")
    for row, y in enumerate(rows):
        add_text(left - 2 * GAP, y + cell_height / 2, labels[row], "right", "center")
        grey = np.repeat(greys[row][..., None], 3, axis=-1)
        for column, x in enumerate(columns):
            picture, mark = pictures[row], ""
            if column > 0:
                heatmap = maps[column - 1, row]
                peak = float(heatmap.max())
                if math.isfinite(peak) and peak > 0:
                    picture = _blend(grey, heatmap / peak)
                else:
                    picture, mark = grey, "dead" if peak <= 0 else "not finite"
            axes = add_axes(x, y, cell_width, cell_height)
            axes.set_axis_off()
            # "antialiased" is nearest for a whole factor, and smooths where a large image is shrunk.
            axes.imshow(picture, aspect="auto", interpolation="antialiased", vmin=0, vmax=1)
            if mark:
                box = {"boxstyle": "round,pad=0.35", "facecolor": "black", "edgecolor": "none", "alpha": 0.75}
                text = axes.text(0.5, 0.5, mark, color="white", fontproperties=font, bbox=box)
                text.set(transform=axes.transAxes, ha="center", va="center")

    bar = figure.colorbar(ScalarMappable(cmap=COLORMAP), cax=add_axes(bar_left, top, 16, bar_height), ticks=[0, 1])
    bar.outline.set_visible(False)
    bar.ax.set_yticklabels(["0", "max"], fontproperties=font, color=INK)
    bar.ax.tick_params(length=0, pad=2)
    save_png(figure, path)


def _blend(grey: np.ndarray, heatmap: np.ndarray) -> np.ndarray:
    """The heatmap (H, W), in [0, 1], in colour over the grey picture (H, W, 3), in [0, 1]."""
    # Where the heatmap is 0 the image stays legible, but darker than any focus; at its maximum the colour prevails.
    share = 0.4 + 0.45 * heatmap[..., None]
    blended: np.ndarray = (1 - share) * grey + share * matplotlib.colormaps[COLORMAP](heatmap)[..., :3]
    return blended


def drawable(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Texts that can be drawn, and the families of fonts that have all their characters, the usual ones first.

    Where those lack some, as they do those of Chinese, Japanese and Korean, others follow that are installed and have
    them; what none has is replaced by □.
    """
    families = list(matplotlib.rcParams["font.family"])
    fonts = [get_font(findfont(FontProperties(family=[family]))) for family in families]
    characters = set("".join(texts)) - {"\n"}
    missing = {c for c in characters if not any(font.get_char_index(ord(c)) for font in fonts)}
    for family in dict.fromkeys(entry.name for entry in fontManager.ttflist) if missing else ():
        if family.startswith("Last Resort"):  # which has a box for each script
            continue
        with suppress(RuntimeError, OSError, ValueError):  # a font of pictures, or a broken one
            font = get_font(findfont(FontProperties(family=[family]), fallback_to_default=False))
            has = {c for c in missing if font.scalable and font.get_char_index(ord(c))}
            if has:
                families.append(family)
                missing -= has
    replaced = str.maketrans(dict.fromkeys(missing, "□"))
    return [text.translate(replaced) for text in texts], families


def _text_width(line: str, font: FontProperties) -> int:
    """Width in pixels of one line of text."""
    return math.ceil(TextPath((0, 0), line, prop=font).get_extents().width * DPI / 72) if line.strip() else 0


@dataclass(frozen=True)
class _Panel:
    """One of the small multiples: its title, its lines (record key → name), and how its values are shown."""

    title: str
    lines: Mapping[str, str]
    factor: float = 1.0
    log: bool = False
    from_zero: bool = False


# Blue, vermilion, green, black, sky blue and orange of Okabe and Ito's palette, told apart by the colour-blind too (its
# purple is not, from green).
COLORS = ("#0072b2", "#d55e00", "#009e73", INK, "#56b4e9", "#e69f00")
PANEL_WIDTH = 3.5  # inches
LEGEND_WIDTH = 214.0  # points, a little less than the axes of a panel
MARKED_RECORDS = 30  # up to as many records each point has a marker

PANELS = (
    _Panel(
        "Training loss",
        {"loss": "total", "cross_entropy": "cross-entropy", "mutual_information_loss": "mutual information"},
    ),
    _Panel(
        "Accuracy on validation images (%)",
        {
            "val_accuracy_switching": "gate switching",
            "val_accuracy_mean": "mean of experts",
            "val_fgsm_accuracy_mean": "mean, under FGSM",
            "val_pgd10_accuracy_mean": "mean, under PGD-10",
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
            "val_accuracy_switching", "val_accuracy_mean", "val_fgsm_accuracy_mean", "val_pgd10_accuracy_mean" and
            "val_dead_heatmaps"; in nats, "mutual_information" and "val_mutual_information"; and "images_per_second".
        path: the PNG file to write.

    Raises:
        ValueError: if no record has any of these keys.
    """
    known = {key for record in records for key in record}
    panels = [panel for panel in PANELS if known.intersection(panel.lines)]
    if not panels:
        raise ValueError(f"records must hold at least one value to draw, got {len(records)} records with {known or {}}")

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


def panel_style() -> AbstractContextManager[None]:
    """The fonts and inks in which `panel_figure` is to be filled and saved."""
    return matplotlib.rc_context({"font.size": FONT_SIZE, "text.color": INK, "axes.labelcolor": INK})


def panel_figure(columns: int, height: float) -> Figure:
    """An empty figure of this many panels' width, for axes side by side; its height is in inches."""
    layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06, wspace=0.03, hspace=0.04)
    return Figure(figsize=(PANEL_WIDTH * columns, height), dpi=DPI, facecolor="white", layout=layout)


def style_axes(axes: Axes) -> None:
    """Two thin axes, small ticks, and faint lines across."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color="#888888", linewidth=0.6)
    axes.tick_params(which="both", length=2, width=0.6, color="#888888", labelcolor=INK, labelsize=FONT_SIZE - 0.5)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.5)
    axes.set_axisbelow(True)


def say_empty(axes: Axes) -> None:
    """Says in place of lines that there are none."""
    axes.set_yticks([])
    axes.text(0.5, 0.5, "no finite value", transform=axes.transAxes, ha="center", va="center")


def add_titles(row: Sequence[Axes], titles: Sequence[str], width: float = LEGEND_WIDTH) -> float:
    """Gives axes that stand side by side their titles, at one height, and beneath these the names of their lines.

    The names are between title and axes, where they can hide nothing, in as few lines as this width, in points, allows.

    Returns:
        What this takes above the axes, without the titles themselves, in points.
    """
    heights = [_add_legend(axes, width) for axes in row]
    pad = 5 if max(heights) == 0 else max(heights) + 7.2
    for axes, title, height in zip(row, titles, heights, strict=True):
        # Beside one with more names, a title would stand away from its axes: what names it has hang under the title.
        legend = axes.get_legend()
        if legend is not None and height < max(heights):
            lift = ScaledTranslation(0, (max(heights) - height) / 72, axes.figure.dpi_scale_trans)
            legend.set_bbox_to_anchor((0, 1), transform=axes.transAxes + lift)
        axes.set_title(title, loc="left", fontsize=FONT_SIZE + 0.5, fontweight="bold", pad=pad)
    return pad


def _add_legend(axes: Axes, width: float) -> float:
    """Names the lines of the axes right above them; the height of it in points, 0 where no line has a name."""
    lines, names = axes.get_legend_handles_labels()
    for rows in range(1, len(lines) + 1):
        legend = axes.legend(
            lines,
            names,
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=math.ceil(len(lines) / rows),
            frameon=False,
            fontsize=FONT_SIZE - 0.5,
            handlelength=1.1,
            handletextpad=0.4,
            columnspacing=0.9,
            labelspacing=0.35,
            borderaxespad=0.2,
            borderpad=0.1,
        )
        box = legend.get_window_extent()
        if box.width * 72 / DPI <= width or rows == len(lines):
            return float(box.height * 72 / DPI)
    return 0.0
