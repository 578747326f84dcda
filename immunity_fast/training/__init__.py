"""Training: settings, the step, the loop, checkpoints, the run folder, and the `Trainer` that has them all."""

from importlib import import_module
from typing import Any

# What a training of one's own is written with, and where it stands; each is imported when it is asked for.
_PLACES = {
    "Callback": "callbacks",
    "CallbackError": "callbacks",
    "Checkpoint": "callbacks",
    "ImmunityLightningModule": "lightning",
    "CSVLogger": "loggers",
    "EarlyStopping": "callbacks",
    "LambdaCallback": "callbacks",
    "Logger": "loggers",
    "MLflowLogger": "loggers",
    "TensorBoardLogger": "loggers",
    "TrainConfig": "config",
    "Trainer": "trainer",
    "WandbLogger": "loggers",
    "parameter_groups": "decay",
}
__all__ = list(_PLACES)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
