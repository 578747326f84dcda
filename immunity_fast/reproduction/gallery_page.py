"""Figure 2 of arXiv 2402.18787 as a page that answers the pointer, in one file that loads nothing."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from PIL import Image
from torch import Tensor

from immunity_fast.reporting.html import render
from immunity_fast.reporting.overlay import COLORMAP, grey_of, state_of
from immunity_fast.reproduction.gallery import Gallery, check_same, picture_of, to_array
from immunity_fast.reproduction.gallery_figure import CROSS

WINDOW = 5  # pixels, the side of the square in which the page sums a heatmap's mass; odd
LEVELS = 2**16 - 1  # the page's steps from 0 to a heatmap's maximum


def page(galleries: Sequence[Gallery]) -> str:
    """The page's HTML.

    Raises:
        ValueError: galleries of different images.
    """
    check_same(galleries)
    first = galleries[0]
    height, width = first.images.shape[-2:]
    colors = matplotlib.colormaps[COLORMAP](np.linspace(0, 1, 11))
    return render(
        "immunity_fast.reproduction",
        "gallery.html.jinja",
        height=height,
        width=width,
        cell=_width_in_page(height, width),
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


def _width_in_page(height: int, width: int) -> int:
    """A picture's width in the page, in CSS pixels; a small image's is a whole multiple: its pixels stay equal."""
    longer = max(height, width)
    return width * max(1, round(96 / longer)) if longer <= 128 else round(width * 128 / longer)


def _row(galleries: Sequence[Gallery], row: int) -> dict[str, Any]:
    """What the page says of one image."""
    first = galleries[0]
    label = int(first.labels[row])
    picture = picture_of(first.images[row])
    grey = np.round(255 * grey_of(picture)).astype(np.uint8)
    groups = []
    for gallery in galleries:
        experts = []
        for i in range(gallery.experts):
            heatmap = to_array(gallery.heatmaps[i, row])
            experts.append(
                _prediction(gallery, gallery.probabilities[i, row], label)
                | {"who": ", ".join(filter(None, (gallery.title, f"expert {i + 1}"))), "state": state_of(heatmap)}
                | ({} if state_of(heatmap) else _embedded(heatmap))
            )
        groups.append({"experts": experts, "mean": _prediction(gallery, gallery.mixture[row], label)})
    return {
        "name": first.classes[label],
        "image": _png(Image.fromarray(np.round(255 * picture).astype(np.uint8))),
        "grey": _png(Image.fromarray(grey)),
        "groups": groups,
    }


def _prediction(gallery: Gallery, probabilities: Tensor, label: int) -> dict[str, Any]:
    """What a network predicts for an image, its share and that of the label, as the page words them."""
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
    colors[:, 3] = 0.3 + 0.7 * np.linspace(0, 1, 256)  # the page's opacity comes on top
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
