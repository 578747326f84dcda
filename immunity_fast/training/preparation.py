"""Before a training's first step: where the run is to lie, whether it can go on, and what cannot be trained."""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch

from immunity_fast.data import OWN
from immunity_fast.data.datasets import LISTED, ImageDataset, Split, load
from immunity_fast.experts import create, title
from immunity_fast.experts.registry import check_trusted, counted, file_title, is_ours, split_names
from immunity_fast.experts.stems import Stem, chosen_stem
from immunity_fast.models.described import outline
from immunity_fast.models.moe import ImmunityMoE
from immunity_fast.runtime import cli, distributed
from immunity_fast.runtime.compilation import Log, keep_caches
from immunity_fast.runtime.failures import out_of_memory
from immunity_fast.runtime.files import write_atomically
from immunity_fast.runtime.memory import check_fits
from immunity_fast.runtime.outputs import kind_of, logits_of
from immunity_fast.runtime.precision import set_float32
from immunity_fast.training.auto_batch import is_begun_with
from immunity_fast.training.checkpoint import not_finite
from immunity_fast.training.config import TrainConfig, check_data
from immunity_fast.training.optimizers import KINDS, NUMBERS
from immunity_fast.training.run_folder import Run
from immunity_fast.training.state import TrainingState

# Settings that may differ when a run goes on: where, and by which of several exact ways.
CHANGEABLE_ON_RESUME = (
    *("data", "stream", "workers", "device", "compile", "batching", "double_backprop", "profile"),
    *("checkpoint_activations", "loggers"),
)
# Those that may differ as well once the loss has diverged: without it, no run could ever go on from there.
CHANGEABLE_AFTER_DIVERGENCE = ("lr", "clip_grad_norm")
MEMORY_ADVICE = (
    "a smaller --batch-size, --auto-batch, --checkpoint-activations, fewer --experts, a smaller --arch, smaller "
    "images, --stream on or fewer --workers"
)


class Start(NamedTuple):
    """A training that is to start: in which folder, whether the run in it goes on or is new, with which settings."""

    folder: Path
    resume: bool
    config: TrainConfig


class Preview(Start):
    """A training whose settings are only to be shown."""


def begin(config: TrainConfig, out: Path | None = None) -> Start:
    """Settle with what settings and in which folder a new run starts; nothing is written.

    Args:
        config: its settings.
        out: its folder; None is one that is named after the settings and the time, in runs/. With the run of a process
            that torchrun has started again, it goes on.

    Raises:
        ValueError: settings that do not go together.
        FileExistsError: the name is taken.
    """
    if config.dataset == "digits" and config.flip == "on":
        raise ValueError("--flip on: a mirrored digit is another sign; leave it out for --dataset digits")
    if out is None:
        out = Run.free_name(Path("runs") / f"{default_name(config)}{datetime.now():%Y%m%d-%H%M%S}")
    elif restarted() and Run(out).config_file.is_file() and is_begun_with(Run(out).config(), config):
        return Start(out, True, Run(out).config())
    else:
        Run.check_free(out)
    return Start(out, False, config)


def restarted() -> bool:
    """Whether torchrun has started these processes again, with the words of the first time, after one had failed."""
    return (os.environ.get("TORCHELASTIC_RESTART_COUNT") or "0") != "0"


def go_on(folder: Path, changes: Mapping[str, Any], *, trust_code: bool = False) -> Start:
    """Settle with what settings a run that was begun before goes on; nothing is written.

    Args:
        folder: the run's.
        changes: settings by name; of those that a run depends on only the values with which it was begun.
        trust_code: import what its architecture `module.path:callable` names, which runs that module's code.

    Raises:
        ValueError: a setting that would make another run of it, or code that is not trusted.
        FileNotFoundError: there is no run in the folder.
    """
    run = Run.open(folder)
    config = run.config()
    check_trusted(run.config_file, config.arch, trust_code)
    check_changes(run, config, changes)
    return Start(folder, True, dataclasses.replace(config, **changes))


def check_changes(run: Run, config: TrainConfig, changes: Mapping[str, Any], *, option: bool = True) -> None:
    """Check that a run can go on with some settings.

    Args:
        run: the run.
        config: with what it was begun.
        changes: settings by name.
        option: whether they are options of a command line.

    Raises:
        ValueError: a setting that would make another run of it.
    """
    changeable = CHANGEABLE_ON_RESUME + (CHANGEABLE_AFTER_DIVERGENCE if run.diverged.is_file() else ())
    for name, value in changes.items():
        if name not in changeable and value != getattr(config, name):
            called, sign = (f"--{name.replace('_', '-')}", " ") if option else (name, "=")
            begun = getattr(config, name)
            raise ValueError(f"{called}{sign}{value}: the run in {run.folder} was begun with {called}{sign}{begun}")


def prepare(
    folder: Path | None,
    resume: bool,
    config: TrainConfig,
    *,
    dataset: ImageDataset | None = None,
    model: ImmunityMoE | None = None,
    log: Log | None = cli.console.print,
) -> tuple[TrainingState, Run | None]:
    """Everything that can go wrong with what the user gave, before the first step: data, device, network, checkpoint.

    Args:
        folder: of the run; None is a training that is not saved.
        resume, config: see `Start`.
        dataset: what is trained on; None is what the settings name.
        model: what is trained; None is a new one of what the settings name.
        log: what takes lines on code that could not be compiled; None is `warnings.warn`.

    Returns:
        The training in memory, where the run stands, and the run, whose folder is there then; of a new run it may have
        got another name, where nobody had chosen it.

    Raises:
        ValueError, OSError, ModuleNotFoundError: one clear line.
    """
    keep_caches()  # before anything imports the compiler, as torchvision does
    device = cli.pick_device(config.device)
    if dataset is None:
        check_data(config.dataset, config.data)
        if config.dataset in LISTED and config.image_size is not None:  # before all images are made so large
            check_trainable(config, (config.image_size, config.image_size), 2, 2, device)
        # A data set that is missing is downloaded once, and once more on each machine that does not see that.
        with distributed.together(), distributed.first_of_all():
            dataset = load_data(config, device)
    if dataset.channels != config.channels:  # of a data set of the user's, which is as it is
        config = dataclasses.replace(config, channels=dataset.channels)
    if model is None:
        check_own(config)
        with distributed.together():  # one machine may have less memory than another
            check_trainable(config, dataset.image_size, dataset.num_classes, len(dataset.train), device)
    elif isinstance(dataset.train, Split):  # of a loader's own batches nothing is cropped
        check_crops(config, dataset.image_size)
    set_float32(config.float32)
    run = None if folder is None else Run(folder)
    # A run that was killed before its first checkpoint begins anew.
    last = None if run is None or not resume else distributed.of_first(run.last_checkpoint)
    fresh = last is None
    tracebacks = None if run is None else run.tracebacks
    state = TrainingState(config, dataset, device, log, tracebacks, fresh=fresh, model=model)
    if folder is None or run is None:
        return state, None
    first = distributed.rank() == 0  # which alone has to see the run's folder
    if not resume:
        with distributed.together():
            if first:
                run = Run.create(folder, config, numbered=is_default(folder, config))
        return state, Run(distributed.of_first(run.folder))
    with distributed.together():
        if first:
            Run.open(folder)
    if last is not None:
        state.load(last)
        state.saved_step = state.step
        wrong = distributed.first_of_any(not_finite(state.tensors()))
        if wrong is not None:  # momentum and averages too: from these the next step would make the same of the weights
            raise ValueError(
                f"{last}: holds weights that are NaN or infinite, from which nothing can go on "
                f"({wrong}); begin a new run, with a smaller --lr"
            )
    with distributed.together():
        if first:
            run.check_goes_on(state.epoch)
            state.history = run.metrics()[: state.epoch]
            save_changed_settings(run, config)
    state.history = distributed.of_first(state.history)
    return state, run


def check_own(config: TrainConfig) -> None:
    """Check that settings name a network and data that can be made of their names.

    Raises:
        ValueError: they are the user's own, which only Python code has.
    """
    if config.arch == OWN:
        raise ValueError(
            "model: expected the model of your own that this run was begun with, got none: Trainer.from_run(…, model=…)"
        )


def load_data(config: TrainConfig, device: torch.device, data: str | None = None) -> ImageDataset:
    """The data set of some settings, on the CPU, or streamed; where it was a choice, a line says which.

    Args:
        config: the settings.
        device: where it will be used.
        data: where it lies now; None is where the settings say.

    Raises:
        ValueError, OSError, ModuleNotFoundError: see `datasets.load`; a setting that is wrong is called as its option.
    """
    names = ("limit_train", "image_size", "channels", "ignore_index", "stream")
    options: dict[str, Any] = {name: getattr(config, name) for name in names}
    options["workers"] = config.worker_processes
    try:
        dataset = load(config.dataset, data or config.data, device=device, **options)
    except ValueError as error:
        name, _, rest = str(error).partition(": ")
        if name not in options:
            raise
        raise ValueError(f"--{name.replace('_', '-')}: {rest}") from error
    for note in dataset.notes if distributed.rank() == 0 else ():
        cli.console.print(note)
    return dataset


def save_changed_settings(run: Run, config: TrainConfig) -> None:
    """Write down with what a run goes on that has diverged, if that is not what it began with."""
    begun = run.config()
    changed = {
        name: getattr(config, name)
        for name in CHANGEABLE_AFTER_DIVERGENCE
        if getattr(config, name) != getattr(begun, name)
    }
    if changed:
        now = dataclasses.replace(begun, **changed)
        write_atomically(run.config_file, json.dumps(now.to_json(), indent=2).encode())
        run.diverged.unlink(missing_ok=True)


def check_trainable(
    config: TrainConfig, image_size: tuple[int, int], num_classes: int, images: int, device: torch.device
) -> None:
    """Check that so many images of (H, W) pixels suit the settings; next to nothing is computed.

    Raises:
        ValueError: they are too small for the architecture or for its random crops, or a step cannot fit into the
            device's memory.
    """
    batch = min(config.batch_size, images)
    height, width = image_size
    check_crops(config, image_size)
    names = counted(split_names(config.arch), config.experts)
    if len(names) > 1 and config.batching == "vmap":
        raise ValueError("--batching vmap: expected auto or loop for experts of different architectures")
    weights = values = 0
    for name, count in names.items():
        # Of ours the same every time: a table's thirty runs find it out once.
        find = _known_sizes if is_ours(name) else sizes
        of_one = find(name, chosen_stem(config.stem, image_size), config.channels, image_size, num_classes, batch)
        weights, values = weights + count * of_one[0], values + count * of_one[1]
    if config.checkpoint_activations:
        values = 0
    elif config.auto_batch:  # which ends at one image
        batch, values = 1, values // batch
    # Weights, their gradients and what the optimiser keeps of them, in float32; and half of what the layers put out,
    # which is kept for the backward pass, in half precision at least.
    kept = len([name for name in KINDS[config.optimizer].state if name not in NUMBERS])
    size = 4 * (2 + kept) * weights / (distributed.count() if config.shard else 1) + values / distributed.count()
    what = f"{title(config.arch, config.experts)}, {batch} images of {height}×{width} a step,"
    check_fits(size, device, what, MEMORY_ADVICE)


def check_crops(config: TrainConfig, image_size: tuple[int, int]) -> None:
    """Check that random crops leave something of images of (H, W) pixels.

    Raises:
        ValueError: they may not.
    """
    height, width = image_size
    if config.crop_padding >= min(height, width):
        raise ValueError(
            f"--crop-padding: expected less than {min(height, width)} for images of {height}×{width}, of which else "
            f"nothing may be left, got {config.crop_padding}"
        )


def sizes(
    name: str, stem: Stem, channels: int, image_size: tuple[int, int], num_classes: int, batch: int
) -> tuple[int, int]:
    """How many weights one expert has, and how many values its layers put out for a batch in training.

    Args:
        name: of its architecture.
        stem: of an architecture that has several.
        channels: of the images.
        image_size: (H, W).
        num_classes: K.
        batch: of so many images.

    Raises:
        ValueError: it cannot be trained on them.
    """
    height, width = image_size
    values = 0

    def count(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
        nonlocal values
        values += output.numel() if isinstance(output, torch.Tensor) else 0

    try:
        expert = outline(name, num_classes, image_size, stem, channels).train()
        for module in expert.modules():
            if not list(module.children()):
                module.register_forward_hook(count)
        try:
            output = expert(torch.empty(batch, channels, height, width, device="meta"))
        except Exception:  # whatever its code makes of tensors without values
            if is_ours(name):
                raise
            # Two images, for BatchNorm's sake, stand for the others.
            values = 0
            expert = create(name, num_classes, stem=stem, image_size=image_size, channels=channels).train()
            for module in expert.modules():
                if not list(module.children()):
                    module.register_forward_hook(count)
            with torch.no_grad():
                output = expert(torch.zeros(min(batch, 2), channels, height, width))
            values = values * batch // min(batch, 2)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # whatever a network may raise
        if out_of_memory(error) is not None:
            raise
        reason = " ".join(str(error).split())
        depth = "" if channels == 3 else f"{channels} × "
        raise ValueError(
            f"--arch {title(name)}: cannot be trained on images of {depth}{height}×{width}, {batch} at a time "
            f"({reason})"
        ) from error
    logits = logits_of(output)
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2 or logits.shape[1] != num_classes:
        raise ValueError(
            f"--arch {title(name)}: expected logits (B, {num_classes}), as many as there are classes, got "
            f"{kind_of(output)}"
        )
    return sum(parameter.numel() for parameter in expert.parameters()), values


_known_sizes = functools.lru_cache(maxsize=64)(sizes)


def is_default(folder: Path, config: TrainConfig) -> bool:
    """Whether nobody chose this name, so that another one will do if a run of the same second has taken it."""
    return folder.parent == Path("runs") and bool(
        re.fullmatch(rf"{re.escape(default_name(config))}\d{{8}}-\d{{6}}(-\d+)?", folder.name)
    )


def default_name(config: TrainConfig) -> str:
    """What a run's name begins with where the user gave none; the time follows."""
    return f"{config.dataset}-{file_title(config.arch)}-"
