"""Images as a model wants them: normalised on the way to it, while the attack stays in the images' own units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from immunity_fast.attacks.checks import outputs_of
from immunity_fast.attacks.mixtures import Model
from immunity_fast.runtime.checks import kind_given


class Preprocessing(TypedDict, total=False):
    """What is done to images before the model, (images − mean) / std; foolbox has the same words.

    Attributes:
        mean: what is subtracted, a number or one of each channel; 0 if it is not there.
        std: what is divided by, likewise; 1 if it is not there.
        axis: of the channels, counted from the last: −3 for (B, C, H, W), if it is not there.
    """

    mean: float | Sequence[float] | Tensor
    std: float | Sequence[float] | Tensor
    axis: int


def preprocessed(model: Model, preprocessing: Preprocessing | Mapping[str, Any] | None) -> Model:
    """A model behind its preprocessing, and before what holds its logits.

    Args:
        model: of normalised images, to logits or an object that holds them, see `runtime.outputs.logits_of`.
        preprocessing: None is none.

    Returns:
        A function of images as they are to logits.

    Raises:
        ValueError: another word, a mean and a std that do not fit to each other, a std that is not positive, an axis
            that is not negative.
        TypeError: a model that cannot be called, such as a list of networks; a preprocessing that is no dictionary.
    """
    if not callable(model) or isinstance(model, nn.ModuleList):
        raise TypeError(
            f"model: expected one that can be called with images, got {kind_given(model)}; `arc` and `mora` take lists"
        )
    if preprocessing is None:
        return lambda images: outputs_of(model(images), len(images))
    if not isinstance(preprocessing, Mapping):
        raise TypeError(f"preprocessing: expected dict(mean=…, std=…), got {kind_given(preprocessing)}")
    unknown = sorted(set(preprocessing) - {"mean", "std", "axis"})
    if unknown:
        raise ValueError(f"preprocessing: expected mean, std and axis, got {', '.join(map(repr, unknown))}")
    axis = preprocessing.get("axis", -3)
    if axis not in (-3, -2, -1):
        raise ValueError(f"preprocessing: expected an axis of -3, -2 or -1, got {axis}")
    mean, std = (_numbers(name, preprocessing.get(name, default)) for name, default in (("mean", 0.0), ("std", 1.0)))
    if mean.numel() > 1 and std.numel() > 1 and len(mean) != len(std):
        raise ValueError(f"preprocessing: expected as many of mean and std, got {len(mean)} and {len(std)}")
    if not bool((std > 0).all()):
        raise ValueError(f"preprocessing: expected a positive std, got {std.tolist()}")
    mean, std = (numbers.view(-1, *[1] * (-axis - 1)) if numbers.dim() else numbers for numbers in (mean, std))
    channels = max(mean.numel(), std.numel())

    def model_of_images(images: Tensor) -> Tensor:
        if channels not in (1, images.shape[axis]):
            raise ValueError(f"preprocessing: expected mean and std of {images.shape[axis]} channels, got {channels}")
        return outputs_of(model((images - mean.to(images)) / std.to(images)), len(images))

    return model_of_images


def _numbers(name: str, value: Any) -> Tensor:
    try:
        numbers = torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError):
        raise TypeError(f"preprocessing: expected a {name} of numbers, got {value!r}") from None
    if numbers.dim() > 1 or not bool(numbers.isfinite().all()):
        raise ValueError(f"preprocessing: expected a {name} of finite numbers (C,), got {value}")
    return numbers
