"""A figure of pictures whose layout is counted in whole pixels, from the top left."""

from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.image import BboxImage
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox, TransformedBbox

from immunity_fast.reporting.style import INK


class Cell(NamedTuple):
    """A picture's size, in pixels of the figure."""

    width: int
    height: int


class Canvas:
    """An empty white figure.

    Args:
        width, height: pixels.
        dpi: of these in an inch.
    """

    def __init__(self, width: int, height: int, dpi: int) -> None:
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width / dpi, height / dpi), dpi=dpi, facecolor="white")

    def place(self, x: float, y: float) -> tuple[float, float]:
        """A place in pixels as matplotlib wants it: in parts of the figure, from the bottom left."""
        return x / self.width, 1 - y / self.height

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        """Axes whose upper left corner is at (x, y)."""
        return self.figure.add_axes(self._extent(x, y, width, height))

    def _extent(self, x: float, y: float, width: float, height: float) -> tuple[float, float, float, float]:
        """(left, bottom, width, height) of a box whose upper left corner is at (x, y), in parts of the figure."""
        # matplotlib 3.8 rounds the size of an image up: of 256 + 1e-13 pixels it makes 257, and rows come out shifted.
        return (*self.place(x, y + height), (width - 1e-6) / self.width, (height - 1e-6) / self.height)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        font: FontProperties,
        align: str = "center",
        valign: str = "baseline",
        color: str = INK,
    ) -> None:
        """A text, which may have dollar signs: they are no formulas."""
        self.figure.text(
            *self.place(x, y),
            text,
            ha=align,
            va=valign,
            color=color,
            fontproperties=font,
            linespacing=1.15,
            parse_math=False,
        )

    def line(self, left: float, right: float, y: float) -> None:
        """A thin horizontal line between two places."""
        across, up = zip(self.place(left, y), self.place(right, y), strict=True)
        self.figure.add_artist(Line2D(across, up, color=INK, linewidth=0.5))

    def picture(self, x: float, y: float, cell: Cell, rgb: np.ndarray) -> None:
        """A picture (H, W, 3), uint8 or floats in [0, 1], as large as the cell."""
        box = TransformedBbox(Bbox.from_bounds(*self._extent(x, y, *cell)), self.figure.transFigure)
        # Not in axes of its own, which take longer to make than a picture takes to draw. "antialiased" is nearest for a
        # whole factor, and smooths where a large image is shrunk.
        image = BboxImage(box, interpolation="antialiased", resample=True)
        image.set_data(rgb)
        self.figure.add_artist(image)

    def badge(self, x: float, y: float, cell: Cell, text: str, font: FontProperties) -> None:
        """A word over the middle of a picture."""
        box = {"boxstyle": "round,pad=0.3", "facecolor": "black", "edgecolor": "none", "alpha": 0.75}
        place = self.place(x + cell.width / 2, y + cell.height / 2)
        self.figure.text(*place, text, ha="center", va="center", color="white", fontproperties=font, bbox=box)
