"""What charts share: sizes, colours, panels with their titles and legends, fonts that have the characters.

The colours of heatmaps are in `overlay`. All are drawn with `matplotlib.figure.Figure` itself, so that no display
and no global pyplot state is involved.
"""

import io
import math
import textwrap
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.textpath import text_to_path
from matplotlib.transforms import ScaledTranslation

from immunity_fast.runtime.files import write_atomically

DPI = 256  # a power of two: whole pixels are exact as inches, and an image's pixels stay equal squares
FONT_SIZE = 7.0  # points
INK = "#222222"
# Blue, vermilion, green, black, sky blue and orange of Okabe and Ito's palette, told apart by the colour-blind too (its
# purple is not, from green).
COLORS = ("#0072b2", "#d55e00", "#009e73", INK, "#56b4e9", "#e69f00")
MARKERS = ("o", "s", "^", "D", "v", "X", "P")  # one more than COLORS, so that a seventh curve is not like the first
PANEL_WIDTH = 3.5  # inches
LEGEND_WIDTH = 214.0  # points, a little less than the axes of a panel


def save_png(figure: Figure, path: Path) -> None:
    """Writes a figure so that a reader of `path` never sees half of one.

    Raises:
        OSError: that fails; by its name.
    """
    engine = figure.get_layout_engine()
    if engine is not None:
        # Saving would draw the whole figure once more for its layout, and throw that away.
        engine.execute(figure)
        with matplotlib.rc_context({"figure.autolayout": False, "figure.constrained_layout.use": False}):
            figure.set_layout_engine(None)
    content = io.BytesIO()
    figure.savefig(content, dpi=DPI, format="png")
    write_atomically(path, content.getvalue())


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
