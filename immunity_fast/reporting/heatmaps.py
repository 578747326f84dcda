"""Where each expert looks: heatmaps over images, clean ones and attacked ones beneath them."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.cm import ScalarMappable
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from torch import Tensor

from immunity_fast.reporting.canvas import Canvas, Cell
from immunity_fast.reporting.overlay import COLORMAP, as_rgb, grey_of, overlaid, state_of
from immunity_fast.reporting.style import DPI, FONT_SIZE, INK, drawable, save_png

CELL = 256  # pixels, about the longer side of one picture in the heatmap figure
GAP = 10  # pixels between two pictures
GROUP_GAP = 44  # pixels between two groups of rows
TOP = 42  # pixels above the first row, for the columns' titles of one line
LINE = 30  # pixels for each line more


def heatmap_figure(
    images: Tensor, heatmaps: Tensor, row_labels: Sequence[str], path: Path, titles: Sequence[str] | None = None
) -> None:
    """Draws every image beside the heatmap of each expert (as Figure 2 of arXiv 2402.18787) into a PNG.

    Each heatmap is scaled by its own maximum, since Grad-CAM's magnitude differs between experts by orders of
    magnitude. One that is zero everywhere shows the bare image, marked "dead"; one that has a NaN or an infinity,
    marked "not finite".

    Args:
        images: (n, C, H, W), floats in [0, 1]; where C is not 3 their mean over the channels is shown.
        heatmaps: (N, n, H, W), ≥ 0, one an expert and image, unnormalised.
        row_labels: n texts, such as "cat → dog"; long ones are wrapped.
        path: the PNG file to write.
        titles: 1 + N texts above the columns, wrapped likewise; None is "input", "expert 1", "expert 2", ….

    Raises:
        ValueError: if a shape or the number of texts does not fit.
    """
    check_heatmaps(images, heatmaps)
    if len(row_labels) != len(images):
        raise ValueError(f"row_labels: expected {len(images)} texts, one an image, got {len(row_labels)}")
    if titles is not None and len(titles) != 1 + len(heatmaps):
        raise ValueError(f"titles: expected {1 + len(heatmaps)} texts, one a column, got {len(titles)}")
    draw_heatmaps(images, heatmaps, row_labels, path, titles=titles)


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
        clean: (n, C, H, W), floats in [0, 1].
        attacked: (n, C, H, W), floats in [0, 1], in the order of `clean`.
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
            raise ValueError(f"{name}: expected the clean ones' shape {tuple(like.shape)}, got {tuple(tensor.shape)}")
    if len(row_labels) != len(clean) or any(len(pair) != 2 for pair in row_labels):
        lengths = [len(pair) for pair in row_labels]
        raise ValueError(f"row_labels: expected {len(clean)} pairs, one an image, got tuples of lengths {lengths}")
    images = _alternate(clean, attacked, 0)
    heatmaps = _alternate(clean_heatmaps, attacked_heatmaps, 1)
    draw_heatmaps(images, heatmaps, [text for pair in row_labels for text in pair], path, group=2)


def check_heatmaps(images: Tensor, heatmaps: Tensor, names: tuple[str, str] = ("images", "heatmaps")) -> None:
    """Check that images are (n, C, H, W) and heatmaps (N, n, H, W), none of them 0.

    Raises:
        ValueError: they are not; by these names.
    """
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"{names[0]}: expected shape (n, C, H, W), none of them 0, got {tuple(images.shape)}")
    count, _, height, width = images.shape
    if heatmaps.ndim != 4 or heatmaps.shape[0] == 0 or heatmaps.shape[1:] != (count, height, width):
        expected = f"(N, {count}, {height}, {width}), N ≥ 1, to fit {names[0]} {tuple(images.shape)}"
        raise ValueError(f"{names[1]}: expected shape {expected}, got {tuple(heatmaps.shape)}")


def draw_heatmaps(
    images: Tensor,
    heatmaps: Tensor,
    row_labels: Sequence[str],
    path: Path,
    group: int = 1,
    titles: Sequence[str] | None = None,
) -> None:
    """`heatmap_figure`, its arguments checked, with a wider gap after each `group` rows where group > 1."""
    count, _, height, width = images.shape
    pictures = as_rgb(images.detach().float().clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy())
    maps = heatmaps.detach().float().cpu().numpy()
    greys = grey_of(pictures)
    if titles is None:
        titles = ["input", *(f"expert {i + 1}" for i in range(len(maps)))]
    texts, font = _wrapped([*row_labels, *titles])
    labels, titles = texts[:count], texts[count:]
    layout = _Layout(len(maps), (height, width), labels, titles, font, count, group)
    canvas = Canvas(layout.width, layout.height, DPI)
    for x, title in zip(layout.lefts, titles, strict=True):
        canvas.text(x + layout.cell.width / 2, layout.tops[0] - GAP, title, font)
    for row, y in enumerate(layout.tops):
        canvas.text(layout.lefts[0] - 2 * GAP, y + layout.cell.height / 2, labels[row], font, "right", "center")
        canvas.picture(layout.lefts[0], y, layout.cell, pictures[row])
        for x, heatmap in zip(layout.lefts[1:], maps[:, row], strict=True):
            canvas.picture(x, y, layout.cell, overlaid(greys[row], heatmap))
            if state := state_of(heatmap):
                canvas.badge(x, y, layout.cell, state, font)
    _add_bar(canvas, layout, font)
    save_png(canvas.figure, path)


class _Layout:
    """Where everything stands, in pixels: pictures of one size in rows and columns, labels left, the bar right.

    Args:
        experts: columns beside the input's.
        size: (H, W) of the images; a small one is enlarged by a whole factor.
        labels: of the rows, in lines.
        titles: of the columns, in lines.
        font: theirs.
        count: rows.
        group: rows that stand close together.
    """

    def __init__(
        self,
        experts: int,
        size: tuple[int, int],
        labels: Sequence[str],
        titles: Sequence[str],
        font: FontProperties,
        count: int,
        group: int,
    ) -> None:
        longer = max(size)
        scale = max(1, round(CELL / longer)) if longer <= CELL else CELL / longer
        self.cell = Cell(*(max(1, round(side * scale)) for side in reversed(size)))
        left = max((_text_width(line, font) for label in labels for line in label.splitlines()), default=0) + 3 * GAP
        # Twice the gap after the input, to set it apart.
        self.lefts = [left] + [left + i * (self.cell.width + GAP) + GAP for i in range(1, experts + 1)]
        between = GROUP_GAP - GAP if group > 1 else 0
        top = TOP + LINE * max(title.count("\n") for title in titles)
        self.tops = [top + i * (self.cell.height + GAP) + i // group * between for i in range(count)]
        self.bar = (self.lefts[-1] + self.cell.width + 2 * GAP, top)
        bottom = self.tops[-1] + self.cell.height
        self.bar_size = (16, min(bottom - top, CELL))
        self.width, self.height = self.bar[0] + 100, bottom + 2 * GAP


def _wrapped(row_labels: Sequence[str]) -> tuple[list[str], FontProperties]:
    """The labels in lines, and a font that has their characters."""
    # Lines break before an arrow rather than after it.
    lines = [text.replace("→ ", "→\u00a0").splitlines() for text in row_labels]
    labels, families = drawable(["\n".join(textwrap.fill(line, 18) for line in text) for text in lines])
    return labels, FontProperties(size=FONT_SIZE, family=families)


def _add_bar(canvas: Canvas, layout: _Layout, font: FontProperties) -> None:
    """The bar that says which colour is which value, from 0 to the maximum."""
    axes = canvas.axes(*layout.bar, *layout.bar_size)
    bar = canvas.figure.colorbar(ScalarMappable(cmap=COLORMAP), cax=axes, ticks=[0, 1])
    bar.outline.set_visible(False)
    bar.ax.set_yticklabels(["0", "max"], fontproperties=font, color=INK)
    bar.ax.tick_params(length=0, pad=2)


def _text_width(line: str, font: FontProperties) -> int:
    """Width in pixels of one line of text."""
    width, _, _ = text_to_path.get_text_width_height_descent(line, font, ismath=False)
    return math.ceil(width * DPI / 72)


def _alternate(first: Tensor, second: Tensor, axis: int) -> Tensor:
    """The slices of both along this axis by turns, in float32."""
    pair = [tensor.detach().float().cpu() for tensor in (first, second)]
    return torch.stack(pair, axis + 1).flatten(axis, axis + 1)
