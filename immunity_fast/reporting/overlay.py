"""A heatmap over an image, as every figure and page shows it: in colour over the grey image, scaled by its own maximum.

Grad-CAM's magnitude differs between experts by orders of magnitude: one scale for all would show one expert.
"""

import matplotlib
import numpy as np

COLORMAP = "inferno"


def as_rgb(picture: np.ndarray) -> np.ndarray:
    """Pictures (…, H, W, C) as they are shown, (…, H, W, 3), of the same values: red, green and blue as they are, of
    any other channels their mean in grey."""
    if picture.shape[-1] == 3:
        return picture
    grey: np.ndarray = picture.mean(-1, keepdims=True).repeat(3, -1)
    return grey


def grey_of(picture: np.ndarray) -> np.ndarray:
    """Brightness (…, H, W) of pictures (…, H, W, 3), both in [0, 1]."""
    grey: np.ndarray = picture @ np.array([0.299, 0.587, 0.114], dtype=picture.dtype)
    return grey


def state_of(heatmap: np.ndarray) -> str:
    """ "dead" (0 everywhere), "not finite" (a NaN or an infinity) or, for a heatmap ≥ 0 that can be shown, ""."""
    if not np.isfinite(heatmap).all():
        return "not finite"
    return "" if heatmap.max() > 0 else "dead"


def overlaid(grey: np.ndarray, heatmap: np.ndarray) -> np.ndarray:
    """A heatmap over a grey image, (H, W, 3) in [0, 1]; of one that cannot be shown the image alone.

    Args:
        grey: (H, W), in [0, 1].
        heatmap: (H, W), ≥ 0, not normalised; see `state_of`.
    """
    rgb = grey[..., None].repeat(3, -1)
    if state_of(heatmap):
        return rgb
    scaled = heatmap / heatmap.max()
    # Where the heatmap is 0 the image stays legible, but darker than any focus; at its maximum the colour prevails.
    share = 0.35 + 0.5 * scaled[..., None]
    blended: np.ndarray = (1 - share) * rgb + share * matplotlib.colormaps[COLORMAP](scaled)[..., :3]
    return blended
