"""What an attack refuses, in one line: images, labels, and outputs that are no numbers."""

from torch import Tensor


class NotFiniteError(ValueError):
    """A model's output or gradient is no number; `sample` is the image's index in the batch."""

    def __init__(self, sample: int) -> None:
        super().__init__(f"model: its output or its gradient for sample {sample} is NaN or infinite")
        self.sample = sample


def check_images(images: Tensor, labels: Tensor, targets: Tensor | None) -> None:
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(f"images: expected floating-point (B, C, H, W), got {images.dtype} {tuple(images.shape)}")
    for name, classes in (("labels", labels), ("targets", targets)):
        if classes is not None and (classes.shape != images.shape[:1] or classes.is_floating_point()):
            raise ValueError(
                f"{name}: expected integers ({images.shape[0]},), got {classes.dtype} {tuple(classes.shape)}"
            )
    if images.numel() and not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(f"images: expected values in [0, 1], got {images.min():.4g} to {images.max():.4g}")


def check_range(labels: Tensor, targets: Tensor | None, classes: int) -> None:
    for name, given in (("labels", labels), ("targets", targets)):
        if given is not None and len(given) and not (given.min() >= 0 and given.max() < classes):
            wrong = int(((given < 0) | (given >= classes)).nonzero()[0, 0])
            raise ValueError(f"{name}: expected 0 to {classes - 1}, got {int(given[wrong])} for sample {wrong}")


def check_finite(broken: Tensor) -> None:
    if bool(broken.any()):
        raise NotFiniteError(int(broken.nonzero()[0, 0]))
