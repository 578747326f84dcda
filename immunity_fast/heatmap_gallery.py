"""Figure 2 of arXiv 2402.18787: images beside the Grad-CAM heatmap of every expert, for paper (PDF, PNG) and browser.

Several galleries of the same images stand side by side, such as five networks trained independently and a mixture:

    galleries = [collect(model, test, classes, 10, loss, title=title) for title, model in models.items()]
    write(galleries, folder)
"""

import base64
import copy
import functools
import hashlib
import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import matplotlib
import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.textpath import text_to_path
from PIL import Image
from torch import Tensor

from immunity_fast.checkpoint import write_atomically
from immunity_fast.data import Split
from immunity_fast.figures import COLORMAP, INK
from immunity_fast.losses import FusedImmunityLoss
from immunity_fast.metrics import EVALUATION_BATCH, batches, expert_maps, sample_order
from immunity_fast.model import ImmunityMoE

WIDTH = 6.9  # inches, both columns of a paper
HEIGHT = 8.6  # inches, what a page has beside its caption
DPI = 300
WINDOW = 5  # pixels, the side of the square in which the page sums a heatmap's mass; odd
LEVELS = 2**16 - 1  # the page's steps from 0 to a heatmap's maximum

# The figure, in pixels of 1/DPI inch unless it says otherwise
MARGIN = 5
GAP = 9  # between two pictures
GROUP_GAP = 30  # between the input and a gallery, and between two
LARGEST, SMALLEST = 300, 60  # a picture's longer side
SIZE, SMALL = 7.0, 6.0  # points
WRONG = "#c0392b"
CROSS = "\u2717"
FONT = "DejaVu Sans"  # comes with matplotlib: the same figure everywhere


@dataclass(frozen=True, eq=False)
class Gallery:
    """Some images, and where the experts of one model look in them; all on the CPU.

    Args:
        title: what the model is, such as "Immunity"; "" for no heading.
        images: uint8 (n, 3, H, W).
        labels: integers (n,), each in 0..K−1.
        classes: K names.
        heatmaps: floats (N, n, H, W), ≥ 0, Grad-CAM of each expert for the label, eq. (3), not normalised; one that has
            a NaN or an infinity is marked so.
        probabilities: floats (N, n, K), of each expert.
        mixture: floats (n, K), the mean of the experts' probabilities, which is the exact mean over the gate's draws.

    Raises:
        ValueError: if a shape, a type or a value does not fit.
    """

    title: str
    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    heatmaps: Tensor
    probabilities: Tensor
    mixture: Tensor

    def __post_init__(self) -> None:
        images, labels, classes = self.images, self.labels, len(self.classes)
        if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape or images.dtype != torch.uint8:
            raise ValueError(f"images: expected uint8 of shape (n, 3, H, W), none of them 0, got {_kind(images)}")
        count, _, height, width = images.shape
        if labels.shape != (count,) or labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(f"labels: expected integers of shape ({count},), got {_kind(labels)}")
        if int(labels.min()) < 0 or int(labels.max()) >= classes:
            found = f"{int(labels.min())} to {int(labels.max())}"
            raise ValueError(f"labels: expected each in [0, {classes}), for {classes} class names, got {found}")
        if self.heatmaps.ndim != 4 or len(self.heatmaps) == 0:
            raise ValueError(f"heatmaps: expected shape (N, n, H, W), N ≥ 1, got {_kind(self.heatmaps)}")
        experts = len(self.heatmaps)
        for name, tensor, shape in (
            ("heatmaps", self.heatmaps, (experts, count, height, width)),
            ("probabilities", self.probabilities, (experts, count, classes)),
            ("mixture", self.mixture, (count, classes)),
        ):
            if tensor.shape != shape or not tensor.is_floating_point():
                raise ValueError(f"{name}: expected floats of shape {shape}, got {_kind(tensor)}")
        if bool((self.heatmaps < 0).any()):
            raise ValueError(f"heatmaps: expected no value below 0, got {float(self.heatmaps.nan_to_num().min()):g}")

    @property
    def experts(self) -> int:
        """N."""
        return len(self.heatmaps)


def collect(
    model: ImmunityMoE | Sequence[ImmunityMoE],
    split: Split,
    classes: Sequence[str],
    count: int,
    loss: FusedImmunityLoss,
    *,
    title: str = "",
) -> Gallery:
    """The gallery of a model: a fixed choice of images, whose heatmaps are computed in evaluation mode.

    The images are the first of each class in the order of `metrics.sample`, then the second of each, and so on; they
    are shown in the order of the classes. The choice depends on the split's labels and on `count` alone, so that
    several models' galleries go side by side.

    Args:
        model: 1 expert or more, or several models, whose experts then stand for the experts of one: networks that were
            trained independently. Its mode is left as it is, and no random number is drawn.
        split: at least one image.
        classes: K names.
        count: of images, ≥ 1; all there are, where there are fewer.
        loss: how Grad-CAM is to be computed (`score`, `weight_scale`), as in training; its `size` does not matter here,
            the heatmaps have the images'.
        title: see `Gallery`.

    Raises:
        ValueError: no model, an empty split, a count below 1, or models and classes that do not fit.
    """
    models = [model] if isinstance(model, ImmunityMoE) else list(model)
    if not models:
        raise ValueError("model: expected at least 1, got an empty sequence")
    if len(split) == 0:
        raise ValueError("split: expected at least 1 image, got an empty split")
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    chosen = choose(split, count)
    height, width = split.images.shape[-2:]
    seen = copy.copy(loss)  # a module's copy has attributes of its own, and the caller's keeps its size
    seen.size = (height, width)
    parts = [_measure(each, chosen, seen) for each in models]
    shapes = {tuple(probabilities.shape[1:]) for _, probabilities in parts}
    if shapes != {(len(chosen), len(classes))}:
        numbers = ", ".join(str(shape[1]) for shape in sorted(shapes))
        raise ValueError(f"classes: expected as many names as the models have classes ({numbers}), got {len(classes)}")
    probabilities = torch.cat([probabilities for _, probabilities in parts])
    return Gallery(
        title=title,
        images=chosen.images.cpu(),
        labels=chosen.labels.cpu(),
        classes=tuple(classes),
        heatmaps=torch.cat([heatmaps for heatmaps, _ in parts]),
        probabilities=probabilities,
        mixture=probabilities.mean(0),
    )


def choose(split: Split, count: int) -> Split:
    """At most `count` images, as many of each class as can be, in the order of the classes; see `collect`."""
    order = sample_order(split, len(split))
    labels = split.labels.cpu()[order].numpy()
    ranks = np.zeros_like(labels)  # 0 for the first image of its class, 1 for the second, …
    for label in np.unique(labels):
        ranks[labels == label] = np.arange((labels == label).sum())
    first = np.argsort(ranks, kind="stable")[:count]
    shown = order[first[np.argsort(labels[first], kind="stable")]].to(split.labels.device)
    return Split(split.images[shown], split.labels[shown])


def _measure(model: ImmunityMoE, split: Split, loss: FusedImmunityLoss) -> tuple[Tensor, Tensor]:
    """Heatmaps (N, n, H, W) and probabilities (N, n, K), on the CPU."""
    device = next(model.parameters()).device
    heatmaps, probabilities = [], []
    with _evaluating(model):
        for images, labels in batches(split.to(device), EVALUATION_BATCH):
            heatmaps.append(expert_maps(model, loss, images, labels)[0].cpu())
            with torch.no_grad():
                logits = model.expert_logits(images)
            probabilities.append(logits.to(heatmaps[-1].dtype).softmax(-1).cpu())
    return torch.cat(heatmaps, 1), torch.cat(probabilities, 1)


@contextmanager
def _evaluating(model: ImmunityMoE) -> Iterator[None]:
    """Evaluation mode, and then again the mode that each module was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


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
    contents = {"pdf": _save(figure, "pdf"), "png": _save(figure, "png"), "html": _page(galleries).encode()}
    folder.mkdir(parents=True, exist_ok=True)
    for kind, content in contents.items():
        write_atomically(folder / f"{stem}.{kind}", content)
    return [folder / f"{stem}.{kind}" for kind in contents]


def _save(figure: Figure, kind: str) -> bytes:
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
    _check(galleries)
    if not 0 < width < math.inf:
        raise ValueError(f"width: expected a positive number of inches, got {width}")
    first = galleries[0]
    count, _, height_px, width_px = first.images.shape
    names = [_fit(first.classes[label], SIZE, 220) for label in first.labels.tolist()]
    predicted = [gallery.probabilities.argmax(-1) for gallery in galleries]
    any_wrong = any(bool((classes != first.labels).any()) for classes in predicted)
    marks = {_state(heatmap) for gallery in galleries for heatmap in gallery.heatmaps.flatten(0, 1)} - {""}
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
        canvas.picture(lefts[0], y, cell, _picture(first.images[row]))
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
                grey, heatmap = _grey(first.images[row]), _array(gallery.heatmaps[i, row])
                state = _state(gallery.heatmaps[i, row])
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


def _check(galleries: Sequence[Gallery]) -> None:
    """ValueError unless there is one, and all are of the same images."""
    if len(galleries) == 0:
        raise ValueError("galleries: expected at least 1, got none")
    first = galleries[0]
    for i, other in enumerate(galleries[1:], 2):
        for name in ("images", "labels"):
            if not torch.equal(getattr(first, name), getattr(other, name)):
                raise ValueError(f"galleries: expected the same {name} in all, those of number {i} differ")
        if first.classes != other.classes:
            raise ValueError(f"galleries: expected the same classes in all, those of number {i} differ")


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


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"


def _array(heatmap: Tensor) -> np.ndarray:
    array: np.ndarray = heatmap.detach().double().numpy()
    return array


def _state(heatmap: Tensor) -> str:
    """ "dead", "not finite" or, for a heatmap that can be shown, ""."""
    if not bool(heatmap.isfinite().all()):
        return "not finite"
    return "" if float(heatmap.max()) > 0 else "dead"


def _picture(image: Tensor) -> np.ndarray:
    """uint8 (3, H, W) → floats in [0, 1], (H, W, 3)."""
    picture: np.ndarray = image.permute(1, 2, 0).numpy() / 255
    return picture


def _grey(image: Tensor) -> np.ndarray:
    """uint8 (3, H, W) → brightness in [0, 1], (H, W)."""
    grey: np.ndarray = _picture(image) @ np.array([0.299, 0.587, 0.114])
    return grey


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


def _page(galleries: Sequence[Gallery]) -> str:
    """The page's HTML."""
    first = galleries[0]
    height, width = first.images.shape[-2:]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["sha256"] = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    source = resources.files("immunity_fast").joinpath("heatmap_gallery.html.jinja").read_text(encoding="utf-8")
    colors = matplotlib.colormaps[COLORMAP](np.linspace(0, 1, 11))
    html = environment.from_string(source).render(
        height=height,
        width=width,
        cell=_shown_width(height, width),
        smooth=max(height, width) > 128,
        window=WINDOW,
        flat=_percent(min(WINDOW, height) * min(WINDOW, width) / (height * width), 1),
        error=f"{100 * WINDOW**2 / 2 / LEVELS:.2f}",
        levels=LEVELS,
        cross=CROSS,
        colors=[matplotlib.colors.to_hex(color) for color in colors],
        galleries=[{"title": g.title, "experts": g.experts} for g in galleries],
        rows=[_row(galleries, row) for row in range(len(first.images))],
    )
    return html + "\n"


def _shown_width(height: int, width: int) -> int:
    """A picture's width in the page, in CSS pixels; a small image's is a whole multiple: its pixels stay equal."""
    longer = max(height, width)
    return width * max(1, round(96 / longer)) if longer <= 128 else round(width * 128 / longer)


def _row(galleries: Sequence[Gallery], row: int) -> dict[str, Any]:
    """What the page says of one image."""
    first = galleries[0]
    label = int(first.labels[row])
    grey = np.round(255 * _grey(first.images[row])).astype(np.uint8)
    groups = []
    for gallery in galleries:
        experts = []
        for i in range(gallery.experts):
            heatmap = gallery.heatmaps[i, row]
            experts.append(
                _said(gallery, gallery.probabilities[i, row], label)
                | {"who": ", ".join(filter(None, (gallery.title, f"expert {i + 1}"))), "state": _state(heatmap)}
                | ({} if _state(heatmap) else _embedded(_array(heatmap)))
            )
        groups.append({"experts": experts, "mean": _said(gallery, gallery.mixture[row], label)})
    return {
        "name": first.classes[label],
        "image": _png(Image.fromarray(first.images[row].permute(1, 2, 0).contiguous().numpy())),
        "grey": _png(Image.fromarray(grey)),
        "groups": groups,
    }


def _said(gallery: Gallery, probabilities: Tensor, label: int) -> dict[str, Any]:
    """A prediction in words."""
    top = int(probabilities.argmax())
    return {
        "predicted": gallery.classes[top],
        "short": _percent(float(probabilities[top])),
        "probability": _percent(float(probabilities[top]), 1),
        "of_label": _percent(float(probabilities[label]), 1),
        "right": top == label,
    }


def _embedded(heatmap: np.ndarray) -> dict[str, str]:
    """A finite heatmap (H, W) that is not dead, as a picture for the eye and as numbers for sums.

    The numbers are h / max h in whole steps of 1/LEVELS, little-endian; `total` is Σ h / max h before that rounding, so
    that the share of a window of n pixels is wrong by no more than n/2 steps over a total of at least 1.
    """
    scaled = heatmap / heatmap.max()
    picture = Image.fromarray(np.round(255 * scaled).astype(np.uint8), mode="P")
    colors = matplotlib.colormaps[COLORMAP](np.arange(256))
    colors[:, 3] = 0.3 + 0.7 * np.linspace(0, 1, 256)  # the page's opacity comes on top: together about `_blend`
    picture.putpalette(np.round(255 * colors).astype(np.uint8).tobytes(), "RGBA")
    values = np.round(LEVELS * scaled).astype("<u2").tobytes()
    return {
        "heatmap": _png(picture),
        "steps": base64.b64encode(values).decode(),
        "total": repr(float(scaled.sum())),
    }


def _png(image: Image.Image) -> str:
    """The image as a PNG file in base64."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def _percent(share: float, digits: int = 0) -> str:
    """Such as "83 %"; what is not quite all or nothing does not become it by rounding."""
    if math.isnan(share):
        return "not a number"
    step = 10**-digits
    if 0 < share < step / 200:
        return f"< {step:g}\u00a0%"
    if 1 - step / 200 < share < 1:
        return f"> {100 - step:g}\u00a0%"
    return f"{100 * share:.{digits}f}\u00a0%"
