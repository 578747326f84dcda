"""What an attack refuses, in one line: images, labels, and outputs that are no numbers."""

from typing import Any

from torch import Tensor

from immunity_fast.attacks.projections import UNIT, Bounds, rounded_bounds
from immunity_fast.runtime.checks import kind_given
from immunity_fast.runtime.outputs import kind_of, logits_of


class NotFiniteError(ValueError):
    """A model's output or gradient is NaN or infinite.

    Args:
        sample: the image's index in the batch, kept as an attribute.
    """

    def __init__(self, sample: int) -> None:
        super().__init__(f"model: expected finite outputs and gradients, got NaN or infinite ones for image {sample}")
        self.sample = sample


def check_images(images: Tensor, labels: Tensor, targets: Tensor | None, bounds: Bounds = UNIT) -> None:
    """Check what an attack is given; it waits for the device.

    Args:
        images: (B, C, H, W), expected to be floating-point and within the bounds.
        labels: (B,), expected to be integers.
        targets: the same, or None.
        bounds: the lowest and the highest value of a pixel.

    Raises:
        ValueError: they are not.
        TypeError: they are no tensors.
    """
    for name, given in (("images", images), ("labels", labels), ("targets", targets)):
        if not isinstance(given, Tensor) and (given is not None or name != "targets"):
            raise TypeError(f"{name}: expected a tensor, got {kind_given(given)}")
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(f"images: expected floating-point (B, C, H, W), got {images.dtype} {tuple(images.shape)}")
    for name, classes in (("labels", labels), ("targets", targets)):
        if classes is not None and (classes.shape != images.shape[:1] or classes.is_floating_point()):
            raise ValueError(
                f"{name}: expected integers ({images.shape[0]},), got {classes.dtype} {tuple(classes.shape)}"
            )
    low, high = rounded_bounds(bounds, images.dtype)
    if images.numel() and not (images.min() >= low and images.max() <= high):
        raise ValueError(
            f"images: expected values in [{low:g}, {high:g}], got {images.min():.4g} to {images.max():.4g}; for "
            "others there is `bounds`"
        )


def check_range(labels: Tensor, targets: Tensor | None, classes: int) -> None:
    """Check that labels and targets (B,), or None, are classes; it waits for the device.

    Args:
        classes: K, as many as the model has.

    Raises:
        ValueError: one is not in 0..K−1; it is named.
    """
    for name, given in (("labels", labels), ("targets", targets)):
        if given is not None and len(given) and not (given.min() >= 0 and given.max() < classes):
            wrong = int(((given < 0) | (given >= classes)).nonzero()[0, 0])
            raise ValueError(f"{name}: expected 0 to {classes - 1}, got {int(given[wrong])} for image {wrong}")


def outputs_of(returned: Any, samples: int) -> Tensor:
    """The outputs (B, K), or (draws, B, K), of what a model returned: a tensor, or an object that holds its logits.

    Args:
        returned: see `runtime.outputs.logits_of`.
        samples: B.

    Raises:
        ValueError: it holds none of that shape.
    """
    outputs = logits_of(returned)
    known = outputs if isinstance(outputs, Tensor) and outputs.dim() in (2, 3) and outputs.shape[-1] > 0 else None
    if known is None or known.shape[-2] != samples:
        raise ValueError(f"model: expected outputs ({samples}, K) or (draws, {samples}, K), got {kind_of(returned)}")
    return known


def not_finite(outputs: Tensor) -> Tensor:
    """Which images have outputs (…, B, K) that are no logits: NaN or +∞ in any, or −∞ in all. (B,) bool.

    −∞ is the logarithm of 0, which not all classes can have.
    """
    broken: Tensor = ~outputs.amax(-1).isfinite()
    return broken.flatten(0, -2).any(0) if broken.dim() > 1 else broken


def check_finite(broken: Tensor) -> None:
    """Check that no image is broken; it waits for the device.

    Args:
        broken: (B,) bool, see `not_finite`.

    Raises:
        NotFiniteError: of the first that is.
    """
    if bool(broken.any()):
        raise NotFiniteError(int(broken.nonzero()[0, 0]))
