"""Where each expert looks: heatmaps over images, clean ones and attacked ones beneath them."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath
from torch import Tensor

from immunity_fast.reporting.style import DPI, FONT_SIZE, INK, drawable, save_png

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


def _text_width(line: str, font: FontProperties) -> int:
    """Width in pixels of one line of text."""
    return math.ceil(TextPath((0, 0), line, prop=font).get_extents().width * DPI / 72) if line.strip() else 0


def _alternate(first: Tensor, second: Tensor, axis: int) -> Tensor:
    """The slices of both along this axis by turns, in float32."""
    pair = [tensor.detach().float().cpu() for tensor in (first, second)]
    return torch.stack(pair, axis + 1).flatten(axis, axis + 1)
