"""Poisons for one test image, made with a trained run as the surrogate: from names of files to a file of poisons."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from immunity_fast.attacks import gradient_matching, witches_brew
from immunity_fast.data import OWN, poison_file
from immunity_fast.data.augmentation import as_float
from immunity_fast.data.datasets import AnySplit, ImageDataset, fingerprint
from immunity_fast.data.sampling import EVALUATION_BATCH, batches
from immunity_fast.models.moe import ImmunityMoE
from immunity_fast.poisoning.settings import LEVELS, CraftSettings
from immunity_fast.runtime import cli
from immunity_fast.runtime.commands import shell_command
from immunity_fast.runtime.files import abbreviated
from immunity_fast.targets import hard_labels
from immunity_fast.training.checkpoint import model_file
from immunity_fast.training.config import TrainConfig
from immunity_fast.training.preparation import load_data
from immunity_fast.training.run_evaluation import WhichCheckpoint, load_trained
from immunity_fast.training.run_folder import Run


class Setup(NamedTuple):
    """What poisons are to reach.

    Args:
        target: index of a test image.
        target_class: what it is to be taken for, which it is not.
    """

    target: int
    target_class: int


class Surrogate(NamedTuple):
    """A trained network, with what it was trained on.

    Args:
        model: in evaluation mode, on the device where poisons are made.
        dataset: as it was trained on, on the CPU.
        config: the run's.
        answers: (n,) the classes that the mixture takes the test images for.
    """

    model: ImmunityMoE
    dataset: ImageDataset
    config: TrainConfig
    answers: Tensor


class Crafted(NamedTuple):
    """Poisons, and the matching loss, see `attacks.gradient_matching`, of their bases and of themselves."""

    poisons: poison_file.Poisons
    before: float
    after: float


def craft_named(
    run: Path,
    out: Path,
    settings: CraftSettings,
    device: torch.device,
    *,
    target: int | None = None,
    target_class: str | None = None,
    seed: int = 0,
    data: str | None = None,
    checkpoint: WhichCheckpoint | None = None,
    trust_code: bool = False,
) -> Crafted:
    """Make poisons and write them, for `immunity_fast.train --poison`.

    Args:
        run: a run's folder, trained on clean images to its end: the surrogate.
        out: the file, an .npz.
        settings: how they are made.
        device: where.
        target: index of a test image; None is one of those that the run answers rightly, by the seed.
        target_class: a class, or its number; None is one by the seed.
        seed: of what is drawn: the target, its class, the bases, the noise at the start and the augmentation.
        data: where the data set lies now; None is where it lay.
        checkpoint: of the run; None is the best, where there is one.
        trust_code: see `immunity_fast.load`.

    Raises:
        ValueError, OSError, ModuleNotFoundError: what was given is wrong; one clear line.
    """
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"--out {out}: there is no such folder")
    surrogate = load_surrogate(run, device, data=data, checkpoint=checkpoint, trust_code=trust_code)
    classes, labels = surrogate.dataset.classes, surrogate.dataset.test.labels
    wanted = None if target_class is None else class_of(target_class, classes)
    setup = chosen(surrogate, settings, seed=seed, target=target, target_class=wanted)
    own = int(labels[setup.target])
    cli.console.print(
        f"target: test image {setup.target}, {classes[own]}, which {run} takes for "
        f"{classes[int(surrogate.answers[setup.target])]}; it is to be taken for {classes[setup.target_class]}"
    )
    with progress(settings) as on_step:
        crafted = craft(surrogate, setup, settings, seed=seed, on_step=on_step)
    poison_file.write(out, crafted.poisons)
    cli.console.print(
        f"{len(crafted.poisons.indices):,} of {len(surrogate.dataset.train):,} training images changed by up to "
        f"{settings.radius}/{LEVELS}; matching loss {crafted.before:.3f} → {crafted.after:.3f}"
    )
    cli.console.print(f"{out}; train on it with: {shell_command('train', ['--poison', str(out)])} …")
    return crafted


def load_surrogate(
    run: Path,
    device: torch.device,
    *,
    data: str | None = None,
    checkpoint: WhichCheckpoint | None = None,
    trust_code: bool = False,
) -> Surrogate:
    """A run with its data, and what it takes the test images for.

    Raises:
        ValueError, OSError, ModuleNotFoundError: there is no such run, it has not ended, its data are others, or it was
            trained on poisons or on what only Python code has.
    """
    opened = Run.open(run)
    config = opened.config()
    if OWN in (config.dataset, config.arch):
        raise ValueError(f"{run}: expected a run of data and networks that have names, got one of Python code's own")
    if config.poison is not None:
        raise ValueError(f"{run}: expected a run on clean images, got one with --poison {config.poison}")
    file = model_file({None: opened.folder, "best": opened.best_checkpoint, "last": opened.checkpoint}[checkpoint])
    dataset = load_data(config, device, data)
    model = load_trained(opened, config, file, dataset, device, trust_code)
    return Surrogate(model, dataset, config, answers(model, dataset.test, device))


@torch.no_grad()
def answers(model: ImmunityMoE, split: AnySplit, device: torch.device) -> Tensor:
    """(n,) int64 on the CPU: the classes that a mixture, by the mean of its gate, takes a split's images for."""
    judge = model.deterministic()
    found = [judge(images.to(device)).argmax(-1).cpu() for images, _ in batches(split, EVALUATION_BATCH)]
    return torch.cat(found)


def chosen(
    surrogate: Surrogate,
    settings: CraftSettings,
    *,
    seed: int,
    target: int | None = None,
    target_class: int | None = None,
) -> Setup:
    """What poisons are made for: what is given, the rest drawn by the seed.

    Drawn are a test image that the surrogate answers rightly, and a class, not its own, that has enough training images
    for the budget.

    Raises:
        ValueError: no such image, its own class, a class with too few training images, or nothing that could be drawn.
    """
    dataset = surrogate.dataset
    labels, draw = dataset.test.labels.cpu(), torch.Generator().manual_seed(seed)
    sizes = torch.bincount(hard_labels(dataset.train.labels.cpu()).clamp_min(0), minlength=dataset.num_classes)
    count = settings.bases(len(dataset.train))
    enough = [number for number, size in enumerate(sizes.tolist()) if size >= count]
    if target is None:
        right = (surrogate.answers == labels) & (True if target_class is None else labels != target_class)
        if not bool(right.any()):
            raise ValueError("--target: expected a test image that the run answers rightly, got none to draw from")
        places = right.nonzero().flatten()
        target = int(places[torch.randint(len(places), (), generator=draw)])
    elif not 0 <= target < len(labels):
        raise ValueError(f"--target: expected 0 to {len(labels) - 1}, the test images there are, got {target}")
    own = int(labels[target])
    if target_class is None:
        others = [number for number in enough if number != own]
        if not others:
            raise _too_few(settings, count, int(sizes.max()), "the largest class", len(dataset.train))
        target_class = others[int(torch.randint(len(others), (), generator=draw))]
    if target_class == own:
        raise ValueError(
            f"--target-class: expected another than the target's own, {dataset.classes[own]}, got the same"
        )
    if target_class not in enough:
        named = dataset.classes[target_class]
        raise _too_few(settings, count, int(sizes[target_class]), f"class {named}", len(dataset.train))
    return Setup(target, target_class)


def craft(
    surrogate: Surrogate,
    setup: Setup,
    settings: CraftSettings,
    *,
    seed: int,
    on_step: Callable[[], None] | None = None,
) -> Crafted:
    """Poisons for a setup, as a file of them has them: whole levels of pixels, labels as they were.

    Args:
        surrogate: whose experts' gradients are matched, each with a similarity of its own, of which the mean counts.
        setup: what they are for; see `chosen`.
        settings: how they are made.
        seed: of what is drawn.
        on_step: see `witches_brew`.
    """
    dataset, config = surrogate.dataset, surrogate.config
    device = next(surrogate.model.parameters()).device
    draw = torch.Generator().manual_seed(seed)
    of_class = (hard_labels(dataset.train.labels.cpu()) == setup.target_class).nonzero().flatten()
    order = torch.randperm(len(of_class), generator=draw)[: settings.bases(len(dataset.train))]
    indices = of_class[order].sort().values
    stored, target = dataset.train.read(indices).cpu(), dataset.test.read(torch.tensor([setup.target])).cpu()[0]
    bases, labels = as_float(stored).to(device), torch.full((len(indices),), setup.target_class, device=device)
    networks = surrogate.model.unstack()
    image = as_float(target).to(device)
    made = witches_brew(
        networks,
        image,
        setup.target_class,
        bases,
        labels,
        eps=settings.radius / LEVELS,
        steps=settings.steps,
        restarts=settings.restarts,
        padding=config.crop_padding,
        flip=dataset.flip if config.flip == "auto" else config.flip == "on",
        generator=draw,
        on_step=on_step,
    )
    levels, around = (made * LEVELS).round().cpu().to(torch.int16), stored.to(torch.int16)
    levels = levels.clamp(around - settings.radius, around + settings.radius).clamp(0, LEVELS)
    poisons = poison_file.Poisons(
        indices=indices,
        images=levels.to(torch.uint8),
        fingerprint=fingerprint(dataset.train),
        target_image=target,
        target_label=int(dataset.test.labels[setup.target]),
        target_class=setup.target_class,
        eps=settings.radius / LEVELS,
    )
    before, after = (
        float(gradient_matching(networks, image, setup.target_class, each, labels)[0])
        for each in (bases, as_float(poisons.images).to(device))
    )
    return Crafted(poisons, before, after)


@contextmanager
def progress(settings: CraftSettings) -> Iterator[Callable[[], None]]:
    """A bar of the steps for the length of a `with` block, or a line now and then; what it gives is called a step."""
    done, total = 0, settings.steps * settings.restarts
    with cli.progress_bar() as bar, cli.status_lines(lambda: f"crafting: step {done:,} of {total:,}"):
        task = bar.add_task("crafting", total=total, status="")

        def advance() -> None:
            nonlocal done
            done += 1
            bar.advance(task)

        yield advance


def class_of(name: str, classes: tuple[str, ...]) -> int:
    """Which class is meant by its name, or by its number.

    Raises:
        ValueError: none of them.
    """
    if name in classes:
        return classes.index(name)
    if name.isdecimal() and int(name) < len(classes):
        return int(name)
    raise ValueError(
        f"--target-class: expected one of {abbreviated(list(classes))}, or a number below {len(classes)}, got {name!r}"
    )


def _too_few(settings: CraftSettings, count: int, there: int, whose: str, images: int) -> ValueError:
    return ValueError(
        f"--budget: expected a share for which {whose} has enough of the {images:,} training images, got "
        f"{settings.budget:g}, {count:,} images, where it has {there:,}"
    )
