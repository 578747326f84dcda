"""Figure 2 of arXiv 2402.18787 in files: for paper (PDF, PNG) and for a browser.

Several galleries of the same images stand side by side, such as five networks trained independently and a mixture:

    galleries = [collect(model, test, classes, 10, loss, title=title) for title, model in models.items()]
    write(galleries, folder)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from immunity_fast.reproduction.gallery import Gallery
from immunity_fast.reproduction.gallery_figure import draw, to_bytes
from immunity_fast.reproduction.gallery_page import page
from immunity_fast.runtime.files import write_atomically


def write(galleries: Sequence[Gallery], folder: Path, stem: str = "figure2") -> list[Path]:
    """Writes the figure as `stem`.pdf and `stem`.png, and the page `stem`.html, which needs nothing beside it.

    The bytes depend on the galleries and on matplotlib's and Pillow's versions alone. A reader of a file never sees
    half of one.

    Args:
        galleries: see `draw`.
        folder: made if it is missing; files of these names are replaced.
        stem: a file name without its ending.

    Returns:
        The three files.

    Raises:
        ValueError: as `draw`, or if `stem` is no file name.
        OSError: if a file cannot be written.
    """
    if not stem or Path(stem).name != stem:
        raise ValueError(f"stem: expected a file name without its ending, got {stem!r}")
    figure = draw(galleries)
    contents = {"pdf": to_bytes(figure, "pdf"), "png": to_bytes(figure, "png"), "html": page(galleries).encode()}
    folder.mkdir(parents=True, exist_ok=True)
    for kind, content in contents.items():
        write_atomically(folder / f"{stem}.{kind}", content)
    return [folder / f"{stem}.{kind}" for kind in contents]
