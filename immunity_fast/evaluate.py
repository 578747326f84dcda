"""`python -m immunity_fast.evaluate RUN`: accuracy, clean and attacked, of a trained run or any network, with a report.

Every attacked number says what the attacker knew of the gate. An evaluation that was killed goes on where it was, and
the same command started twice shares the work.
"""

import argparse
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from immunity_fast.attacks import Model
from immunity_fast.data.datasets import NAMES as DATASETS
from immunity_fast.data.datasets import ImageDataset, load
from immunity_fast.data.sampling import attack_batch
from immunity_fast.evaluation.pipeline import evaluate
from immunity_fast.evaluation.report import About, Outputs
from immunity_fast.evaluation.runner import ATTACKS, SETS, Plan
from immunity_fast.evaluation.targets import MixtureTarget, NetworkTarget, TargetModel, load_callable
from immunity_fast.models.modes import frozen
from immunity_fast.models.moe import ExactMean, ImmunityMoE
from immunity_fast.runtime import cli
from immunity_fast.runtime.compilation import keep_caches
from immunity_fast.training.checkpoint import check_classes, load_info, load_model, model_file, not_finite
from immunity_fast.training.config import number
from immunity_fast.training.run_evaluation import evaluate_run
from immunity_fast.training.run_folder import Run

MOST_DRAWS = 10_000  # for EOT
LARGEST = 2**63 - 1  # of whole numbers
FORMER_ATTACKERS = {"fixed": "off", "single": "sample"}  # what they were called, for who still calls them so


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command's options; ValueError for one out of its range."""
    parser = cli.Parser(prog="python -m immunity_fast.evaluate", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "run",
        type=lambda text: str(cli.path(text)),
        metavar="RUN",
        help="a folder that immunity_fast.train wrote; or module.path:callable",
    )
    parser.add_argument(
        "--attacks",
        default="default",
        metavar="LIST",
        help=f"with commas, of {', '.join(ATTACKS)}, {', '.join(SETS)}; default: {', '.join(SETS['default'])}",
    )
    parser.add_argument(
        "--attackers",
        metavar="LIST",
        help="what is known of the gate, with commas: off, sample, eot, mean, worst, experts, transfer; default: all",
    )
    parser.add_argument("--limit", type=int, metavar="INT", help="test images to attack; default: the run's setting")
    parser.add_argument(
        "--eps", type=number, metavar="FLOAT", help="radius, of images in [0, 1]; default: 8/255 for Linf, 1 for L2"
    )
    parser.add_argument("--norm", choices=("Linf", "L2"), default="Linf", help="of the perturbation")
    parser.add_argument(
        "--draws", type=int, metavar="INT", help="of the gate, or of a random model, for EOT; default: 20"
    )
    parser.add_argument(
        "--transfer-from", type=cli.path, metavar="RUN", help="attack this run, too, and transfer its images"
    )
    parser.add_argument(
        "--drop-fooled", action="store_true", help="attack an image until it fools what its attacker attacks; faster"
    )
    parser.add_argument("--masking-images", type=int, default=64, metavar="INT", help="for the curves; 0: no curves")
    parser.add_argument("--queries", type=int, default=5000, metavar="INT", help="of Square")
    parser.add_argument(
        "--autoattack-steps", type=int, default=100, metavar="INT", help="fewer than 100 is no AutoAttack"
    )
    parser.add_argument("--seed", type=int, metavar="INT", help="default: the run's")
    parser.add_argument("--checkpoint", choices=("best", "last"), help="default: the best, where there is one")
    parser.add_argument(
        "--out", type=cli.path, metavar="DIR", help="where results are written; default: the run's folder"
    )
    parser.add_argument("--again", action="store_true", help="forget what is finished of an earlier evaluation there")
    parser.add_argument("--dataset", choices=DATASETS, help="for module.path:callable")
    parser.add_argument("--data", metavar="PATH", help="where the data set lies, or lies now")
    parser.add_argument(
        "--image-size", type=int, metavar="INT", help="for module.path:callable on a folder of images: of what side"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, …; auto: CUDA if there is any")
    parser.add_argument("--compile", choices=("auto", "off", "on", "max"), default="auto", help="compile the experts")
    options = parser.parse_args(arguments)
    leasts = {
        "limit": 1,
        "draws": 1,
        "masking_images": 0,
        "queries": 1,
        "autoattack_steps": 1,
        "image_size": 1,
        "seed": 0,
    }
    for name, least in leasts.items():
        value, option = getattr(options, name), f"--{name.replace('_', '-')}"
        if value is not None and value < least:
            raise ValueError(f"{option}: expected at least {least}, got {value}")
        if value is not None and value > LARGEST:
            raise ValueError(f"{option}: expected at most 2⁶³ − 1, got a number of {len(str(value))} digits")
    if options.draws is not None and options.draws > MOST_DRAWS:  # each is a mixture of its own in every step
        raise ValueError(f"--draws: expected at most {MOST_DRAWS}, got {options.draws}")
    if options.eps is not None and not 0 <= options.eps < math.inf:
        raise ValueError(f"--eps: expected a finite number of at least 0, got {options.eps}")
    if options.eps is not None and options.norm == "Linf" and options.eps > 1:
        given = f"{options.eps:g}"
        raise ValueError(f"--eps: expected at most 1, as images are in [0, 1], got {given}; of 255 levels: {given}/255")
    return options


def plan_of(options: argparse.Namespace, images: int, seed: int, device: torch.device) -> Plan:
    """The plan that a command line asks for; ValueError for an unknown attack or attacker."""
    attacks: list[str] = []
    for name in options.attacks.split(","):
        if name not in (*ATTACKS, *SETS):
            raise ValueError(f"--attacks: expected some of {', '.join((*ATTACKS, *SETS))}, got {name}")
        attacks += SETS.get(name, (name,))
    return Plan(
        attacks=tuple(dict.fromkeys(attacks)),
        images=images,
        eps=options.eps,
        norm=options.norm,
        masking_images=options.masking_images,
        drop_fooled=options.drop_fooled,
        queries=options.queries,
        autoattack_steps=options.autoattack_steps,
        seed=seed if options.seed is None else options.seed,
        chunk=attack_batch(device),
    )


def with_attackers(plan: Plan, known: Sequence[str], given: str | None) -> Plan:
    """A plan for the attackers of a command line; ValueError where the model has no such."""
    if given is None:
        return plan
    names: list[str] = []
    for name in given.split(","):
        if name in FORMER_ATTACKERS:
            raise ValueError(f"--attackers: expected {FORMER_ATTACKERS[name]}, as it is called now, got {name}")
        chosen = [a for a in known if a == name or (name == "experts" and a.startswith("expert "))]
        if not chosen:
            raise ValueError(f"--attackers: expected some of {', '.join(known)}, got {name}")
        names += chosen
    return replace(plan, attackers=tuple(names))


def check_radius(plan: Plan, dataset: ImageDataset) -> None:
    """ValueError for an L2 radius that no image needs: larger than the distance of black from white."""
    height, width = dataset.image_size
    diagonal = math.sqrt(3 * height * width)
    if plan.norm == "L2" and plan.radius > diagonal:
        raise ValueError(
            f"--eps: expected at most {diagonal:.4g}, as far as black is from white in L2 in images of "
            f"{height}×{width} pixels, got {plan.radius:g}"
        )


def another(
    options: argparse.Namespace, model: Model, dataset: ImageDataset, device: torch.device
) -> ImmunityMoE | None:
    """The model of `--transfer-from`; None without it.

    Raises:
        ValueError: it is what is evaluated, was trained on other classes, or has not been trained to its end.
    """
    path: Path | None = options.transfer_from
    if path is None:
        return None
    place = f"--transfer-from {path}"
    other, info = load_model(path, device)
    if path.is_dir():
        run = Run.open(path)
        config = run.config()
        epoch = run.epochs_trained()
        if epoch < config.epochs:
            raise ValueError(
                f"{place}: stopped after {epoch} of {config.epochs} epochs; go on with: {run.resume_command}"
            )
        if config.dataset != dataset.name:
            raise ValueError(
                f"{place}: it was trained on {config.dataset}, whose classes are not those of {dataset.name}"
            )
    classes = info["model"]["num_classes"]
    if classes != dataset.num_classes:
        raise ValueError(f"{place}: it was trained on {classes} classes, and these data have {dataset.num_classes}")
    if "classes" in info and info["classes"] != list(dataset.classes):
        raise ValueError(f"{place}: it was trained on other classes than these data have")
    own = Path(options.run)
    same_folder = path.is_dir() and own.is_dir() and path.samefile(own)
    if same_folder or (isinstance(model, torch.nn.Module) and _same(model, other)):
        raise ValueError(f"{place}: that is the run that is evaluated; name one that was trained independently")
    return other


def _same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether their tensors are equal."""
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(
        mine[name].shape == theirs[name].shape and bool((mine[name] == theirs[name]).all()) for name in mine
    )


def evaluate_callable(options: argparse.Namespace, device: torch.device) -> None:
    """The command for `module.path:callable`."""
    for name in ("dataset", "out"):
        if getattr(options, name) is None:
            raise ValueError(f"--{name}: missing; {options.run} is no folder that is here, and a network needs it")
    dataset = load(options.dataset, options.data, image_size=options.image_size).to(device)
    model = load_callable(options.run)
    if isinstance(model, torch.nn.Module):
        model.to(device)
    other = another(options, model, dataset, device)
    transfer = None if other is None else ExactMean(other)
    if isinstance(model, ImmunityMoE) and model.num_experts > 1:
        target: TargetModel = MixtureTarget(model, dataset.num_classes, draws=options.draws or 20, transfer=transfer)
    else:
        target = NetworkTarget(model, dataset.num_classes, name=options.run, draws=options.draws, transfer=transfer)
    plan = plan_of(options, options.limit or 1000, 0, device)
    plan = with_attackers(plan, target.attackers, options.attackers)
    check_radius(plan, dataset)
    about = About(
        title=f"{options.run} on {options.dataset}",
        lead=f"{options.run}, judged on {len(dataset.test):,} test images.",
        settings={"model": options.run, "dataset": options.dataset, "classes": ", ".join(dataset.classes)},
        commands={},
    )
    outputs = _outputs(options.out, options.again)
    if isinstance(model, torch.nn.Module):
        with frozen(model):
            evaluate(target, dataset, plan, outputs, about)
    else:
        evaluate(target, dataset, plan, outputs, about)


def evaluate_folder(options: argparse.Namespace, device: torch.device) -> None:
    """The command for a run's folder."""
    if options.dataset is not None:
        raise ValueError(f"--dataset {options.dataset}: the run in {options.run} has its own")
    if options.image_size is not None:
        raise ValueError(f"--image-size {options.image_size}: the run in {options.run} has its own")
    run = Run.open(Path(options.run))
    config = run.config()
    dataset = load(
        config.dataset, options.data or config.data, limit_train=config.limit_train, image_size=config.image_size
    ).to(device)
    paths = {None: run.folder, "best": run.best_checkpoint, "last": run.checkpoint}
    file = model_file(paths[options.checkpoint])
    model, info = load_model(file, device)
    trained = run.epochs_trained()
    if (info["model"]["arch"], info["model"]["num_experts"]) != (config.arch, config.experts):
        raise ValueError(f"{file}: of another run: {info['model']}")
    if info["model"]["num_classes"] != dataset.num_classes or info.get("data") != dataset.fingerprint():
        if info.get("data") != load_info(run.checkpoint)["data"]:
            raise ValueError(f"{file}: of another run, which was trained on other data")
        raise ValueError(f"the data are not those that {options.run} was trained on")
    check_classes(file, info, dataset.classes)
    if trained < config.epochs:
        raise ValueError(
            f"{options.run}: stopped after {trained} of {config.epochs} epochs; go on with: {run.resume_command}"
        )
    transfer = another(options, model, dataset, device)
    if model.num_experts > 1:
        attackers = MixtureTarget.attacker_names(model.num_experts, transfer=transfer is not None)
    else:
        attackers = NetworkTarget.attacker_names(random=False, transfer=transfer is not None)
    plan = plan_of(options, options.limit or config.attack_images, config.seed, device)
    plan = with_attackers(plan, attackers, options.attackers)
    check_radius(plan, dataset)
    keep_caches()
    try:
        evaluate_run(
            run,
            model,
            dataset,
            config,
            plan,
            _outputs(options.out or run.folder, options.again),
            draws=options.draws or 20,
            transfer=transfer,
            compile=options.compile,
        )
    except ValueError as error:
        wrong = not_finite(model.state_dict())
        if wrong is None:
            raise
        raise ValueError(
            f"{error}; {file} holds weights that are NaN or infinite ({wrong}): begin a new run, with a smaller --lr"
        ) from error


def _outputs(folder: Path, again: bool) -> Outputs:
    outputs = Outputs(folder)
    if again:
        outputs.ledger.unlink(missing_ok=True)
    return outputs


def names_callable(text: str) -> bool:
    """Whether it is module.path:callable, and not a folder, be it one that is missing: `C:\\runs`, `runs/a:b`."""
    return re.fullmatch(r"[\w.]*:[\w.]*", text) is not None and not Path(text).exists()


@cli.resumable("evaluate")
@cli.enough_memory("another --device, fewer --draws, or smaller networks")
def main(arguments: list[str] | None = None) -> None:
    """The command `python -m immunity_fast.evaluate`."""
    try:
        options = parse(arguments)
        device = cli.pick_device(options.device)
        if names_callable(options.run):
            evaluate_callable(options, device)
        else:
            evaluate_folder(options, device)
    except (ValueError, ModuleNotFoundError) as error:
        raise cli.InputError(str(error)) from error


if __name__ == "__main__":
    cli.run_command(main)
