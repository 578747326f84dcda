"""What a module is in for the length of a `with` block: frozen, evaluating, or normalising by a batch."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No gradients of the model's own tensors in a `with` block: an attack has no use for them."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode in a `with` block, and then again the mode that each module was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def batch_statistics(modules: Iterable[nn.Module]) -> Iterator[None]:
    """BatchNorm among the modules normalises by the batch, without counting it in its running statistics.

    In a `with` block inside of `evaluating`, which puts the modes back.
    """
    tracking: list[_BatchNorm] = []
    for module in modules:
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            module.training = True
            module.track_running_stats = False  # it would update the running ones
            tracking.append(module)
    try:
        yield
    finally:
        for batchnorm in tracking:
            batchnorm.track_running_stats = True
