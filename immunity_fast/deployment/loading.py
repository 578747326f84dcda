"""A model back from what training or `save_pretrained` has written."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from immunity_fast.deployment.card import run_card
from immunity_fast.models.pretrained import CONFIG, WEIGHTS, needs_safetensors

if TYPE_CHECKING:
    from immunity_fast.models.moe import ImmunityMoE

WhichCheckpoint = Literal["best", "last"]


def load_trained(
    run: str | Path,
    *,
    device: torch.device | str = "cpu",
    checkpoint: WhichCheckpoint | None = None,
    trust_code: bool = False,
) -> ImmunityMoE:
    """What `immunity_fast.load` returns; see there.

    Raises:
        FileNotFoundError, ValueError, ModuleNotFoundError: see `immunity_fast.load`.
    """
    path = Path(run).expanduser()
    if checkpoint not in (None, "best", "last"):
        raise ValueError(f"checkpoint: expected 'best', 'last' or None, got {checkpoint!r}")
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such run")
    needs_safetensors("loading a model")
    from immunity_fast.models.moe import ImmunityMoE
    from immunity_fast.training.checkpoint import BEST, LAST, load_info, load_model, model_file, not_finite
    from immunity_fast.training.shards import REST, newest

    if (path / CONFIG).is_file() and (path / WEIGHTS).is_file():
        if checkpoint is not None:
            raise ValueError(
                f"checkpoint: expected None for {path}, which save_pretrained has written, got {checkpoint!r}"
            )
        model = ImmunityMoE.from_pretrained(path, device=device, trust_code=trust_code)
        model.gate.switch = "mean"
        return model
    last = path / LAST
    if path.is_dir():
        if not (path / CONFIG).is_file():
            raise FileNotFoundError(f"{path}: there is no run (no {CONFIG}) in this folder")
        shards = newest(path)
        if shards is None and not any((path / file).is_file() for file in (BEST, LAST)):
            raise FileNotFoundError(f"{path}: this run has no checkpoint yet; train it first")
        if shards is not None or (path / LAST).is_file():
            info = load_info(path / LAST if shards is None else shards / REST)
            if "stopped" not in info:  # early, as it was to be
                _warn_if_unfinished(path, info["epoch"])
        if shards is not None and not (path / LAST).is_file():
            last = shards
    file = model_file({None: path, "best": path / BEST, "last": last}[checkpoint])
    model, info = load_model(file, device, trust_code=trust_code)
    if (wrong := not_finite(model.state_dict())) is not None:
        raise ValueError(f"{file}: expected finite weights, got some that are NaN or infinite ({wrong})")
    model.gate.switch = "mean"
    if model.classes is None and "classes" in info:
        model.classes = tuple(info["classes"])
    if path.is_dir():
        model.card = run_card(path, model, evaluated=checkpoint is None)
    return model


def _warn_if_unfinished(folder: Path, trained: int) -> None:
    """A model from the middle of a run is a model, but hardly what its user believes to have."""
    try:
        epochs = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["epochs"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # what the settings are is no matter of the weights
    if isinstance(epochs, int) and trained < epochs:
        warnings.warn(
            f"{folder}: this run stopped after {trained} of {epochs} epochs; `python -m immunity_fast.train --resume` "
            "goes on with it",
            stacklevel=4,
        )
