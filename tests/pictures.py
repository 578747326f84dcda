"""What the tests of figures look for in a picture, and the figures that a picture was drawn from."""

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from immunity_fast.reporting import canvas, style


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def near(picture: np.ndarray, color: str, tolerance: int = 20) -> np.ndarray:
    """Where the picture has this colour, a bool a pixel."""
    rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    near: np.ndarray = (np.abs(picture.astype(int) - rgb) < tolerance).all(axis=-1)
    return near


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is made."""
    made: list[Figure] = []

    class Recorded(Figure):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    for module in (canvas, style):
        monkeypatch.setattr(module, "Figure", Recorded)
    return made


def assert_no_text_is_hidden(figure: Figure) -> None:
    """Every text lies inside of the figure and touches no other."""
    far = set()  # labels of ticks that are outside of the axes, which are not drawn
    for axis in [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]:
        low, high = axis.get_view_interval()
        far |= {tick.label1 for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high}
    texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip() and t not in far]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    for text, box in boxes:
        assert 0 <= box.x0 < box.x1 <= figure.bbox.width, text
        assert 0 <= box.y0 < box.y1 <= figure.bbox.height, text
    for (a, first), (b, second) in combinations(boxes, 2):
        assert not first.overlaps(second), f"{a!r} lies on {b!r}"
    for axes in figure.axes:
        for text in axes.get_legend().texts if axes.get_legend() else ():
            assert not axes.bbox.overlaps(text.get_window_extent()), f"{text.get_text()!r} lies in the axes"
