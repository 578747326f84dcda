"""Networks of torchvision and timm, by their own names, without their weights: nothing is downloaded.

Neither library is needed for anything else: each is imported where a name of it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from immunity_fast.experts.channels import adapt_


class Library(NamedTuple):
    """A library of networks.

    Args:
        names: all that it has.
        create: (name, number of classes, the images' (H, W) or None, their channels) to a network with random weights.
    """

    names: Callable[[], list[str]]
    create: Callable[[str, int, tuple[int, int] | None, int], nn.Module]


def create(
    library: str, name: str, num_classes: int, image_size: tuple[int, int] | None, channels: int = 3
) -> nn.Module:
    """A network of a library with random weights: images (B, channels, H, W) to logits (B, num_classes), also in
    training.

    Args:
        library: of `LIBRARIES`.
        name: what the library calls it.
        num_classes: K.
        image_size: (H, W), which some transformers are built for; None is the library's default.
        channels: of the images.

    Raises:
        ValueError: the library has no such name, or cannot make it for such images.
        ModuleNotFoundError: it is not installed.
    """
    try:
        return _twice_differentiable(LIBRARIES[library].create(name, num_classes, image_size, channels))
    except ModuleNotFoundError:
        raise
    except Exception as error:  # whatever a library may raise
        place, reason = f"{library}:{name}", " ".join(str(error).split())
        raise ValueError(
            f"{place}: expected a network for {num_classes} classes, got {type(error).__name__}: {reason}"
        ) from error


def names(library: str) -> list[str]:
    """All names of a library.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    return LIBRARIES[library].names()


def _torchvision() -> Any:
    try:
        import torchvision.models

        return torchvision.models
    except ModuleNotFoundError as error:
        raise _missing("torchvision") from error
    except RuntimeError as error:  # its operators are made for another version of torch
        raise ModuleNotFoundError(
            f"torchvision: does not go with this torch ({error}); install a pair that does"
        ) from error


def _timm() -> Any:
    try:
        import timm

        return timm
    except ModuleNotFoundError as error:
        raise _missing("timm") from error


def _missing(library: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(f"{library}:NAME needs {library}, which is not installed: pip install {library}")


def _torchvision_names() -> list[str]:
    models = _torchvision()
    found: list[str] = models.list_models(module=models)  # of detection, segmentation and video others
    return found


def _create_torchvision(name: str, num_classes: int, image_size: tuple[int, int] | None, channels: int) -> nn.Module:
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):  # with auxiliary classifiers their outputs are tuples in training
        options = {"aux_logits": False, "init_weights": True}
    if name.startswith("vit_") and image_size is not None:
        options = {"image_size": _square(image_size)}
    network: nn.Module = _torchvision().get_model(name, weights=None, num_classes=num_classes, **options)
    return network if channels == 3 else adapt_(network, channels)


def _timm_names() -> list[str]:
    found: list[str] = _timm().list_models()
    return found


def _create_timm(name: str, num_classes: int, image_size: tuple[int, int] | None, channels: int) -> nn.Module:
    timm = _timm()
    options: dict[str, Any] = {"num_classes": num_classes}
    if channels != 3:
        options["in_chans"] = channels
    network: nn.Module
    if image_size is not None:
        try:
            network = timm.create_model(name, pretrained=False, img_size=image_size, **options)
        except TypeError as error:
            if "img_size" not in str(error):  # which convolutional networks do not take
                raise
        else:
            return network
    network = timm.create_model(name, pretrained=False, **options)
    return network


class Hardsigmoid(nn.Module):
    """ReLU6(x + 3)/6, as `nn.Hardsigmoid`, whose gradient PyTorch cannot differentiate; losses on heatmaps do that."""

    def forward(self, x: Tensor) -> Tensor:
        """The same shape, in [0, 1]."""
        return nn.functional.relu6(x + 3) / 6


def _twice_differentiable(network: nn.Module) -> nn.Module:
    """The network with `Hardsigmoid` in the place of PyTorch's, which MobileNetV3 has."""
    for name, module in list(network.named_modules(remove_duplicate=False)):
        if type(module) is nn.Hardsigmoid:
            network.set_submodule(name, Hardsigmoid())
    return network


def _square(image_size: tuple[int, int]) -> int:
    if image_size[0] != image_size[1]:
        raise ValueError(f"image_size: expected square images, got {image_size[0]}×{image_size[1]}")
    return image_size[0]


LIBRARIES = {
    "torchvision": Library(_torchvision_names, _create_torchvision),
    "timm": Library(_timm_names, _create_timm),
}
