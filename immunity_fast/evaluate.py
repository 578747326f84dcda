"""`python -m immunity_fast.evaluate RUN`: test accuracy, clean and attacked, of a trained run, with a report.

Every attacked number says what the attacker knew of the gate. Attacks are Linf, eps 8/255: FGSM (one step of 8/255) and
PGD-20 (step 2/255, random start).
"""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from immunity_fast import cli
from immunity_fast.attacks import fgsm, pgd
from immunity_fast.augmentation import to_float
from immunity_fast.checkpoint import load_model, write_atomically
from immunity_fast.config import TrainConfig
from immunity_fast.data import ImageDataset, Split, load
from immunity_fast.figures import heatmap_figure, training_curves
from immunity_fast.gate import Switch
from immunity_fast.losses import FusedImmunityLoss
from immunity_fast.metrics import (
    EVALUATION_BATCH,
    batches,
    correct,
    expert_maps,
    heatmap_metrics,
    sample,
    wilson_interval,
)
from immunity_fast.model import ImmunityMoE
from immunity_fast.precision import set_float32
from immunity_fast.report import Table, write_report
from immunity_fast.runs import Run

FIGURE_ROWS = 8

Attack = Callable[[ImmunityMoE, Tensor, Tensor, torch.Generator], Tensor]

# (which switch the attacker differentiates, which one then answers) → what a table says of it
SETTINGS: dict[tuple[Switch, Switch], str] = {
    ("sample", "sample"): "gate switching; attacker sees a draw a step",
    ("mean", "sample"): "gate switching; attacker has the exact mean",
    ("mean", "mean"): "exact mean of the gate; attacker has it",
}
ATTACKERS = tuple(dict.fromkeys(attacker for attacker, _ in SETTINGS))
ATTACKS: dict[str, Attack | None] = {
    "clean": None,
    "FGSM": lambda model, images, labels, generator: fgsm(model, images, labels),
    "PGD-20": lambda model, images, labels, generator: pgd(model, images, labels, steps=20, generator=generator),
}


def evaluate(
    model: ImmunityMoE, loss_fn: FusedImmunityLoss, test: Split, *, attack_images: int, seed: int
) -> dict[str, Any]:
    """Accuracies on `test` (all of it clean, a fixed random sample of `attack_images` attacked) and heatmap measures.

    Returns a JSON object: `accuracy`, a list of {attack, attacker (the switch it differentiates; None for clean
    images), gate (the switch that answers), correct, images, accuracy, interval (Wilson, 95 %)}, and `heatmaps`, see
    `heatmap_metrics`, on the sample. The model is left in evaluation mode, its switch and generator as they were. The
    same seed gives the same result.
    """
    generator = model.gate.generator
    attacked = sample(test, attack_images)
    counts: Counter[tuple[str, Switch | None, Switch]] = Counter()
    model.eval()
    model.gate.generator = torch.Generator().manual_seed(seed)
    starts = torch.Generator().manual_seed(seed + 1)
    try:
        with cli.progress_bar() as progress:
            for attack, make in ATTACKS.items():
                split = test if attack == "clean" else attacked
                task = progress.add_task(f"evaluation: {attack}", total=len(split), status="")
                for images, labels in batches(split, EVALUATION_BATCH):
                    for attacker in ATTACKERS if make else (None,):
                        made = images
                        if make and attacker:
                            with model.gate.switched(attacker):
                                made = make(model, images, labels, starts)
                        for defender, right in correct(model, made, labels).items():
                            counts[attack, attacker, defender] += right
                    progress.advance(task, len(labels))
        heatmaps = heatmap_metrics(model, loss_fn, attacked, EVALUATION_BATCH)
    finally:
        model.gate.generator = generator
    accuracy = []
    for (attack, attacker, defender), right in counts.items():
        total = len(test if attack == "clean" else attacked)
        accuracy.append(
            {
                "attack": attack,
                "attacker": attacker,
                "gate": defender,
                "correct": right,
                "images": total,
                "accuracy": right / total,
                "interval": wilson_interval(right, total),
            }
        )
    return {"accuracy": accuracy, "heatmaps": heatmaps}


def accuracy_table(results: dict[str, Any]) -> Table:
    """The accuracies as a table: a row an attack, a column a knowledge of the gate."""
    rows = []
    for attack in ATTACKS:
        found = {(r["attacker"], r["gate"]): r for r in results["accuracy"] if r["attack"] == attack}
        if attack == "clean":  # nobody attacks: the first two columns are one
            found |= {(gate, gate): r for (_, gate), r in found.items()}
        cells = [found.get(setting) for setting in SETTINGS]
        percent = [
            f"{100 * c['accuracy']:.1f} ± {50 * (c['interval'][1] - c['interval'][0]):.1f}" if c else "—" for c in cells
        ]
        rows.append([attack, f"{next(iter(found.values()))['images']:,}", *percent])
    return Table(
        "Test accuracy, %",
        ["attack", "images", *SETTINGS.values()],
        rows,
        "Linf, eps 8/255; PGD-20 with steps of 2/255 from a random start. ± is half the 95 % Wilson interval.",
    )


def evaluate_run(run: Run, model: ImmunityMoE, dataset: ImageDataset, config: TrainConfig, limit: int) -> None:
    """Evaluate a trained model on the test split; write results.json, the figures and report.html into its folder."""
    set_float32("ieee")  # the numbers that are kept are not to depend on the device
    loss_fn = config.loss_fn(dataset.image_size)
    results = evaluate(model, loss_fn, dataset.test, attack_images=limit, seed=config.seed)
    write_atomically(run.results_file, json.dumps(results, indent=2).encode())
    figures = []
    shown = sample(dataset.test, FIGURE_ROWS)
    images = to_float(shown.images)
    heatmaps, _ = expert_maps(model, loss_fn, images, shown.labels)
    with torch.no_grad(), model.gate.switched("mean"):
        predicted = model(images).argmax(-1)
    names = dataset.classes
    labels = [f"{names[t]} → {names[p]}" for t, p in zip(shown.labels.tolist(), predicted.tolist(), strict=True)]
    run.figures.mkdir(exist_ok=True)
    heatmap_figure(images, heatmaps, labels, run.figures / "heatmaps.png")
    figures.append(
        (
            run.figures / "heatmaps.png",
            "Where each expert looks: its Grad-CAM heatmap for the true class on test images "
            "(true class → class predicted by the mean of the experts), each scaled by its own maximum.",
        )
    )
    records = run.metrics()
    if records:
        training_curves(records, run.figures / "curves.png")
        figures.append((run.figures / "curves.png", "Training: loss, accuracy and diversity after each epoch."))
    table = accuracy_table(results)
    measures = results["heatmaps"]
    by_key = {(r["attack"], r["attacker"], r["gate"]): f"{100 * r['accuracy']:.1f} %" for r in results["accuracy"]}
    write_report(
        run.report,
        title=f"Immunity: {config.experts} × {config.arch} on {config.dataset}",
        lead=(
            f"{config.experts} experts, trained for {config.epochs} epochs on {len(dataset.train):,} images and judged "
            f"on {len(dataset.test):,} test images. α\u00a0=\u00a0{config.alpha:g}, "
            f"β\u00a0=\u00a0{config.beta:g}, γ\u00a0=\u00a0{config.gamma:g}."
        ),
        facts={
            "test accuracy, gate switching": by_key["clean", None, "sample"],
            "test accuracy, exact mean": by_key["clean", None, "mean"],
            "PGD-20, gate switching, attacker sees a draw a step": by_key["PGD-20", "sample", "sample"],
            "PGD-20, gate switching, attacker has the exact mean": by_key["PGD-20", "mean", "sample"],
            "mutual information of expert and position": f"{measures['mutual_information']:.2f} nats",
            "dead heatmaps": f"{100 * measures['dead_heatmaps']:.1f} %",
        },
        tables=[table, _measures_table(measures, config)],
        figures=figures,
        commands={
            "Evaluate this run again": run.evaluate_command,
            "Go on with it, if it was interrupted": run.resume_command,
        },
        settings=config.to_json(),
    )
    cli.console.print()
    cli.console.print(table.to_markdown())
    cli.console.print(
        f"\nmutual information {measures['mutual_information']:.3f} nats, IScore {measures['iscore']:.1f}, "
        f"CScore {measures['cscore']:.0f} pixels⁴, dead heatmaps {100 * measures['dead_heatmaps']:.1f} %"
    )
    cli.console.print(f"report:         {run.report}")
    cli.console.print(f"evaluate again: {run.evaluate_command}")


def _measures_table(measures: dict[str, float], config: TrainConfig) -> Table:
    return Table(
        "The experts' heatmaps on the attacked sample's clean images",
        ["measure", "value", "what it says"],
        [
            [
                "mutual information",
                f"{measures['mutual_information']:.3f} nats",
                f"0: all look at the same place; log {config.experts}: no two at the same",
            ],
            ["IScore", f"{measures['iscore']:.1f}", "mean squared difference of two experts' heatmaps"],
            ["CScore", f"{measures['cscore']:.0f} pixels⁴", "how much the distance between two focuses varies"],
            ["dead heatmaps", f"{100 * measures['dead_heatmaps']:.1f} %", "heatmaps that are zero everywhere"],
        ],
    )


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = cli.Parser(prog="python -m immunity_fast.evaluate", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="a folder that immunity_fast.train wrote")
    parser.add_argument("--limit", type=int, metavar="INT", help="test images to attack; default: the run's setting")
    parser.add_argument("--data", metavar="PATH", help="where the data set lies now, if it was moved")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, …; auto: CUDA if there is any")
    options = parser.parse_args(arguments)
    try:
        run = Run.open(options.run)
        config = run.config()
        device = cli.pick_device(options.device)
        limit = config.attack_images if options.limit is None else options.limit
        if limit < 1:
            raise ValueError(f"--limit: expected at least 1, got {limit}")
        dataset = load(
            config.dataset,
            options.data or config.data,
            limit_train=config.limit_train,
            image_size=config.image_size,
        ).to(device)
        model, info = load_model(run.checkpoint, device)
        if info["model"]["num_classes"] != dataset.num_classes or info["data"] != dataset.fingerprint():
            raise ValueError(f"the data are not those that {options.run} was trained on")
        if (info["model"]["arch"], info["model"]["num_experts"]) != (config.arch, config.experts):
            raise ValueError(f"{run.checkpoint}: of another run: {info['model']}")
        if info["epoch"] < config.epochs:
            raise ValueError(
                f"{options.run}: stopped after {info['epoch']} of {config.epochs} epochs; "
                f"go on with: {run.resume_command}"
            )
        run.metrics()
    except (ValueError, ModuleNotFoundError) as error:
        raise cli.InputError(str(error)) from error
    evaluate_run(run, model, dataset, config, limit)


if __name__ == "__main__":
    cli.run_command(main)
