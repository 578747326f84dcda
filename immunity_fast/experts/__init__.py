"""The expert networks, one file an architecture."""

from __future__ import annotations

from immunity_fast.experts.densenet import densenet121
from immunity_fast.experts.googlenet import googlenet
from immunity_fast.experts.resnet import resnet8, resnet18
from immunity_fast.experts.staged import StagedNetwork

_BUILDERS = {"resnet18": resnet18, "googlenet": googlenet, "densenet121": densenet121, "resnet8": resnet8}

NAMES: tuple[str, ...] = tuple(_BUILDERS)
"""The architectures that :func:`create` knows."""


def create(name: str, num_classes: int = 10) -> StagedNetwork:
    """A freshly initialised expert: images (B, 3, H, W) to logits (B, num_classes).

    Raises ``ValueError`` if ``name`` is not one of :data:`NAMES` or ``num_classes`` is below 2.
    """
    if name not in _BUILDERS:
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(NAMES)}")
    if num_classes < 2:
        raise ValueError(f"num_classes: got {num_classes}, expected at least 2")
    return _BUILDERS[name](num_classes)
