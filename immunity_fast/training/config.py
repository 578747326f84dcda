"""A training run's settings: one frozen dataclass, its presets, its JSON and its command-line options."""

import argparse
import dataclasses
import functools
import math
import os
import types
import typing
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from immunity_fast.arguments import Score
from immunity_fast.data import OWN
from immunity_fast.data.datasets import LISTED, Stream
from immunity_fast.data.datasets import NAMES as DATASETS
from immunity_fast.data.poisoning import named
from immunity_fast.data.streaming import Workers
from immunity_fast.experts import NAMES as ARCHITECTURES
from immunity_fast.experts import resolve, split_names
from immunity_fast.experts.registry import FORMS, check_form
from immunity_fast.experts.stems import StemChoice
from immunity_fast.experts.symmetry import PERTURBATION
from immunity_fast.losses import ALPHA, BETA, GAMMA, FusedImmunityLoss
from immunity_fast.models.gate import GateKind, Switch
from immunity_fast.models.noise import Noise
from immunity_fast.peers.base import EnsembleLoss
from immunity_fast.peers.methods import IMMUNITY, METHODS, PEERS, method_of
from immunity_fast.peers.rse import RSELoss
from immunity_fast.runtime import cli
from immunity_fast.runtime.compilation import Compile
from immunity_fast.runtime.files import abbreviated, write_atomically
from immunity_fast.runtime.precision import AmpChoice, Float32
from immunity_fast.runtime.strategies import Batching, DoubleBackprop
from immunity_fast.targets import balanced_weights
from immunity_fast.training import config_file
from immunity_fast.training.adversarial import Adversarial, Adversary, BatchNormMode, InnerAttackSettings
from immunity_fast.training.decay import Decay, parameter_groups
from immunity_fast.training.loggers import LOGGERS, names_of
from immunity_fast.training.monitoring import DIRECTIONS, SHORT
from immunity_fast.training.optimizers import KINDS, OPTIMISERS, Optimiser, check_has, make_optimizer
from immunity_fast.training.schedules import FACTORS, LearningRate, Schedule

Flip = Literal["auto", "on", "off"]
GateChoice = Literal["auto", "switch", "uniform", "selection"]
MOST_WORKERS = 1024  # processes that read images: more are a mistake


# Settings that are gone, and the value with which they change nothing: runs from before have them in config.json.
REMOVED = {"weight_scale": "channels"}
# Settings that runs from before do not have in config.json, and what these were trained with.
ADDED = {
    "label_smoothing": 0.0,
    "class_weights": None,
    "ignore_index": None,
    "mixup": 0.0,
    "cutmix": 0.0,
    "stem": "cifar",
    "weights": None,
    "perturbation": PERTURBATION,
    "channels": 3,
    "optimizer": "sgd",
    "accumulate": 1,
    "auto_batch": False,
    "checkpoint_activations": False,
    "betas": None,
    "optimizer_eps": None,
    "decay": "all",
    "schedule": "cosine",
    "warmup_epochs": 0.0,
    "lr_min": 0.0,
    "milestones": None,
    "lr_factor": None,
    "shard": False,
    "stream": "auto",
    "workers": "auto",
    "early_stopping": None,
    "monitor": None,
    "loggers": "tensorboard",
    "ensemble": "immunity",
    "gate": "auto",
    "adversary": "mixture",
    "shards": False,
    "poison": None,
}
# What is another's where a setting is: another optimiser has rates of its own, another schedule numbers of its own.
BELONGING = {
    "optimizer": ("lr", "momentum", "weight_decay", "betas", "optimizer_eps"),
    "schedule": ("milestones", "lr_factor"),
}


def _option(group: str, default: Any, text: str, choices: tuple[str, ...] = ()) -> Any:
    """A setting: under which heading of --help it stands, its default, what it does, its values if they are listed."""
    return field(default=default, metadata={"group": group, "help": text, "choices": choices})


def _of_each(default: str) -> str:
    """What each optimiser has in the place of a setting that nobody gives, for --help."""
    found = {name: getattr(kind, default) for name, kind in KINDS.items()}
    named = [f"{name} {value:g}" for name, value in found.items() if value]
    return ", ".join(named) + (", others 0" if len(named) < sum(value is not None for value in found.values()) else "")


_data = partial(_option, "preset and data")
_model = partial(_option, "model")
_loss = partial(_option, "loss")
_ensemble = partial(_option, "ensemble")
_attack = partial(_option, "adversarial training")
_optimiser = partial(_option, "optimisation")
_images = partial(_option, "augmentation")
_speed = partial(_option, "device and speed")
_output = partial(_option, "checks and output")


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a run; `from_json` and the command line check names and types, construction checks the ranges.

    Raises:
        ValueError: a value out of its range.
    """

    preset: str = _data("quickstart", "settings to start from; the other options change single ones")
    dataset: str = _data("digits", "what to train on", DATASETS)
    data: str | None = _data(
        None,
        "file (npz), folder of images (folder), archives such as train-{000..009}.tar or their folder (webdataset), "
        "what save_to_disk wrote or a folder of parquet files (huggingface), or download folder (cifar10, cifar100)",
    )
    image_size: int | None = _data(
        None, "for folder, webdataset and huggingface: scale and crop images to this many pixels a side"
    )
    channels: int = _data(
        3,
        "channels of the images and of the networks' first convolution; 1: grey, which coloured images are converted "
        "to; npz: any number that it has",
    )
    stream: Stream = _data(
        "auto",
        "for the same: read images when they are needed; off: hold them all in memory; auto: where they do not fit",
    )
    workers: int | str = _data("auto", "processes that read images; 0: none besides this one; auto: one a core")
    limit_train: int | None = _data(None, "use so many training images")
    poison: str | None = _data(
        None,
        "poison the training images: label-flip:0.2, badnets:0.1,target=0,size=3, or an .npz file of poisons; default: "
        "none",
    )
    arch: str = _model(
        "resnet8",
        f"the experts' architecture: {', '.join(ARCHITECTURES)}, {FORMS}; several with commas between take turns",
    )
    experts: int = _model(
        5, "number of experts; of several --arch, as many as these; 1: a single network, by its cross-entropy alone"
    )
    stage: str | None = _model(
        None,
        "stage Grad-CAM looks at, by its dotted name; of several --arch one for all, or one for each with commas "
        "between; default: the last whose map exceeds 8×8",
    )
    stem: StemChoice = _model(
        "auto",
        "of resnet18, googlenet and densenet121; auto: the ImageNet form for images above 64 pixels a side",
    )
    weights: str | None = _model(
        None,
        "begin from the weights in this file (.safetensors, .pt, .pth): of one network for all experts, or of a "
        "mixture; of several --arch one for each with commas between",
    )
    perturbation: float = _model(
        PERTURBATION,
        "where experts would begin with equal weights: random noise on all but the first, in units of each tensor's "
        "root mean square; 0: none, and they never part",
    )
    ensemble: str = _ensemble(
        "immunity",
        f"how the experts are trained to be one ensemble: {', '.join(METHODS)}; with settings of its own as "
        "adp:alpha=2,beta=0.5",
    )
    gate: GateChoice = _ensemble(
        "auto",
        "how the experts' answers are mixed: switch, the gate of the paper; uniform, their average; selection, one "
        "expert at random; auto: as the ensemble has it",
    )
    shards: bool = _ensemble(
        False, "each expert learns from a part of the training images of its own, and sees as much of each batch"
    )
    alpha: float = _loss(ALPHA, "weight of each expert's own cross-entropy")
    beta: float = _loss(BETA, "weight of the mutual-information loss")
    gamma: float = _loss(GAMMA, "weight of the position-stability loss (in pixels⁴, so it depends on the image size)")
    smoothing: float = _loss(0.01, "smoothing of the heatmaps' distributions")
    score: Score = _loss("logit", "what Grad-CAM differentiates")
    detach_weights: bool = _loss(False, "treat Grad-CAM's weights as constants: cheaper, approximate gradient")
    label_smoothing: float = _loss(0.0, "of cross-entropy: this much of each target goes to all classes alike")
    class_weights: str | None = _loss(
        None, "what the classes weigh in cross-entropy: one number each with commas between, or balanced"
    )
    ignore_index: int | None = _loss(
        None, "label of images that count for nothing; of probabilities the value of a whole row; default: all count"
    )
    adversarial: Adversarial = _attack("off", "train on attacked images")
    eps: float = _attack(8 / 255, "Linf radius of the training's and the epoch's attacks")
    attack_alpha: float = _attack(2 / 255, "step of the training's attack; fgsm-rs takes 1.25 eps, n-fgsm eps")
    attack_steps: int = _attack(10, "steps of the training's attack; fgsm-rs and n-fgsm take 1")
    attack_batchnorm: BatchNormMode = _attack("eval", "BatchNorm in the training's attack: running or batch statistics")
    attack_gate: Switch = _attack("off", "gate in the training's attack; off: the trained weights")
    adversary: Adversary = _attack("mixture", "what is attacked: the mixture, or each expert on its own")
    trades_weight: float = _attack(6.0, "lambda of TRADES")
    ema: float | None = _optimiser(None, "evaluate an average of the weights with this decay; default: the weights")
    epochs: int = _optimiser(12, "passes over the training images")
    batch_size: int = _optimiser(32, "images a batch")
    accumulate: int = _optimiser(1, "batches a step of the optimiser, which takes the mean of their gradients")
    auto_batch: bool = _optimiser(
        False, "where a batch does not fit into memory, halve it, and take twice as many a step; said and recorded"
    )
    optimizer: Optimiser = _optimiser("sgd", "torch.optim's of that name, sgd with Nesterov momentum")
    # Those of None are what the optimiser has in `optimizers.KINDS`, from the moment the settings are made.
    lr: float = _optimiser(None, f"highest learning rate; default: {_of_each('lr')}")
    momentum: float = _optimiser(None, f"of sgd and rmsprop; default: {_of_each('momentum')}")
    betas: tuple[float, ...] | None = _optimiser(None, "two numbers of Adam and its kin; default: torch's, 0.9,0.999")
    optimizer_eps: float | None = _optimiser(None, "epsilon of all optimisers but sgd; default: torch's")
    weight_decay: float = _optimiser(None, f"decoupled in adamw alone; default: {_of_each('weight_decay')}")
    decay: Decay = _optimiser("all", "what decays; weights: no biases, normalisations, tokens, position embeddings")
    schedule: Schedule = _optimiser("cosine", "how the learning rate falls after the warm-up")
    warmup_epochs: float = _optimiser(0.0, "epochs in which the learning rate rises, step by step")
    lr_min: float = _optimiser(0.0, "no schedule falls below it")
    milestones: tuple[float, ...] | None = _optimiser(
        None, "of --schedule step: after which epochs the rate falls, 100,150; default: half and three quarters"
    )
    lr_factor: float | None = _optimiser(
        None, f"by which step and exponential fall; default: {FACTORS['step']} and, an epoch, {FACTORS['exponential']}"
    )
    clip_grad_norm: float | None = _optimiser(None, "clip the gradient's norm to this; default: no clipping")
    seed: int = _optimiser(0, "seed of weights, batches, augmentation and gate")
    crop_padding: int = _images(4, "random crops move by up to so many pixels")
    rotation: float = _images(15.0, "random rotations turn by up to so many degrees")
    flip: Flip = _images("auto", "mirror half of the images; auto: where the data set is known to allow it")
    mixup: float = _images(0.0, "alpha of MixUp, which blends images and their labels; 0: none")
    cutmix: float = _images(
        0.0, "alpha of CutMix, which pastes a box of one into the other; 0: none; with both each batch has one of them"
    )
    device: str = _speed("auto", "cpu, cuda, cuda:1, …; auto: CUDA if there is any")
    compile: Compile = _speed("auto", "compile the step; max: try kernels out, takes long; auto: on, on a GPU")
    batching: Batching = _speed("auto", "how the experts run at once; auto: what was measured to be faster")
    double_backprop: DoubleBackprop = _speed("auto", "how to differentiate Grad-CAM, both exact; auto: likewise")
    checkpoint_activations: bool = _speed(
        False, "compute activations again in the backward pass, stage by stage, instead of keeping them: less memory"
    )
    amp: AmpChoice = _speed("off", "half precision for convolutions and products; auto: bf16 where it is fast")
    float32: Float32 = _speed("tf32", "factors of a GPU's float32 convolutions and products in training")
    shard: bool = _speed(
        False, "weights in shards, one in each process of torchrun: for experts that are too large for one device"
    )
    profile: bool = _output(False, "write a trace of some steps and a table of operators to the run folder")
    check_images: int = _output(256, "validation images attacked by PGD-10 after each epoch; 0: none")
    attack_images: int = _output(1000, "test images attacked at the end of the run")
    early_stopping: int | None = _output(
        None, "stop after so many epochs in a row in which what is monitored was not better; default: do not"
    )
    monitor: str | None = _output(
        None,
        f"what early stopping watches, and what says which epoch is the best: {', '.join(DIRECTIONS)}; default: "
        "accuracy on validation images, in adversarial training under PGD-10",
    )
    loggers: str = _output(
        "tensorboard",
        f"where an epoch's numbers go as well: {', '.join(LOGGERS)}, several with commas between, or none",
    )
    checkpoint_every: int = _output(500, "steps between checkpoints; the end of an epoch always writes one")

    def __post_init__(self) -> None:
        _check(self, "optimizer", self.optimizer in KINDS, f"one of {', '.join(OPTIMISERS)}")
        for name in ("lr", "momentum", "weight_decay"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(KINDS[self.optimizer], name) or 0.0)
        self._convert()
        for name in ("epochs", "batch_size", "accumulate", "checkpoint_every", "attack_images"):
            _check(self, name, getattr(self, name) >= 1, "at least 1")
        try:
            check_form(ARCHITECTURES[0] if self.arch == OWN else self.arch)
        except ValueError as error:
            raise ValueError(f"--arch: {str(error).removeprefix('name: ')}") from error
        names = len(split_names(self.arch))
        several = f", as many as --arch names, {', '.join(split_names(self.arch))}" if names > 1 else ""
        _check(self, "experts", self.experts >= names, f"at least {names}{several}")
        _check(self, "perturbation", 0 <= self.perturbation < math.inf, "a finite number of at least 0")
        number = isinstance(self.workers, int) and not isinstance(self.workers, bool)
        _check(
            self,
            "workers",
            self.workers == "auto" or (number and 0 <= int(self.workers) <= MOST_WORKERS),
            f"auto or 0 to {MOST_WORKERS} processes",
        )
        _check(self, "limit_train", self.limit_train is None or self.limit_train >= 1, "at least 1")
        if self.poison is not None:
            try:
                named(self.poison)
            except ValueError as error:
                raise ValueError(f"--{error}") from error
        for name in ("alpha", "beta", "gamma", "smoothing", "weight_decay"):
            _check(self, name, 0 <= getattr(self, name) < math.inf, "a finite number of at least 0")
        for name in ("eps", "attack_alpha"):
            _check(self, name, 0 <= getattr(self, name) <= 1, "0 to 1, in units of the images' range")
        _check(self, "attack_steps", self.attack_steps >= 1, "at least 1")
        _check(self, "trades_weight", 0 <= self.trades_weight < math.inf, "a finite number of at least 0")
        _check(self, "ema", self.ema is None or 0 <= self.ema < 1, "at least 0 and below 1")
        _check(self, "lr", 0 < self.lr < math.inf, "a finite number above 0")
        _check(self, "momentum", 0 <= self.momentum < 1, "at least 0 and below 1")
        self._check_optimizer()
        self._check_shards()
        self._check_schedule()
        _check(self, "clip_grad_norm", self.clip_grad_norm is None or self.clip_grad_norm > 0, "a number above 0")
        for name in ("crop_padding", "check_images"):
            _check(self, name, getattr(self, name) >= 0, "at least 0")
        _check(self, "early_stopping", self.early_stopping is None or self.early_stopping >= 1, "at least 1 epoch")
        _check(self, "monitor", self.monitored in (None, *DIRECTIONS), f"one of {', '.join(DIRECTIONS)}")
        _check(self, "monitor", _measures(self, self.monitored), "what is measured with these settings")
        names_of(self.loggers)
        self._check_targets()
        self._check_ensemble()
        _check(self, "seed", self.seed >= 0, "0 to 2⁶³ − 1")
        _check(self, "channels", self.channels >= 1, "at least 1")
        _check(self, "image_size", self.image_size is None or self.image_size >= 1, "at least 1 pixel")
        _check(self, "rotation", 0 <= self.rotation <= 180, "0 to 180 degrees")
        for option in dataclasses.fields(self):
            choices = _choices(option)
            value = getattr(self, option.name)
            if isinstance(value, int):  # more is no 64-bit integer, which tensors and generators take
                _check(self, option.name, value < 2**63, "0 to 2⁶³ − 1" if option.name == "seed" else "less than 2⁶³")
            own = option.name == "dataset" and value == OWN  # which only code can give
            _check(self, option.name, not choices or value in choices or own, f"one of {', '.join(choices)}")

    def changed(self, **settings: Any) -> "TrainConfig":
        """These settings with single ones changed, as a command line changes a preset's.

        Unlike `dataclasses.replace`, another optimiser or schedule comes with numbers of its own, where none are given:
        SGD's rate is not AdamW's.

        Args:
            settings: by name.

        Raises:
            ValueError: as construction.
        """
        return dataclasses.replace(self, **{**_following(vars(self), settings), **settings})

    @classmethod
    def from_preset(cls, name: str, **settings: Any) -> "TrainConfig":
        """The settings of a preset, of which single ones are changed: `TrainConfig.from_preset("paper", epochs=100)`.

        Args:
            name: quickstart, paper or fast.
            settings: by name.

        Raises:
            ValueError: there is no such preset; or as construction.
        """
        return from_preset({"preset": name, **settings})

    def _convert(self) -> None:
        """Bring each setting to its type, where it is one in another spelling, and refuse what is none."""
        for option in dataclasses.fields(self):
            value, kinds = getattr(self, option.name), _types()[option.name]
            if isinstance(value, os.PathLike):
                value = os.fspath(value)
            if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # NumPy's numbers, of a sweep
                value = value.item()
            if option.name != "class_weights":  # which may be any numbers
                value = config_file.converted(value, kinds, _choices(option))
                _check_type(f"--{option.name.replace('_', '-')}", value, kinds)
            object.__setattr__(self, option.name, value)

    def _check_optimizer(self) -> None:
        betas = self.betas or ()
        two = _are_numbers(betas) and len(betas) == 2 and all(0 <= beta < 1 for beta in betas)
        _check(self, "betas", self.betas is None or two, "two numbers of at least 0 and below 1, such as 0.9,0.999")
        eps = self.optimizer_eps
        _check(self, "optimizer_eps", eps is None or 0 <= eps < math.inf, "a finite number of at least 0")
        try:
            check_has(self.optimizer, betas=self.betas, eps=eps)
        except ValueError as error:
            name, _, said = str(error).partition(": ")
            raise ValueError(f"--{name.replace('_', '-')}: {said}") from error

    def _check_schedule(self) -> None:
        warm = f"0 to {self.epochs}, the run's epochs"
        _check(self, "warmup_epochs", 0 <= self.warmup_epochs <= self.epochs, warm)
        _check(self, "lr_min", 0 <= self.lr_min <= self.lr, f"0 to {self.lr:g}, the learning rate")
        if self.milestones is not None:
            fits = _are_numbers(self.milestones) and all(
                before < after < math.inf
                for before, after in zip((0.0, *self.milestones), self.milestones, strict=False)
            )
            _check(self, "milestones", bool(self.milestones) and fits, "epochs, ascending, such as 100,150")
            _check(self, "milestones", self.schedule == "step", f"none with --schedule {self.schedule}, but step")
        if self.lr_factor is not None:
            _check(self, "lr_factor", 0 < self.lr_factor <= 1, "a number above 0 and at most 1")
            falls = self.schedule in FACTORS
            _check(self, "lr_factor", falls, f"none with --schedule {self.schedule}, but {' and '.join(FACTORS)}")

    def optimizer_of(self, model: nn.Module) -> Optimizer:
        """The optimiser of a model's parameters, in groups that decay and do not."""
        return make_optimizer(
            self.optimizer,
            parameter_groups(model, self.weight_decay, self.decay),
            self.lr,
            momentum=self.momentum,
            betas=self.betas,
            eps=self.optimizer_eps,
        )

    def learning_rate(self, steps_per_epoch: int, stages: int = 1) -> LearningRate:
        """The learning rate of each step, of so many in an epoch.

        Args:
            steps_per_epoch: of the optimiser.
            stages: parts of the training, of as many epochs each, in which it rises and falls anew.
        """
        return LearningRate(
            self.lr,
            self.epochs // stages * steps_per_epoch,
            steps_per_epoch,
            self.schedule,
            self.warmup_epochs,
            self.lr_min,
            self.milestones or (),
            self.lr_factor,
        )

    def _check_shards(self) -> None:
        """Check what weights in shards cannot do."""
        if self.shard:
            _check(self, "adversarial", self.adversarial != "trades", "off, pgd or fgsm-rs with --shard")
            _check(self, "amp", self.amp != "fp16", "off or bf16 with --shard")
            _check(self, "compile", self.compile in ("auto", "off"), "auto or off with --shard")
            _check(self, "batching", self.batching != "vmap", "auto or loop with --shard")
            _check(self, "checkpoint_activations", not self.checkpoint_activations, "none with --shard")
            _check(self, "auto_batch", not self.auto_batch, "none with --shard")

    def _check_targets(self) -> None:
        for name in ("mixup", "cutmix"):
            _check(self, name, 0 <= getattr(self, name) < math.inf, "a finite number of at least 0")
        _check(self, "label_smoothing", 0 <= self.label_smoothing <= 1, "0 to 1")
        _check(self, "ignore_index", self.ignore_index is None or self.ignore_index > -(2**63), "a 64-bit integer")
        given: Any = self.class_weights
        if given is not None and not isinstance(given, str):  # as a person writes them in Python
            with suppress(TypeError):
                object.__setattr__(self, "class_weights", ",".join(f"{float(weight):g}" for weight in given))
        if self.class_weights not in (None, "balanced"):
            _check(
                self,
                "class_weights",
                self._weights() is not None,
                "balanced, or numbers ≥ 0, not all 0, with commas between",
            )

    def _weights(self) -> list[float] | None:
        """The class weights that are given as numbers; None where they are no such numbers."""
        try:
            weights = [float(word) for word in str(self.class_weights).split(",")]
        except ValueError:
            return None
        return weights if any(weights) and all(0 <= weight < math.inf for weight in weights) else None

    def weights_of_classes(self, labels: Tensor, classes: int) -> Tensor | None:
        """(K,) class weights for training labels (n,), or probabilities (n, K).

        Raises:
            ValueError: numbers of another number of classes.
        """
        if self.class_weights is None:
            return None
        if self.class_weights == "balanced":
            return balanced_weights(labels, classes, self.ignore_index)
        weights = self._weights() or []
        if len(weights) != classes:
            raise ValueError(
                f"--class-weights: expected {classes}, one for each class, or balanced, got {len(weights)}, "
                f"{self.class_weights}"
            )
        return torch.tensor(weights)

    def loss_fn(
        self, image_size: tuple[int, int], group_name: str = "", class_weights: Tensor | None = None
    ) -> FusedImmunityLoss:
        """The loss of these settings, with heatmaps of the images' size (H, W).

        Args:
            image_size: (H, W).
            group_name: of a process group; "" is this process alone.
            class_weights: of `weights_of_classes`.
        """
        return FusedImmunityLoss(
            self.alpha,
            self.beta,
            self.gamma,
            size=image_size,
            smoothing=self.smoothing,
            score=self.score,
            detach_weights=self.detach_weights,
            group_name=group_name,
            label_smoothing=self.label_smoothing,
            class_weights=class_weights,
            ignore_index=self.ignore_index,
        )

    @property
    def gate_kind(self) -> GateKind:
        """How the experts' answers are mixed."""
        if self.gate != "auto":
            return self.gate
        name = self.ensemble.partition(":")[0]
        return "switch" if name == IMMUNITY else PEERS[name].gate

    def method(self, group_name: str = "", class_weights: Tensor | None = None) -> EnsembleLoss | None:
        """What trains the experts in the place of `loss_fn`, if anything does.

        Args:
            group_name, class_weights: see `loss_fn`.
        """
        return method_of(
            self.ensemble,
            label_smoothing=self.label_smoothing,
            class_weights=class_weights,
            ignore_index=self.ignore_index,
            group_name=group_name,
        )

    @property
    def noise(self) -> Noise | None:
        """The noise before the convolutions of the network, where there is some."""
        method = self.method()
        return method.noise if isinstance(method, RSELoss) else None

    def _check_ensemble(self) -> None:
        """Check that what trains the experts can be done with the other settings."""
        try:
            method = self.method()
        except ValueError as error:
            raise ValueError(f"--{error}") from error
        each = self.adversary == "each"
        _check(self, "adversary", not each or self.adversarial != "off", "mixture without --adversarial")
        _check(self, "adversary", not each or self.adversarial != "trades", "mixture with --adversarial trades")
        own = method is not None and method.own_images
        _check(self, "adversary", not each or own, f"mixture with --ensemble {self.ensemble}, such as plain can do")
        _check(self, "shards", not self.shards or self.ensemble == "plain", "none without --ensemble plain")
        _check(self, "shards", not self.shards or self.experts > 1, "none of one network")
        if self.shards:
            _check(self, "batch_size", self.batch_size >= self.experts, f"at least {self.experts}, an image an expert")
            _check(self, "auto_batch", not self.auto_batch, "none with --shards")
            _check(self, "adversary", each or self.adversarial == "off", "each with --shards")
        if method is None:
            return
        _check(self, "experts", self.experts == 1 or self.noise is None, f"1 with --ensemble {self.ensemble}")
        _check(self, "adversarial", self.adversarial != "trades", f"another with --ensemble {self.ensemble}")
        _check(self, "shard", not self.shard, f"none with --ensemble {self.ensemble}")
        fixed = f"auto, uniform or selection with --ensemble {self.ensemble}, whose loss trains no gate"
        _check(self, "gate", self.gate_kind != "switch", fixed)
        try:
            method.check_experts(self.experts)
        except ValueError as error:
            raise ValueError(f"--{error}") from error
        fresh = self.weights is None or not method.fresh
        _check(self, "weights", fresh, f"none with --ensemble {self.ensemble}, which begins its members anew")
        stages = method.stages(self.experts)
        _check(self, "epochs", self.epochs % stages == 0, f"a multiple of {stages}, the parts of this training")
        if stages > 1:
            self._check_stages(self.epochs // stages)

    def _check_stages(self, epochs: int) -> None:
        """Check what a training in stages of so many epochs, in which other weights are trained, can do."""
        with_it = f"with --ensemble {self.ensemble}, whose experts are trained in turn"
        _check(self, "early_stopping", self.early_stopping is None, f"none {with_it}")
        _check(self, "attack_batchnorm", self.attack_batchnorm == "eval", f"eval {with_it}")
        _check(self, "checkpoint_activations", not self.checkpoint_activations, f"none {with_it}")
        warm = f"0 to {epochs}, the epochs of each part of the training"
        _check(self, "warmup_epochs", self.warmup_epochs <= epochs, warm)

    @property
    def worker_processes(self) -> Workers:
        """`workers` for what reads images."""
        return "auto" if isinstance(self.workers, str) else self.workers

    @property
    def inner_attack(self) -> InnerAttackSettings | None:
        """The attack in a training step, if there is one."""
        if self.adversarial == "off":
            return None
        return InnerAttackSettings(
            self.adversarial,
            self.eps,
            self.attack_alpha,
            self.attack_steps,
            self.attack_batchnorm,
            self.attack_gate,
            self.adversary,
        )

    @property
    def monitored(self) -> str | None:
        """By which number of the records the best epoch is chosen; None where none is."""
        if self.monitor is not None:
            return SHORT.get(self.monitor, self.monitor)
        if self.adversarial != "off" and self.check_images:
            return "val_pgd10_accuracy_mean"
        return None if self.early_stopping is None else "val_accuracy_mean"

    def options(self) -> list[str]:
        """The options of `immunity_fast.train` that mean these settings."""
        preset = PRESETS[self.preset]
        words = ["--preset", self.preset]
        necessary = set()
        if len(split_names(self.arch)) > 1:  # which without --experts are as many as they are
            necessary.add("experts")
        for choice, belonging in BELONGING.items():
            if getattr(self, choice) != getattr(preset, choice):
                necessary.update(belonging)
        for option in dataclasses.fields(self):
            value = getattr(self, option.name)
            if option.name in necessary and value is None:
                continue
            if option.name == "momentum" and KINDS[self.optimizer].momentum is None:
                continue
            needed = option.name in necessary
            if option.name == "preset" or (value == getattr(preset, option.name) and not needed):
                continue
            flag = option.name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            elif value is None:
                raise ValueError(f"--{flag}: no option takes away what the preset {self.preset} says")
            elif isinstance(value, tuple):
                words += [f"--{flag}", ",".join(map(str, value))]
            else:
                words += [f"--{flag}", str(value)]
        return words

    def to_json(self) -> dict[str, Any]:
        """All settings by name, as config.json holds them."""
        settings = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}

    def to_yaml(self, path: str | os.PathLike[str] | None = None) -> str:
        """All settings as YAML, which `from_yaml` and `--config` read; written to `path`, if there is one.

        Raises:
            ModuleNotFoundError: PyYAML is not installed.
        """
        settings, groups = self.to_json(), dict[str, dict[str, Any]]()
        for option in dataclasses.fields(self):
            groups.setdefault(option.metadata["group"], {})[option.name] = settings[option.name]
        text = config_file.to_yaml(groups)
        if path is not None:
            write_atomically(Path(path), text.encode())
        return text

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> "TrainConfig":
        """The settings of a file of YAML or JSON: those of the preset that it names, or of quickstart, and its own.

        Raises:
            FileNotFoundError, OSError: it cannot be read.
            ValueError: it is no mapping of settings, or one of them is unknown, of the wrong type or out of range.
            ModuleNotFoundError: it is YAML, and PyYAML is not installed.
        """
        return from_preset({}, read_settings(Path(path)))

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "TrainConfig":
        """The inverse of `to_json`.

        Raises:
            ValueError: a setting is missing, unknown or of the wrong type.
        """
        expected = _hints()
        if not isinstance(values, dict):
            raise ValueError(f"expected an object of settings, got {abbreviated(values)}")
        for name, only in REMOVED.items():
            if values.get(name, only) != only:
                raise ValueError(f"setting {name}: expected {only}, the only one left, got {abbreviated(values[name])}")
        values = ADDED | {name: value for name, value in values.items() if name not in REMOVED}
        if values.keys() != expected.keys():
            different = ", ".join(sorted(values.keys() ^ expected.keys()))
            raise ValueError(f"settings missing or unknown: {abbreviated(different)}")
        for name, value in values.items():
            _check_type(f"setting {name}", value, _plain_types(expected[name]))
        return cls(**values)


def read_settings(path: Path, *more: str) -> dict[str, Any]:
    """The settings that a file of YAML or JSON, or a run's folder, has; by name, each in the type of its own.

    A whole config.json of an earlier version stands for what it stood for then.

    Args:
        path: of the file.
        more: names besides, whose values are given as they are read.

    Raises:
        FileNotFoundError, OSError: it cannot be read.
        ValueError: it is no mapping of settings, or one of them is unknown or of the wrong type; by file and name.
        ModuleNotFoundError: it is YAML, and PyYAML is not installed.
    """
    values = config_file.read_mapping(path)
    hints = _hints()
    for name, only in REMOVED.items():
        if values.pop(name, only) != only:
            raise ValueError(f"{path}: {name}: expected {only}, the only one left, got another")
    for name in values:
        if name not in hints and name not in more:
            near = config_file.suggestion(name, list(hints))
            raise ValueError(f"{path}: {name}: expected the name of a setting, got one that there is not{near}")
    if hints.keys() - ADDED.keys() <= values.keys():
        values = ADDED | values
    for option in dataclasses.fields(TrainConfig):
        if option.name in values:
            kinds = _plain_types(hints[option.name])
            value = config_file.converted(values[option.name], kinds, _choices(option))
            _check_type(f"{path}: {option.name}", value, kinds)
            values[option.name] = value
    return values


def _check_type(name: str, value: Any, kinds: tuple[type, ...]) -> None:
    """Check that a value that was read is of one of these kinds.

    Raises:
        ValueError: it is not; by name.
    """
    # To Python true is a number, to a reader of the file it is not.
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        words = {type(None): "null", tuple: "numbers"}
        expected = " or ".join(dict.fromkeys(words.get(kind, kind.__name__) for kind in kinds if kind is not list))
        raise ValueError(f"{name}: expected {expected}, got {abbreviated(value)}")


def add_options(parser: argparse.ArgumentParser) -> None:
    """One option a setting, none with a default of the parser's: the namespace then holds what the user gave."""
    hints = _hints()
    options = dataclasses.fields(TrainConfig)
    groups = {
        name: parser.add_argument_group(name) for name in dict.fromkeys(each.metadata["group"] for each in options)
    }
    for option in options:
        default = getattr(PRESETS["quickstart"], option.name)
        text = option.metadata["help"] + ("" if default is None else f" [{default}]")
        keywords: dict[str, Any] = {"dest": option.name, "default": argparse.SUPPRESS, "help": text}
        if hints[option.name] is bool:
            keywords["action"] = argparse.BooleanOptionalAction
        elif option.name == "preset":
            keywords["choices"] = tuple(PRESETS)
        elif choices := _choices(option):
            keywords["choices"] = choices
        elif tuple in _plain_types(hints[option.name]):
            keywords["type"] = numbers
            keywords["metavar"] = "NUMBER,…"
        else:
            kind = next(kind for kind in (float, int, str) if kind in _plain_types(hints[option.name]))
            keywords["type"] = cli.number if kind is float else kind
            keywords["metavar"] = kind.__name__.upper()
            if hints[option.name] == int | str:
                keywords["type"] = cli.whole_or_word
        groups[option.metadata["group"]].add_argument(f"--{option.name.replace('_', '-')}", **keywords)


def numbers(text: str) -> tuple[float, ...]:
    """Numbers of a command line, with commas between, for argparse.

    Raises:
        ValueError: something between the commas is no number.
    """
    return tuple(cli.number(part) for part in text.split(","))


def from_preset(changes: Mapping[str, Any], file: Mapping[str, Any] = MappingProxyType({})) -> TrainConfig:
    """The settings of a preset, those of a file in their place, and the changes in the place of both.

    The preset is the one that the changes name, or the file, or quickstart. Of several architectures there are as many
    experts, and another optimiser or schedule has its own defaults, unless the same changes, or the same file, say
    otherwise.

    Args:
        changes: settings by name, as a command line gives them.
        file: settings by name, as of `read_settings`.

    Raises:
        ValueError: a value out of its range.
    """
    name = changes.get("preset", file.get("preset", "quickstart"))
    if name not in PRESETS:
        raise ValueError(f"--preset: expected one of {', '.join(PRESETS)}, got {abbreviated(name)}")
    values: dict[str, Any] = dict(vars(PRESETS[name]))
    for layer in (file, changes):
        values = values | {**_following(values, layer), **layer}
    momentum = changes.get("momentum")
    if values["optimizer"] in KINDS and momentum:  # which a whole run's settings have as 0 where there is none
        try:
            check_has(values["optimizer"], momentum=momentum)
        except ValueError as error:
            raise ValueError(f"--{error}") from error
    return TrainConfig(**values)


def _following(values: Mapping[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    """What settings become where others are changed: of a mixture's size, of an optimiser, of a schedule."""
    found: dict[str, Any] = {}
    if "arch" in layer and (names := len(split_names(layer["arch"]))) > 1:
        found["experts"] = names
    for choice, belonging in BELONGING.items():
        if layer.get(choice, values.get(choice)) != values.get(choice):
            found |= dict.fromkeys(belonging)
    return found


def resolve_architecture(options: dict[str, Any]) -> None:
    """Put in the place of a genotype file's name what it says.

    Args:
        options: settings by name, which are changed.

    Raises:
        ValueError: there is no such architecture, or the genotype is wrong.
    """
    if "arch" in options:
        name = options["arch"]
        try:
            options["arch"] = resolve(name)
        except ValueError as error:  # which begins with a name of its own
            said = str(error).removeprefix("name: ").removeprefix(f"{os.path.expanduser(name)}: ")
            raise ValueError(f"--arch {name}: {said}") from error


def check_data(dataset: str | None, data: str | None) -> None:
    """Check that a data set that lies somewhere has a path.

    Args:
        dataset: its name; None is one that needs none.
        data: its path, if there is one.

    Raises:
        ValueError: the path is missing.
    """
    if dataset == OWN:
        raise ValueError(
            "--dataset own: expected the data that this run was begun with, which only Python code has: "
            "Trainer.from_run(…, train=…)"
        )
    if (dataset == "npz" or dataset in LISTED) and data is None:
        raise ValueError(f"--data: missing; --dataset {dataset} needs the path of what it reads")


@functools.cache
def _hints() -> dict[str, Any]:
    """The annotation of each setting; kept, because `typing` evaluates all of them anew at each call."""
    return typing.get_type_hints(TrainConfig)


def _choices(option: "dataclasses.Field[Any]") -> tuple[str, ...]:
    hint = _hints()[option.name]
    listed: tuple[str, ...] = option.metadata["choices"]
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else listed


def _plain_types(hint: Any) -> tuple[type, ...]:
    """What a value of this annotation may be in JSON."""
    if typing.get_origin(hint) is Literal:
        return (str,)
    if isinstance(hint, types.UnionType):
        return tuple(kind for part in typing.get_args(hint) for kind in _plain_types(part))
    if typing.get_origin(hint) is tuple:
        return (list, tuple)
    return (int, float) if hint is float else (hint,)


@functools.cache
def _types() -> dict[str, tuple[type, ...]]:
    """What each setting may be."""
    return {name: _plain_types(hint) for name, hint in _hints().items()}


def _measures(config: TrainConfig, name: str | None) -> bool:
    """Whether an epoch's record of these settings will have such an entry."""
    if name is None or not name.startswith("val_") or name.startswith("val_accuracy"):
        return True
    if "fgsm" in name and config.adversarial == "off":
        return False
    return config.check_images > 0 and ("pgd" in name or "fgsm" in name or config.experts > 1)


def _are_numbers(values: Any) -> bool:
    """Whether this is a tuple of numbers."""
    return isinstance(values, tuple) and all(type(value) in (int, float) for value in values)


def _check(config: TrainConfig, name: str, fits: bool, expected: str) -> None:
    if not fits:
        raise ValueError(f"--{name.replace('_', '-')}: expected {expected}, got {abbreviated(getattr(config, name))}")


PRESETS: dict[str, TrainConfig] = {
    # Minutes on two CPU cores, on data that scikit-learn ships.
    "quickstart": TrainConfig(check_images=100, attack_images=200),
    # The paper's recipe as far as it is published; 200 epochs want a GPU.
    "paper": TrainConfig(preset="paper", dataset="cifar10", arch="googlenet", epochs=200, batch_size=32, lr=0.01),
    # CIFAR-10 in a sitting on one GPU: larger batches, fewer epochs, a smaller network.
    "fast": TrainConfig(preset="fast", dataset="cifar10", arch="resnet18", epochs=30, batch_size=128, lr=0.05),
}
