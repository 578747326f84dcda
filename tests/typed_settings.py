"""A value for each setting of a run, as it is typed on a command line and as it is meant."""

from __future__ import annotations

import dataclasses
from typing import Any

from immunity_fast.training.config import TrainConfig

FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}
# A value for each option that is not its default, as it is typed and as it is meant.
GIVEN: dict[str, tuple[list[str], Any]] = {
    "preset": (["fast"], "fast"),
    "dataset": (["folder"], "folder"),
    "data": (["some/file.npz"], "some/file.npz"),
    "image_size": (["64"], 64),
    "channels": (["1"], 1),
    "stream": (["off"], "off"),
    "shard": ([], True),
    "workers": (["3"], 3),
    "limit_train": (["100"], 100),
    "arch": (["densenet121"], "densenet121"),
    "experts": (["3"], 3),
    "stage": (["layer2"], "layer2"),
    "stem": (["imagenet"], "imagenet"),
    "ensemble": (["plain"], "plain"),
    "gate": (["uniform"], "uniform"),
    "shards": ([], True),
    "poison": (["label-flip:0.2"], "label-flip:0.2"),
    "adversary": (["each"], "each"),
    "weights": (["some/file.pt"], "some/file.pt"),
    "perturbation": (["1/8"], 0.125),
    "alpha": (["0.25"], 0.25),
    "beta": (["1e-3"], 1e-3),
    "gamma": (["0"], 0.0),
    "smoothing": (["0.5"], 0.5),
    "score": (["probability"], "probability"),
    "detach_weights": ([], True),
    "label_smoothing": (["0.1"], 0.1),
    "class_weights": (["1,2.5,0"], "1,2.5,0"),
    "ignore_index": (["255"], 255),
    "mixup": (["0.2"], 0.2),
    "cutmix": (["1"], 1.0),
    "adversarial": (["trades"], "trades"),
    "eps": (["4/255"], 4 / 255),
    "attack_alpha": (["0.25"], 0.25),
    "attack_steps": (["7"], 7),
    "attack_batchnorm": (["train"], "train"),
    "attack_gate": (["mean"], "mean"),
    "trades_weight": (["1.5"], 1.5),
    "ema": (["0.5"], 0.5),
    "epochs": (["7"], 7),
    "batch_size": (["9"], 9),
    "accumulate": (["3"], 3),
    "auto_batch": ([], True),
    "checkpoint_activations": ([], True),
    "optimizer": (["adamw"], "adamw"),
    "lr": (["0.125"], 0.125),
    "betas": (["0.8,0.95"], (0.8, 0.95)),
    "optimizer_eps": (["1e-6"], 1e-6),
    "decay": (["weights"], "weights"),
    "schedule": (["step"], "step"),
    "warmup_epochs": (["0.5"], 0.5),
    "lr_min": (["1e-4"], 1e-4),
    "milestones": (["4,7.5"], (4.0, 7.5)),
    "lr_factor": (["0.25"], 0.25),
    "momentum": (["0.5"], 0.5),
    "weight_decay": (["1e-4"], 1e-4),
    "clip_grad_norm": (["2.5"], 2.5),
    "crop_padding": (["2"], 2),
    "rotation": (["7.5"], 7.5),
    "flip": (["on"], "on"),
    "seed": (["11"], 11),
    "device": (["cpu"], "cpu"),
    "compile": (["max"], "max"),
    "batching": (["vmap"], "vmap"),
    "double_backprop": (["forward"], "forward"),
    "amp": (["bf16"], "bf16"),
    "float32": (["ieee"], "ieee"),
    "profile": ([], True),
    "check_images": (["8"], 8),
    "attack_images": (["10"], 10),
    "checkpoint_every": (["50"], 50),
    "early_stopping": (["4"], 4),
    "monitor": (["loss"], "loss"),
    "loggers": (["csv,wandb"], "csv,wandb"),
}
# Settings that have a meaning beside others alone.
BESIDE: dict[str, dict[str, Any]] = {
    "betas": {"optimizer": "adam"},
    "optimizer_eps": {"optimizer": "adam"},
    "milestones": {"schedule": "step"},
    "lr_factor": {"schedule": "step"},
    "adversary": {"adversarial": "pgd", "ensemble": "plain"},
    "shards": {"ensemble": "plain"},
}


def option_of(name: str) -> str:
    """The option of a setting."""
    return f"--{name.replace('_', '-')}"
