"""Figure 2 of arXiv 2402.18787 on paper: images beside the Grad-CAM heatmap of every expert."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.textpath import text_to_path

from immunity_fast.reporting.heatmaps import COLORMAP
from immunity_fast.reporting.style import INK
from immunity_fast.reproduction.gallery import Gallery, check_same, grey_of, picture_of, state_of, to_array

WIDTH = 6.9  # inches, both columns of a paper
HEIGHT = 8.6  # inches, what a page has beside its caption
DPI = 300

# The figure, in pixels of 1/DPI inch unless it says otherwise
MARGIN = 5
GAP = 9  # between two pictures
GROUP_GAP = 30  # between the input and a gallery, and between two
LARGEST, SMALLEST = 300, 60  # a picture's longer side
SIZE, SMALL = 7.0, 6.0  # points
WRONG = "#c0392b"
CROSS = "\u2717"
FONT = "DejaVu Sans"  # comes with matplotlib: the same figure everywhere


def draw(galleries: Sequence[Gallery], width: float = WIDTH) -> Figure:
    """The figure: a row an image, its input first, then a column an expert of each gallery.

    A heatmap is shown in colour over the grey image, scaled by its own maximum, since Grad-CAM's magnitude differs
    between experts by orders of magnitude. One that is zero everywhere shows the bare image, marked "dead"; one that
    has a NaN or an infinity, marked "not finite". Beneath the heatmap of an expert that is wrong stands a
    cross, with what it predicts.

    Args:
        galleries: at least one; all of the same images, labels and classes.
        width: inches, of the figure at most; it is less where the pictures would fill more than a page, and more where
            they would become too small to see.

    Raises:
        ValueError: no galleries, galleries of different images, labels or classes, or a width that is not positive.
    """
    check_same(galleries)
    if not 0 < width < math.inf:
        raise ValueError(f"width: expected a positive number of inches, got {width}")
    first = galleries[0]
    count, _, height_px, width_px = first.images.shape
    names = [_fit(first.classes[label], SIZE, 220) for label in first.labels.tolist()]
    predicted = [gallery.probabilities.argmax(-1) for gallery in galleries]
    any_wrong = any(bool((classes != first.labels).any()) for classes in predicted)
    marks = {state_of(heatmap) for gallery in galleries for heatmap in gallery.heatmaps.flatten(0, 1)} - {""}
    titled = any(gallery.title for gallery in galleries)

    # The layout is counted in pixels from the top left.
    label_width = max(math.ceil(_width(name, SIZE)) for name in names) + 14
    gaps = sum(GROUP_GAP + GAP * (gallery.experts - 1) for gallery in galleries)
    columns = 1 + sum(gallery.experts for gallery in galleries)
    footer = _Footer(any_wrong, marks)
    pitch = 38 if any_wrong else GAP  # beneath a picture
    # A picture is as large as the page's width and height allow, 200 pixels of which are headings and footer.
    across = (width * DPI - 2 * MARGIN - label_width - gaps) / columns / width_px
    down = ((HEIGHT * DPI - 200) / count - pitch) / height_px
    longer = min(LARGEST, max(SMALLEST, int(min(across, down) * max(width_px, height_px))))
    cell = _Cell(*(max(1, round(longer * side / max(width_px, height_px))) for side in (width_px, height_px)))
    lefts = [MARGIN + label_width]
    for gallery in galleries:
        lefts += [lefts[-1] + cell.width + GROUP_GAP + i * (cell.width + GAP) for i in range(gallery.experts)]
    right = lefts[-1] + cell.width
    heads = [_wrapped(g.title, SIZE, g.experts * (cell.width + GAP) - GAP + (GROUP_GAP - GAP) // 2) for g in galleries]
    title_height = 30 * max(len(lines) for lines in heads) + 18 if titled else 0
    top = MARGIN + title_height + 32
    tops = [top + row * (cell.height + pitch) for row in range(count)]
    total_width = max(right + MARGIN, footer.narrowest + 2 * MARGIN)
    lefts = [x + (total_width - right - MARGIN) // 2 for x in lefts]
    lines = footer.lines(total_width - 2 * MARGIN)
    bottom = tops[-1] + cell.height + pitch + 8
    total_height = bottom + 34 * len(lines) + MARGIN

    figure = Figure(figsize=(total_width / DPI, total_height / DPI), dpi=DPI, facecolor="white")
    canvas = _Canvas(figure, total_width, total_height)
    canvas.text(lefts[0] + cell.width / 2, top - 10, "input", SMALL, "center")
    for row, y in enumerate(tops):
        canvas.text(lefts[0] - 12, y + cell.height / 2, names[row], SIZE, "right", "center_baseline")
        canvas.picture(lefts[0], y, cell, picture_of(first.images[row]))
    column = 1
    for gallery, classes, head in zip(galleries, predicted, heads, strict=True):
        own = lefts[column : column + gallery.experts]
        column += gallery.experts
        if head:
            for i, line in enumerate(reversed(head)):
                canvas.text((own[0] + own[-1] + cell.width) / 2, top - 50 - 30 * i, line, SIZE, "center", weight="bold")
            canvas.line(own[0], own[-1] + cell.width, top - 40)
        wide = _width(f"expert {gallery.experts}", SMALL) <= cell.width + GAP - 4
        for i, x in enumerate(own):
            canvas.text(x + cell.width / 2, top - 10, f"expert {i + 1}" if wide else f"{i + 1}", SMALL, "center")
            for row, y in enumerate(tops):
                grey, heatmap = grey_of(first.images[row]), to_array(gallery.heatmaps[i, row])
                state = state_of(gallery.heatmaps[i, row])
                canvas.picture(x, y, cell, _rgb(grey) if state else _blend(grey, heatmap / heatmap.max()))
                if state:
                    canvas.badge(x, y, cell, state)
                if classes[i, row] != first.labels[row]:
                    said = f"{CROSS} {first.classes[int(classes[i, row])]}"
                    size = next((s for s in (5.5, 5.0, 4.5) if _width(said, s) <= cell.width + GAP - 3), 4.5)
                    said = _fit(said, size, cell.width + GAP - 3)
                    canvas.text(x + cell.width / 2, y + cell.height + 22, said, size, "center", color=WRONG)
    footer.draw(canvas, lines, bottom)
    return figure


def to_bytes(figure: Figure, kind: str) -> bytes:
    """The figure as a file, "pdf" or "png"."""
    # A PDF has each picture once, in its own pixels; in a PNG they are averaged, so that all become equally large.
    for axes in figure.axes:
        for image in axes.images:
            image.set_interpolation("none" if kind == "pdf" else "antialiased")
    buffer = io.BytesIO()
    # Type 42 keeps text as text, which publishers ask for. Neither file may say when it was made.
    metadata = {"CreationDate": None} if kind == "pdf" else {"Software": None}
    with matplotlib.rc_context({"pdf.fonttype": 42, "savefig.bbox": None}):
        figure.savefig(buffer, format=kind, dpi=DPI, metadata=metadata)
    return buffer.getvalue()


class _Cell(NamedTuple):
    """A picture's size in the figure, in pixels."""

    width: int
    height: int


@dataclass(frozen=True)
class _Canvas:
    """A figure whose places are pixels from the top left."""

    figure: Figure
    width: int
    height: int

    def place(self, x: float, y: float) -> tuple[float, float]:
        return x / self.width, 1 - y / self.height

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float,
        align: str,
        valign: str = "baseline",
        color: str = INK,
        weight: str = "normal",
    ) -> None:
        font = FontProperties(size=size, weight=weight, family=FONT)
        # Names may have dollar signs, which are no formulas.
        self.figure.text(
            *self.place(x, y), text, ha=align, va=valign, color=color, fontproperties=font, parse_math=False
        )

    def line(self, left: float, right: float, y: float) -> None:
        across, up = zip(self.place(left, y), self.place(right, y), strict=True)
        self.figure.add_artist(Line2D(across, up, color=INK, linewidth=0.5))

    def picture(self, x: float, y: float, cell: _Cell, rgb: np.ndarray) -> None:
        left, bottom = self.place(x, y + cell.height)
        axes = self.figure.add_axes((left, bottom, cell.width / self.width, cell.height / self.height))
        axes.set_axis_off()
        # Viewers smooth an image that they enlarge: a small one gets larger pixels here, which stay sharp.
        factor = max(1, 256 // max(rgb.shape[:2]))
        axes.imshow(
            np.round(255 * rgb).astype(np.uint8).repeat(factor, 0).repeat(factor, 1), aspect="auto", origin="upper"
        )

    def badge(self, x: float, y: float, cell: _Cell, text: str) -> None:
        box = {"boxstyle": "round,pad=0.3", "facecolor": "black", "edgecolor": "none", "alpha": 0.75}
        font = FontProperties(size=min(5.5, 5.5 * cell.width / (_width(text, 5.5) + 26)), family=FONT)
        place = self.place(x + cell.width / 2, y + cell.height / 2)
        self.figure.text(*place, text, ha="center", va="center", color="white", fontproperties=font, bbox=box)


class _Footer:
    """What the marks mean, beneath the pictures: entries of a sample and a text, in as many lines as they need."""

    def __init__(self, any_wrong: bool, marks: set[str]) -> None:
        self.entries = [("bar", "Grad-CAM of the true class, each scaled by its own maximum")]
        if any_wrong:
            self.entries.append(("cross", "wrong prediction of an expert"))
        meanings = {"dead": "dead: zero everywhere", "not finite": "not finite: has a NaN or an infinity"}
        self.entries += [("", meaning) for mark, meaning in meanings.items() if mark in marks]
        self.samples = {"bar": 190, "cross": 28, "": 0}
        self.widths = [self.samples[kind] + math.ceil(_width(text, SMALL)) for kind, text in self.entries]
        self.narrowest = max(self.widths)

    def lines(self, width: float) -> list[list[int]]:
        """The entries' numbers, a list a line."""
        made: list[list[int]] = [[]]
        used = 0.0
        for i, own in enumerate(self.widths):
            if made[-1] and used + 40 + own > width:
                made.append([])
                used = 0.0
            used += own + (40 if made[-1] else 0)
            made[-1].append(i)
        return made

    def draw(self, canvas: _Canvas, lines: list[list[int]], top: int) -> None:
        for row, line in enumerate(lines):
            x = (canvas.width - sum(self.widths[i] for i in line) - 40 * (len(line) - 1)) / 2
            base = top + 34 * row + 24
            for i in line:
                kind, text = self.entries[i]
                if kind == "bar":
                    self._bar(canvas, x, base)
                elif kind == "cross":
                    canvas.text(x, base, CROSS, SMALL, "left", color=WRONG)
                canvas.text(x + self.samples[kind], base, text, SMALL, "left")
                x += self.widths[i] + 40

    @staticmethod
    def _bar(canvas: _Canvas, x: float, base: float) -> None:
        left, bottom = canvas.place(x + 24, base)
        axes = canvas.figure.add_axes((left, bottom, 90 / canvas.width, 17 / canvas.height))
        bar = canvas.figure.colorbar(ScalarMappable(cmap=COLORMAP), cax=axes, orientation="horizontal", ticks=[])
        bar.outline.set_visible(False)
        canvas.text(x + 17, base, "0", SMALL, "right")
        canvas.text(x + 121, base, "max", SMALL, "left")


def _rgb(grey: np.ndarray) -> np.ndarray:
    return grey[..., None].repeat(3, -1)


def _blend(grey: np.ndarray, heatmap: np.ndarray) -> np.ndarray:
    """The heatmap (H, W), in [0, 1], in colour over the grey picture (H, W), in [0, 1]."""
    # Where the heatmap is 0 the image stays legible, but darker than any focus; at its maximum the colour prevails.
    share = 0.3 + 0.58 * heatmap[..., None]
    blended: np.ndarray = (1 - share) * _rgb(grey) + share * matplotlib.colormaps[COLORMAP](heatmap)[..., :3]
    return blended


@functools.lru_cache(maxsize=4096)
def _width(text: str, size: float) -> float:
    """Width in pixels of one line of text of this size in points."""
    if not text:
        return 0.0
    font = FontProperties(size=size, family=FONT)
    return float(text_to_path.get_text_width_height_descent(text, font, ismath=False)[0]) * DPI / 72


@functools.lru_cache(maxsize=4096)
def _fit(text: str, size: float, width: float) -> str:
    """The text in one line, its end left out where it is wider than this."""
    text = " ".join(text.split())
    short = text
    while _width(short, size) > width and len(text) > 1:
        text = text[:-1]
        short = text.rstrip() + "…"
    return short


def _wrapped(text: str, size: float, width: float) -> list[str]:
    """The text in lines no wider than this, each of whole words where they fit."""
    lines: list[str] = []
    for word in text.split():
        if lines and _width(f"{lines[-1]} {word}", size) * 1.12 <= width:  # bold is wider
            lines[-1] += f" {word}"
        else:
            lines.append(_fit(word, size, width / 1.12))
    return lines
