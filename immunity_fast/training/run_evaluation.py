"""An evaluation from the names that a command gives: of a run's folder, or of a network that Python can import."""

import copy
import dataclasses
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch

from immunity_fast.attacks import Model
from immunity_fast.data import OWN
from immunity_fast.data.datasets import LISTED, ImageDataset, Stream, load
from immunity_fast.data.poisoning import Poison, words
from immunity_fast.data.sampling import EVALUATION_BATCH, attack_batch
from immunity_fast.data.streaming import Workers
from immunity_fast.evaluation.pipeline import evaluate
from immunity_fast.evaluation.plan import SETS, Plan
from immunity_fast.evaluation.report import About, Outputs
from immunity_fast.evaluation.results import Results
from immunity_fast.evaluation.selection_target import mixture_target
from immunity_fast.evaluation.settings import EvaluationSettings, check_whole
from immunity_fast.evaluation.targets import MixtureTarget, NetworkTarget, load_callable
from immunity_fast.experts import title
from immunity_fast.models.moe import ExactMean, ImmunityMoE
from immunity_fast.models.noise import MeanOfPasses
from immunity_fast.runtime import cli
from immunity_fast.runtime.compilation import Compile, Compiled, at_size, keep_caches
from immunity_fast.runtime.modes import frozen
from immunity_fast.training.checkpoint import (
    check_classes,
    load_checkpoint,
    load_info,
    load_model,
    load_module,
    model_file,
    not_finite,
    same_weights,
    under,
)
from immunity_fast.training.config import TrainConfig, check_data
from immunity_fast.training.poison import poison_of_run
from immunity_fast.training.preparation import load_data
from immunity_fast.training.run_folder import Run
from immunity_fast.training.state import TrainingState

DRAWS = 20  # of a gate, for EOT
IMAGES = 1000  # that are attacked of a network that has no run, and so no setting of one
MEMORY_ADVICE = "--stream on, fewer --workers, another --device, fewer --draws, or smaller networks"
WhichCheckpoint = Literal["best", "last"]

# What a training run ends with: minutes on a CPU. The command finds out more.
AFTER_TRAINING = Plan(
    attacks=SETS["quick"],
    attackers=("sample", "mean"),
    masking_images=32,
    curve_eps=(0.25, 1, 4, 32),
    curve_steps=(1, 5, 20),
    curve_draws=(),
)


@cli.enough_memory(MEMORY_ADVICE)
def evaluate_named(
    place: str,
    settings: EvaluationSettings,
    device: torch.device,
    *,
    dataset: str | None = None,
    data: str | None = None,
    image_size: int | None = None,
    channels: int | None = None,
    stream: Stream | None = None,
    workers: Workers | None = None,
    transfer_from: Path | None = None,
    checkpoint: WhichCheckpoint | None = None,
    out: Path | None = None,
    again: bool = False,
    compile: Compile = "auto",
    trust_code: bool = False,
) -> None:
    """Evaluate what a command line names.

    Args:
        place: a run's folder, or a network as module.path:callable.
        settings: what is to be found out.
        device: where.
        dataset, image_size, channels: of a network; a run has its own.
        data: where the data set lies; None is where the run has it, or the data set's default.
        stream, workers: see `datasets.load`; None is as a run was trained, or "auto".
        transfer_from, out, again: see `evaluate_folder`.
        checkpoint, compile: of a run; see `evaluate_folder`.
        trust_code: of a run and of `transfer_from`; see `evaluate_folder`.

    Raises:
        ValueError, OSError, ModuleNotFoundError: what was given is wrong; one clear line.
    """
    check_whole("image_size", image_size, 1)
    check_whole("channels", channels, 1)
    if names_callable(place):
        for name, value in (("dataset", dataset), ("out", out)):
            if value is None:
                raise ValueError(f"--{name}: missing; {place} is no folder that is here, and a network needs it")
        assert dataset is not None
        assert out is not None
        check_data(dataset, data)
        images = load(
            dataset,
            data,
            image_size=image_size,
            channels=3 if channels is None else channels,
            stream=stream or "auto",
            workers="auto" if workers is None else workers,
            device=device,
        )
        for note in images.notes:
            cli.console.print(note)
        images = images.to(device)
        evaluate_callable(
            place, images, settings, device, out, transfer_from=transfer_from, again=again, trust_code=trust_code
        )
        return
    for name, given in (("dataset", dataset), ("image_size", image_size), ("channels", channels)):
        if given is not None:
            if not Path(place).exists():
                raise FileNotFoundError(f"{place}: there is no such run; a network is named as module.path:callable")
            raise ValueError(f"--{name.replace('_', '-')} {given}: the run in {place} has its own")
    evaluate_folder(
        Path(place),
        settings,
        device,
        data=data,
        stream=stream,
        workers=workers,
        transfer_from=transfer_from,
        checkpoint=checkpoint,
        out=out,
        again=again,
        compile=compile,
        trust_code=trust_code,
    )


def names_callable(text: str) -> bool:
    """Whether it is module.path:callable, and not a folder, be it one that is missing: `C:\\runs`, `runs/a:b`."""
    return re.fullmatch(r"[\w.]*:[\w.]*", text) is not None and not Path(text).exists()


def evaluate_callable(
    place: str,
    dataset: ImageDataset,
    settings: EvaluationSettings,
    device: torch.device,
    out: Path,
    *,
    transfer_from: Path | None = None,
    again: bool = False,
    trust_code: bool = False,
) -> None:
    """Evaluate a network that Python can import.

    Args:
        place: module.path:callable.
        dataset: whose test split is attacked, on the device.
        settings: what is to be found out.
        device: where.
        out: the folder that is written to.
        transfer_from, again, trust_code: see `evaluate_folder`.

    Raises:
        ValueError, OSError: what was given is wrong; one clear line.
    """
    model = load_callable(place, dataset.num_classes, dataset.channels)
    if isinstance(model, torch.nn.Module):
        model.to(device)
    other = None if transfer_from is None else load_other(transfer_from, None, model, dataset, device, trust_code)
    transfer = None if other is None else ExactMean(other)
    target: MixtureTarget | NetworkTarget
    if isinstance(model, ImmunityMoE) and model.num_experts > 1:
        check_no_noise(model)
        target = mixture_target(model, dataset.num_classes, draws=settings.draws or DRAWS, transfer=transfer)
    else:
        noisy = isinstance(model, ImmunityMoE) and model.noise is not None
        target = network_target(model, dataset.num_classes, noisy, settings.draws, name=place, transfer=transfer)
    plan = settings.plan(
        target.attackers,
        dataset.image_size,
        images=IMAGES,
        seed=0,
        chunk=attack_batch(device),
        channels=dataset.channels,
        device=device,
    )
    about = About(
        title=f"{place} on {dataset.name}",
        lead=f"{place}, judged on {len(dataset.test):,} test images.",
        settings={"model": place, "dataset": dataset.name, "classes": ", ".join(dataset.classes)},
        commands={},
    )
    outputs = outputs_in(out, again)
    with other_size_named(dataset), frozen(model) if isinstance(model, torch.nn.Module) else nullcontext():
        evaluate(target, dataset, plan, outputs, about)


@contextmanager
def other_size_named(dataset: ImageDataset) -> Iterator[None]:
    """Where a network does not take a folder's images in a `with` block, its ValueError says what makes others."""
    try:
        yield
    except ValueError as error:
        if dataset.name not in LISTED or "expected a network that takes images" not in str(error):
            raise
        said = str(error).removeprefix("model: ")
        raise ValueError(f"model: {said}; or --image-size N brings all images to N×N pixels") from error


@cli.enough_memory(MEMORY_ADVICE)
def evaluate_folder(
    folder: Path,
    settings: EvaluationSettings,
    device: torch.device,
    *,
    data: str | None = None,
    stream: Stream | None = None,
    workers: Workers | None = None,
    transfer_from: Path | None = None,
    checkpoint: WhichCheckpoint | None = None,
    out: Path | None = None,
    again: bool = False,
    compile: Compile = "auto",
    trust_code: bool = False,
) -> None:
    """Evaluate the model of a run that was trained to its end.

    Args:
        folder: the run's.
        settings: what is to be found out.
        device: where.
        data: where the data set lies now; None is where it lay.
        stream, workers: how its images are read now; None is as they were read in training.
        transfer_from: another run, whose adversarial images are tried on this one.
        checkpoint: whose model; None is the best, where there is one.
        out: the folder that is written to; None is the run's.
        again: forget what is finished of an earlier evaluation there.
        compile: the experts.
        trust_code: import what the architecture `module.path:callable` of a run names, which runs that module's code.

    Raises:
        ValueError, OSError: what was given is wrong; one clear line.
    """
    run = Run.open(folder)
    config = run.config()
    if OWN in (config.dataset, config.arch):
        what = "data" if config.dataset == OWN else "a network"
        raise ValueError(
            f"{folder}: expected a run whose settings name what it was trained with, got {what} that only Python code "
            "has: Trainer.from_run(…).evaluate()"
        )
    changes: dict[str, Any] = {"stream": stream, "workers": workers}
    config = dataclasses.replace(config, **{name: value for name, value in changes.items() if value is not None})
    dataset = load_data(config, device, data).to(device)
    file = model_file({None: run.folder, "best": run.best_checkpoint, "last": run.checkpoint}[checkpoint])
    model = load_trained(run, config, file, dataset, device, trust_code)
    poison = poison_of_run(config, file, load_info(file))
    transfer = None if transfer_from is None else load_other(transfer_from, folder, model, dataset, device, trust_code)
    folder = out or run.folder
    keep_caches()
    target = target_of(
        model,
        dataset.num_classes,
        draws=settings.draws or DRAWS,
        transfer=transfer,
        compile=compile,
        tracebacks=Outputs(folder).tracebacks,
    )
    plan = settings.plan(
        target.attackers,
        dataset.image_size,
        images=config.attack_images,
        seed=config.seed,
        chunk=attack_batch(device),
        channels=dataset.channels,
        device=device,
    )
    with broken_weights_named(model, file):
        evaluate_run(run, target, dataset, config, plan, outputs_in(folder, again), poison)


@contextmanager
def broken_weights_named(model: ImmunityMoE, file: Path) -> Iterator[None]:
    """Whatever a `with` block refuses of a model, its ValueError says where the weights are no longer finite."""
    try:
        yield
    except ValueError as error:
        wrong = not_finite(model.state_dict())
        if wrong is None:
            raise
        raise ValueError(
            f"{error}; {file} holds weights that are NaN or infinite ({wrong}): begin a new run, with a smaller --lr"
        ) from error


def load_trained(
    run: Run, config: TrainConfig, file: Path, dataset: ImageDataset, device: torch.device, trust_code: bool = False
) -> ImmunityMoE:
    """A checkpoint's model.

    Raises:
        ValueError: it is not the run's, the data are others, or the run has not ended.
    """
    model, info = load_model(file, device, trust_code=trust_code)
    trained = run.epochs_trained()
    if (info["model"]["arch"], info["model"]["num_experts"]) != (config.arch, config.experts):
        raise ValueError(f"{file}: of another run: {info['model']}")
    if info["model"]["num_classes"] != dataset.num_classes or not dataset.is_of(info.get("data"), info.get("listing")):
        if info.get("data") != load_info(run.checkpoint)["data"]:
            raise ValueError(f"{file}: of another run, which was trained on other data")
        raise ValueError(f"data: expected those that {run.folder} was trained on, got others")
    check_classes(file, info, dataset.classes)
    run.check_ended(trained)
    return model


def load_other(
    path: Path,
    own: Path | None,
    model: Model,
    dataset: ImageDataset,
    device: torch.device,
    trust_code: bool = False,
) -> ImmunityMoE:
    """The model of `--transfer-from`.

    Args:
        path: a run's folder, or a checkpoint.
        own: the folder of the run that is evaluated, if it is one.
        model: what is evaluated.
        dataset: on which.
        device: where the model is to be.
        trust_code: see `evaluate_folder`.

    Raises:
        ValueError: it is what is evaluated, was trained on other classes, or has not been trained to its end.
    """
    place = f"--transfer-from {path}"
    other, info = load_model(path, device, trust_code=trust_code)
    if path.is_dir():
        run = Run.open(path)
        config = run.config()
        run.check_ended(run.epochs_trained(), place)
        if config.dataset != dataset.name:
            raise ValueError(
                f"{place}: it was trained on {config.dataset}, whose classes are not those of {dataset.name}"
            )
    channels = info["model"].get("channels", 3)
    if channels != dataset.channels:
        raise ValueError(
            f"{place}: it was trained on images of {channels} channels, and these data have {dataset.channels}"
        )
    classes = info["model"]["num_classes"]
    if classes != dataset.num_classes:
        raise ValueError(f"{place}: it was trained on {classes} classes, and these data have {dataset.num_classes}")
    if "classes" in info and info["classes"] != list(dataset.classes):
        raise ValueError(f"{place}: it was trained on other classes than these data have")
    same_folder = own is not None and path.is_dir() and path.samefile(own)
    if same_folder or (isinstance(model, torch.nn.Module) and same_weights(model, other)):
        raise ValueError(f"{place}: that is the run that is evaluated; name one that was trained independently")
    return other


def target_of(
    model: ImmunityMoE,
    num_classes: int,
    *,
    draws: int = DRAWS,
    transfer: ImmunityMoE | None = None,
    compile: Compile = "off",
    tracebacks: Path | None = None,
) -> MixtureTarget | NetworkTarget:
    """What is attacked of a trained model: the mixture with its gate, or the one network that it is.

    Args:
        model: in evaluation mode.
        num_classes: K.
        draws: of the gate or of the noise, for EOT.
        transfer: an independently trained model, attacked for its images.
        compile: the experts' logits, into one function for all attacks: what each makes of them is little.
        tracebacks: the file for those of compiling.
    """
    other = None if transfer is None else ExactMean(transfer)
    if model.num_experts == 1:
        noisy = model.noise is not None
        return network_target(ExactMean(model), num_classes, noisy, draws if noisy else None, transfer=other)
    check_no_noise(model)
    device = next(model.parameters()).device
    logits = Compiled(model.expert_logits, compile, device, cli.console.print, tracebacks)
    size = max(attack_batch(device), EVALUATION_BATCH)
    return mixture_target(
        model,
        num_classes,
        draws=draws,
        transfer=other,
        expert_logits=(lambda images: at_size(logits, images, size)) if logits.active else None,
    )


def network_target(
    network: Model,
    num_classes: int,
    noisy: bool,
    draws: int | None,
    *,
    name: str = "",
    transfer: Model | None = None,
) -> NetworkTarget:
    """One network as a target; one with noise answers by the mean of some passes, and is attacked by single ones.

    Args:
        network: images (B, C, H, W) to outputs (B, K).
        num_classes: K.
        noisy: whether it is an `ImmunityMoE`'s with noise.
        draws: passes that the attacker "eot" averages; None is `DRAWS` with noise.
        name, transfer: see `NetworkTarget`.
    """
    if not noisy:
        return NetworkTarget(network, num_classes, name=name, draws=draws, transfer=transfer)
    assert isinstance(network, torch.nn.Module)
    answer = MeanOfPasses(network)
    return NetworkTarget(network, num_classes, name=name, draws=draws or DRAWS, transfer=transfer, answer=answer)


def check_no_noise(model: ImmunityMoE) -> None:
    """Check that nothing of a mixture's experts is random: what is said of its gate would not hold.

    Raises:
        ValueError: they have noise.
    """
    if model.noise is not None:
        raise ValueError(f"model: expected one network with noise, got a mixture of {model.num_experts} experts")


def evaluate_run(
    run: Run,
    target: MixtureTarget | NetworkTarget,
    dataset: ImageDataset,
    config: TrainConfig,
    plan: Plan,
    outputs: Outputs | None = None,
    poison: Poison | None = None,
    *,
    printed: bool = True,
) -> Results:
    """Evaluate the model of a training run on its data set's test split.

    Args:
        run: for what the report says of it.
        target: its model, as `target_of` makes it.
        dataset: on the model's device.
        config: with which it was trained.
        plan: what to find out.
        outputs: where to write; None is the run's folder.
        poison: what its training images were poisoned with.
        printed: print the tables.

    Returns:
        `evaluation.results.results`.

    Raises:
        ValueError: a model that cannot be attacked or whose output is not finite.
    """
    loss_fn = config.loss_fn(dataset.image_size) if isinstance(target, MixtureTarget) else None
    model = target.model
    assert isinstance(model, torch.nn.Module)
    about = about_run(run, config, dataset, poison)
    with frozen(model):
        return evaluate(target, dataset, plan, outputs or Outputs(run.folder), about, loss_fn, printed=printed)


def about_run(run: Run, config: TrainConfig, dataset: ImageDataset, poison: Poison | None = None) -> About:
    """What a report says of a run besides its results."""
    single = config.experts == 1
    what = title(config.arch, config.experts)
    trained = "" if config.adversarial == "off" else f", adversarially ({config.adversarial})"
    trained += "" if poison is None else f", poisoned ({words(poison)})"
    weights = (
        ""
        if single
        else f" α\u00a0=\u00a0{config.alpha:g}, β\u00a0=\u00a0{config.beta:g}, γ\u00a0=\u00a0{config.gamma:g}."
    )
    return About(
        title=f"Immunity: {what} on {config.dataset}",
        lead=(
            f"{what}, trained for {config.epochs} epochs on {len(dataset.train):,} images{trained}, and judged on "
            f"{len(dataset.test):,} test images.{weights}"
        ),
        settings=config.to_json() | {"classes": ", ".join(dataset.classes)},
        commands={
            "Evaluate this run again, with more attacks": run.evaluate_command,
            "Go on with it, if it was interrupted": run.resume_command,
        },
        records=run.metrics(),
        poison=poison,
    )


def evaluate_trained(state: TrainingState, run: Run | None, *, printed: bool = True) -> Results:
    """What a run ends with: attacks on test images, tables, figures and the report; without a run the results alone.

    Args:
        state: trained to its end.
        run: its folder; None keeps no file.
        printed: print the tables.

    Returns:
        `evaluation.results.results`.
    """
    config = state.config
    plan = dataclasses.replace(
        AFTER_TRAINING, images=config.attack_images, seed=config.seed, chunk=attack_batch(state.device)
    )
    if config.experts == 1:  # nothing about a gate to know
        plan = dataclasses.replace(plan, attackers=None)
    classes, model = state.dataset.num_classes, trained_model(state, run)
    if run is None:
        with tempfile.TemporaryDirectory() as folder:
            target = target_of(model, classes, compile=config.compile)
            return evaluate_run(
                Run(Path(folder)), target, state.dataset, config, plan, None, state.poison, printed=printed
            )
    target = target_of(model, classes, compile=config.compile, tracebacks=Outputs(run.folder).tracebacks)
    return evaluate_run(run, target, state.dataset, config, plan, None, state.poison, printed=printed)


def trained_model(state: TrainingState, run: Run | None) -> ImmunityMoE:
    """The model that a training has ended with: the run's best one, or the average of the weights, where there is."""
    if run is not None and state.config.arch != OWN:
        # Its code, if any, this process has trained.
        return load_model(run.folder, state.device, trust_code=True)[0]
    model, weights = copy.deepcopy(state.model), state.weights()
    if run is not None:
        file = model_file(run.folder)
        tensors, _ = load_checkpoint(file)
        weights = under("ema", tensors) or under("model", tensors)
        load_module(file, model, weights, "model/")
    model.load_state_dict(weights)
    return model.eval()


def outputs_in(folder: Path, again: bool) -> Outputs:
    """A folder's files; `again` forgets what is finished of an earlier evaluation there."""
    outputs = Outputs(folder)
    if again:
        outputs.ledger.unlink(missing_ok=True)
    return outputs
