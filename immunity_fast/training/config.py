"""A training run's settings: one frozen dataclass, its presets, its JSON and its command-line options."""

import argparse
import dataclasses
import math
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from immunity_fast.arguments import Score
from immunity_fast.data.datasets import NAMES as DATASETS
from immunity_fast.data.own import NAME as OWN
from immunity_fast.experts import NAMES as ARCHITECTURES
from immunity_fast.experts import resolve, split_names
from immunity_fast.experts.registry import FORMS, check_form
from immunity_fast.experts.stems import StemChoice
from immunity_fast.experts.symmetry import PERTURBATION
from immunity_fast.losses import ALPHA, BETA, GAMMA, FusedImmunityLoss
from immunity_fast.models.gate import Switch
from immunity_fast.runtime import cli
from immunity_fast.runtime.compilation import Compile
from immunity_fast.runtime.files import abbreviated
from immunity_fast.runtime.precision import Amp, Float32
from immunity_fast.runtime.strategies import Batching, DoubleBackprop
from immunity_fast.training.adversarial import Adversarial, BatchNormMode, InnerAttackSettings
from immunity_fast.training.loggers import LOGGERS, names_of
from immunity_fast.training.monitoring import DIRECTIONS, SHORT

Flip = Literal["auto", "on", "off"]


# Settings that are gone, and the value with which they change nothing: runs from before have them in config.json.
REMOVED = {"weight_scale": "channels"}
# Settings that runs from before do not have in config.json, and what these were trained with.
ADDED = {"stem": "cifar", "weights": None, "perturbation": PERTURBATION}
ADDED |= {"early_stopping": None, "monitor": None, "loggers": "tensorboard"}


def _option(group: str, default: Any, text: str, choices: tuple[str, ...] = ()) -> Any:
    """A setting: under which heading of --help it stands, its default, what it does, its values if they are listed."""
    return field(default=default, metadata={"group": group, "help": text, "choices": choices})


_data = partial(_option, "preset and data")
_model = partial(_option, "model")
_loss = partial(_option, "loss")
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
    data: str | None = _data(None, "file (npz), folder of images (folder), or download folder (cifar10, cifar100)")
    image_size: int | None = _data(None, "for --dataset folder: scale and crop images to this many pixels a side")
    limit_train: int | None = _data(None, "use so many training images")
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
    alpha: float = _loss(ALPHA, "weight of each expert's own cross-entropy")
    beta: float = _loss(BETA, "weight of the mutual-information loss")
    gamma: float = _loss(GAMMA, "weight of the position-stability loss (in pixels⁴, so it depends on the image size)")
    smoothing: float = _loss(0.01, "smoothing of the heatmaps' distributions")
    score: Score = _loss("logit", "what Grad-CAM differentiates")
    detach_weights: bool = _loss(False, "treat Grad-CAM's weights as constants: cheaper, approximate gradient")
    adversarial: Adversarial = _attack("off", "train on attacked images")
    eps: float = _attack(8 / 255, "Linf radius of the training's and the epoch's attacks")
    attack_alpha: float = _attack(2 / 255, "step of the training's attack; fgsm-rs takes 1.25 eps")
    attack_steps: int = _attack(10, "steps of the training's attack; fgsm-rs takes 1")
    attack_batchnorm: BatchNormMode = _attack("eval", "BatchNorm in the training's attack: running or batch statistics")
    attack_gate: Switch = _attack("off", "gate in the training's attack; off: the trained weights")
    trades_weight: float = _attack(6.0, "lambda of TRADES")
    ema: float | None = _optimiser(None, "evaluate an average of the weights with this decay; default: the weights")
    epochs: int = _optimiser(12, "passes over the training images")
    batch_size: int = _optimiser(32, "images a step")
    lr: float = _optimiser(0.05, "learning rate at the start of its cosine")
    momentum: float = _optimiser(0.9, "Nesterov momentum of SGD")
    weight_decay: float = _optimiser(5e-4, "weight decay of SGD")
    clip_grad_norm: float | None = _optimiser(None, "clip the gradient's norm to this; default: no clipping")
    seed: int = _optimiser(0, "seed of weights, batches, augmentation and gate")
    crop_padding: int = _images(4, "random crops move by up to so many pixels")
    rotation: float = _images(15.0, "random rotations turn by up to so many degrees")
    flip: Flip = _images("auto", "mirror half of the images; auto: where the data set is known to allow it")
    device: str = _speed("auto", "cpu, cuda, cuda:1, …; auto: CUDA if there is any")
    compile: Compile = _speed("auto", "compile the step; max: try kernels out, takes long; auto: on, on a GPU")
    batching: Batching = _speed("auto", "how the experts run at once; auto: what was measured to be faster")
    double_backprop: DoubleBackprop = _speed("auto", "how to differentiate Grad-CAM, both exact; auto: likewise")
    amp: Amp = _speed("off", "half precision for convolutions and products")
    float32: Float32 = _speed("tf32", "factors of a GPU's float32 convolutions and products in training")
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
        for name in ("epochs", "batch_size", "checkpoint_every", "attack_images"):
            _check(self, name, getattr(self, name) >= 1, "at least 1")
        try:
            check_form(ARCHITECTURES[0] if self.arch == OWN else self.arch)
        except ValueError as error:
            raise ValueError(f"--arch: {str(error).removeprefix('name: ')}") from error
        names = len(split_names(self.arch))
        several = f", as many as --arch names, {', '.join(split_names(self.arch))}" if names > 1 else ""
        _check(self, "experts", self.experts >= names, f"at least {names}{several}")
        _check(self, "perturbation", 0 <= self.perturbation < math.inf, "a finite number of at least 0")
        _check(self, "limit_train", self.limit_train is None or self.limit_train >= 1, "at least 1")
        for name in ("alpha", "beta", "gamma", "smoothing", "weight_decay"):
            _check(self, name, 0 <= getattr(self, name) < math.inf, "a finite number of at least 0")
        for name in ("eps", "attack_alpha"):
            _check(self, name, 0 <= getattr(self, name) <= 1, "0 to 1, in units of the images' range")
        _check(self, "attack_steps", self.attack_steps >= 1, "at least 1")
        _check(self, "trades_weight", 0 <= self.trades_weight < math.inf, "a finite number of at least 0")
        _check(self, "ema", self.ema is None or 0 <= self.ema < 1, "at least 0 and below 1")
        _check(self, "lr", 0 < self.lr < math.inf, "a finite number above 0")
        _check(self, "momentum", 0 < self.momentum < 1, "a number between 0 and 1")
        _check(self, "clip_grad_norm", self.clip_grad_norm is None or self.clip_grad_norm > 0, "a number above 0")
        for name in ("crop_padding", "check_images"):
            _check(self, name, getattr(self, name) >= 0, "at least 0")
        _check(self, "early_stopping", self.early_stopping is None or self.early_stopping >= 1, "at least 1 epoch")
        _check(self, "monitor", self.monitored in (None, *DIRECTIONS), f"one of {', '.join(DIRECTIONS)}")
        _check(self, "monitor", _measures(self, self.monitored), "what is measured with these settings")
        names_of(self.loggers)
        _check(self, "seed", self.seed >= 0, "0 to 2⁶³ − 1")
        _check(self, "image_size", self.image_size is None or self.image_size >= 1, "at least 1 pixel")
        _check(self, "rotation", 0 <= self.rotation <= 180, "0 to 180 degrees")
        for option in dataclasses.fields(self):
            choices = _choices(option)
            value = getattr(self, option.name)
            if isinstance(value, int):  # more is no 64-bit integer, which tensors and generators take
                _check(self, option.name, value < 2**63, "0 to 2⁶³ − 1" if option.name == "seed" else "less than 2⁶³")
            own = option.name == "dataset" and value == OWN  # which only code can give
            _check(self, option.name, not choices or value in choices or own, f"one of {', '.join(choices)}")

    def loss_fn(self, image_size: tuple[int, int], group_name: str = "") -> FusedImmunityLoss:
        """The loss of these settings, with heatmaps of the images' size (H, W), for a process group or this process."""
        return FusedImmunityLoss(
            self.alpha,
            self.beta,
            self.gamma,
            size=image_size,
            smoothing=self.smoothing,
            score=self.score,
            detach_weights=self.detach_weights,
            group_name=group_name,
        )

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
        several = len(split_names(self.arch)) > 1  # which without --experts are as many as they are
        for option in dataclasses.fields(self):
            value = getattr(self, option.name)
            needed = option.name == "experts" and several
            if option.name == "preset" or (value == getattr(preset, option.name) and not needed):
                continue
            flag = option.name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            elif value is None:
                raise ValueError(f"--{flag}: no option takes away what the preset {self.preset} says")
            else:
                words += [f"--{flag}", str(value)]
        return words

    def to_json(self) -> dict[str, Any]:
        """All settings by name, as config.json holds them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "TrainConfig":
        """The inverse of `to_json`.

        Raises:
            ValueError: a setting is missing, unknown or of the wrong type.
        """
        expected = typing.get_type_hints(cls)
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
            kinds = _plain_types(expected[name])
            # To Python true is a number, to a reader of the file it is not.
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                expected_kinds = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
                raise ValueError(f"setting {name}: expected {expected_kinds}, got {abbreviated(value)}")
        return cls(**values)


def add_options(parser: argparse.ArgumentParser) -> None:
    """One option a setting, none with a default of the parser's: the namespace then holds what the user gave."""
    hints = typing.get_type_hints(TrainConfig)
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
        else:
            kind = next(kind for kind in (float, int, str) if kind in _plain_types(hints[option.name]))
            keywords["type"] = cli.number if kind is float else kind
            keywords["metavar"] = kind.__name__.upper()
        groups[option.metadata["group"]].add_argument(f"--{option.name.replace('_', '-')}", **keywords)


def from_preset(changes: Mapping[str, Any]) -> TrainConfig:
    """The settings of the preset that is named among some settings, or of quickstart, and these in their place.

    Of several architectures there are as many experts, unless their number is one of the settings.

    Raises:
        ValueError: a value out of its range.
    """
    if "arch" in changes and "experts" not in changes and (names := len(split_names(changes["arch"]))) > 1:
        changes = {**changes, "experts": names}
    return dataclasses.replace(PRESETS[changes.get("preset", "quickstart")], **changes)


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
    if dataset in ("npz", "folder") and data is None:
        raise ValueError(f"--data: missing; --dataset {dataset} needs the path of what it reads")


def _choices(option: "dataclasses.Field[Any]") -> tuple[str, ...]:
    hint = typing.get_type_hints(TrainConfig)[option.name]
    listed: tuple[str, ...] = option.metadata["choices"]
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else listed


def _plain_types(hint: Any) -> tuple[type, ...]:
    """What a value of this annotation may be in JSON."""
    if typing.get_origin(hint) is Literal:
        return (str,)
    if isinstance(hint, types.UnionType):
        return tuple(kind for part in typing.get_args(hint) for kind in _plain_types(part))
    return (int, float) if hint is float else (hint,)


def _measures(config: TrainConfig, name: str | None) -> bool:
    """Whether an epoch's record of these settings will have such an entry."""
    if name is None or not name.startswith("val_") or name.startswith("val_accuracy"):
        return True
    if "fgsm" in name and config.adversarial == "off":
        return False
    return config.check_images > 0 and ("pgd" in name or "fgsm" in name or config.experts > 1)


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
