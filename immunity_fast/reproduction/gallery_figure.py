"""Figure 2 of arXiv 2402.18787 on paper: images beside the Grad-CAM heatmap of every expert."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

from immunity_fast.reporting.canvas import Canvas, Cell
from immunity_fast.reporting.overlay import COLORMAP, grey_of, overlaid, state_of
from immunity_fast.reproduction.gallery import Gallery, check_same, picture_of, to_array

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
    names = [_fit(first.classes[label], SIZE, 220) for label in first.labels.tolist()]
    layout = _Layout(galleries, names, width)
    canvas = Canvas(layout.width, layout.height, DPI)
    canvas.text(layout.input + layout.cell.width / 2, layout.top - 10, "input", _font(SMALL))
    for name, image, y in zip(names, first.images, layout.tops, strict=True):
        canvas.text(
            layout.input - 12, y + layout.cell.height / 2, name, _font(SIZE), align="right", valign="center_baseline"
        )
        _add_picture(canvas, layout.input, y, layout.cell, picture_of(image))
    for gallery, title, lefts in zip(galleries, layout.titles, layout.lefts, strict=True):
        _add_title(canvas, layout, title, lefts)
        wide = _width(f"expert {gallery.experts}", SMALL) <= layout.cell.width + GAP - 4
        for expert, x in enumerate(lefts):
            number = f"expert {expert + 1}" if wide else f"{expert + 1}"
            canvas.text(x + layout.cell.width / 2, layout.top - 10, number, _font(SMALL))
            for row, y in enumerate(layout.tops):
                _add_heatmap(canvas, x, y, layout.cell, gallery, expert, row)
    layout.footer.draw(canvas, layout.footer_lines, layout.bottom)
    return canvas.figure


class _Layout:
    """Where everything stands, in pixels from the top left.

    Args:
        galleries: side by side.
        names: of the rows, as they are written.
        width: inches, see `draw`.
    """

    def __init__(self, galleries: Sequence[Gallery], names: Sequence[str], width: float) -> None:
        first = galleries[0]
        count, _, *size = first.images.shape
        any_wrong = any(bool((gallery.probabilities.argmax(-1) != first.labels).any()) for gallery in galleries)
        marks = {state_of(to_array(heatmap)) for gallery in galleries for heatmap in gallery.heatmaps.flatten(0, 1)}
        self.footer = _Footer(any_wrong, marks - {""})
        self.pitch = 38 if any_wrong else GAP  # beneath a picture
        label_width = max(math.ceil(_width(name, SIZE)) for name in names) + 14
        gaps = sum(GROUP_GAP + GAP * (gallery.experts - 1) for gallery in galleries)
        columns = 1 + sum(gallery.experts for gallery in galleries)
        # A picture is as large as the page's width and height allow, 200 pixels of which are headings and footer.
        across = (width * DPI - 2 * MARGIN - label_width - gaps) / columns / size[1]
        down = ((HEIGHT * DPI - 200) / count - self.pitch) / size[0]
        longer = min(LARGEST, max(SMALLEST, int(min(across, down) * max(size))))
        self.cell = Cell(*(max(1, round(longer * side / max(size))) for side in reversed(size)))
        lefts = [MARGIN + label_width]
        for gallery in galleries:
            lefts += [
                lefts[-1] + self.cell.width + GROUP_GAP + i * (self.cell.width + GAP) for i in range(gallery.experts)
            ]
        right = lefts[-1] + self.cell.width
        self.width = max(right + MARGIN, self.footer.narrowest + 2 * MARGIN)
        self.input, *places = (x + (self.width - right - MARGIN) // 2 for x in lefts)
        self.lefts = [[places.pop(0) for _ in range(gallery.experts)] for gallery in galleries]
        self.titles = [self._title(gallery) for gallery in galleries]
        lines = max(len(title) for title in self.titles)
        self.top = MARGIN + (30 * lines + 18 if any(gallery.title for gallery in galleries) else 0) + 32
        self.tops = [self.top + row * (self.cell.height + self.pitch) for row in range(count)]
        self.bottom = self.tops[-1] + self.cell.height + self.pitch + 8  # of the pictures
        self.footer_lines = self.footer.lines(self.width - 2 * MARGIN)
        self.height = self.bottom + 34 * len(self.footer_lines) + MARGIN

    def _title(self, gallery: Gallery) -> list[str]:
        """A gallery's title in lines that its columns have room for."""
        return _wrapped(gallery.title, SIZE, gallery.experts * (self.cell.width + GAP) - GAP + (GROUP_GAP - GAP) // 2)


def _add_title(canvas: Canvas, layout: _Layout, title: Sequence[str], lefts: Sequence[int]) -> None:
    """A gallery's title, in lines, over its columns, and a rule beneath it; nothing where it has none."""
    right = lefts[-1] + layout.cell.width
    for i, line in enumerate(reversed(title)):
        canvas.text((lefts[0] + right) / 2, layout.top - 50 - 30 * i, line, _font(SIZE, "bold"))
    if title:
        canvas.line(lefts[0], right, layout.top - 40)


def _add_heatmap(canvas: Canvas, x: int, y: int, cell: Cell, gallery: Gallery, expert: int, row: int) -> None:
    """An expert's heatmap of an image, marked where it cannot be shown, and beneath it what it wrongly predicts."""
    heatmap = to_array(gallery.heatmaps[expert, row])
    _add_picture(canvas, x, y, cell, overlaid(grey_of(picture_of(gallery.images[row])), heatmap))
    if state := state_of(heatmap):
        canvas.badge(x, y, cell, state, _font(min(5.5, 5.5 * cell.width / (_width(state, 5.5) + 26))))
    predicted = int(gallery.probabilities[expert, row].argmax())
    if predicted != gallery.labels[row]:
        text = f"{CROSS} {gallery.classes[predicted]}"
        size = next((s for s in (5.5, 5.0, 4.5) if _width(text, s) <= cell.width + GAP - 3), 4.5)
        text = _fit(text, size, cell.width + GAP - 3)
        canvas.text(x + cell.width / 2, y + cell.height + 22, text, _font(size), color=WRONG)


def _add_picture(canvas: Canvas, x: int, y: int, cell: Cell, rgb: np.ndarray) -> None:
    """A picture of floats in [0, 1]; a small one gets larger pixels, since viewers smooth what they enlarge."""
    factor = max(1, 256 // max(rgb.shape[:2]))
    axes = canvas.axes(x, y, *cell)  # of its own: of others a PDF has no picture in its own pixels
    axes.set_axis_off()
    enlarged = np.round(255 * rgb).astype(np.uint8).repeat(factor, 0).repeat(factor, 1)
    axes.imshow(enlarged, aspect="auto", interpolation="antialiased")


def _font(size: float, weight: str = "normal") -> FontProperties:
    return FontProperties(size=size, weight=weight, family=FONT)


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

    def draw(self, canvas: Canvas, lines: list[list[int]], top: int) -> None:
        """Write the entries, in lines of their numbers, below `top`, in pixels."""
        for row, line in enumerate(lines):
            x = (canvas.width - sum(self.widths[i] for i in line) - 40 * (len(line) - 1)) / 2
            base = top + 34 * row + 24
            for i in line:
                kind, text = self.entries[i]
                if kind == "bar":
                    self._bar(canvas, x, base)
                elif kind == "cross":
                    canvas.text(x, base, CROSS, _font(SMALL), "left", color=WRONG)
                canvas.text(x + self.samples[kind], base, text, _font(SMALL), "left")
                x += self.widths[i] + 40

    @staticmethod
    def _bar(canvas: Canvas, x: float, base: float) -> None:
        axes = canvas.axes(x + 24, base - 17, 90, 17)
        bar = canvas.figure.colorbar(ScalarMappable(cmap=COLORMAP), cax=axes, orientation="horizontal", ticks=[])
        bar.outline.set_visible(False)
        canvas.text(x + 17, base, "0", _font(SMALL), "right")
        canvas.text(x + 121, base, "max", _font(SMALL), "left")


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
