"""What an evaluation writes: results.json, tables as Markdown and CSV, figures, report.html."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from immunity_fast.data.augmentation import as_float
from immunity_fast.data.datasets import ImageDataset
from immunity_fast.data.poisoning import Poison
from immunity_fast.data.sampling import sample
from immunity_fast.evaluation.metrics import expert_maps
from immunity_fast.evaluation.poisoned import measured, poison_facts
from immunity_fast.evaluation.results import Results, results, tables, to_csv
from immunity_fast.evaluation.runner import Evaluation
from immunity_fast.evaluation.targets import MixtureTarget
from immunity_fast.evaluation.words import find, percent
from immunity_fast.losses import FusedImmunityLoss
from immunity_fast.reporting.curves import robustness_figure, training_curves
from immunity_fast.reporting.heatmaps import attacked_heatmap_figure, heatmap_figure
from immunity_fast.reporting.html import Table, write_report
from immunity_fast.runtime.compilation import TRACEBACKS
from immunity_fast.runtime.files import write_atomically
from immunity_fast.runtime.modes import frozen

FIGURE_ROWS = 6


@dataclass
class Outputs:
    """The files that an evaluation writes in a folder."""

    folder: Path

    def __post_init__(self) -> None:
        self.results = self.folder / "results.json"
        self.ledger = self.folder / "evaluation.jsonl"
        self.markdown = self.folder / "results.md"
        self.csv = self.folder / "results.csv"
        self.report = self.folder / "report.html"
        self.figures = self.folder / "figures"
        self.tracebacks = self.folder / TRACEBACKS


@dataclass
class About:
    """What a report says of the network besides its results; `poison` is what its training images had."""

    title: str
    lead: str
    settings: dict[str, Any]
    commands: dict[str, str]
    records: Sequence[dict[str, Any]] = ()
    poison: Poison | None = None


def write(evaluation: Evaluation, dataset: ImageDataset, outputs: Outputs, about: About) -> tuple[Results, list[Table]]:
    """Write results.json, the tables, the figures and the report.

    Args:
        evaluation: finished.
        dataset: for images and the names of classes.
        outputs: where; the folder of figures is there.
        about: for the report.

    Returns:
        (`results.results`, its tables).
    """
    found = results(evaluation)
    if about.poison is not None:
        found["poison"] = measured(evaluation.target, dataset.test, dataset.classes, about.poison, found)
    shown = tables(found)
    write_atomically(outputs.results, json.dumps(found, indent=1).encode())
    write_atomically(outputs.markdown, ("\n\n".join(table.to_markdown() for table in shown) + "\n").encode())
    write_atomically(outputs.csv, to_csv(found).encode())
    write_report(
        outputs.report,
        title=about.title,
        lead=about.lead,
        facts=_facts(evaluation, found),
        tables=shown,
        figures=_figures(evaluation, found, dataset, outputs, about),
        commands=about.commands,
        settings=about.settings | {f"evaluation: {name}": value for name, value in found["plan"].items()},
    )
    found.report = outputs.report
    return found, shown


def _facts(evaluation: Evaluation, found: dict[str, Any]) -> dict[str, str]:
    judge, exact = evaluation.target.judges[0], evaluation.target.exact
    answers = ", gate sample" if judge == "sample" else ""
    wanted: dict[str, tuple[str, str | None, str]] = {"test accuracy" + answers: ("clean", None, judge)}
    if judge == "sample":
        wanted["test accuracy, gate mean"] = ("clean", None, "mean")
        wanted["PGD-20 on gate sample, answered by gate sample"] = ("pgd", "sample", "sample")
    wanted[f"PGD-20 on gate mean, answered by gate {judge}" if exact == "mean" else "PGD-20"] = ("pgd", exact, judge)
    entries = {title: find(found, *place) for title, place in wanted.items()}
    facts = {title: f"{percent(entry)} %" for title, entry in entries.items() if entry is not None}
    for entry in found["worst_case"]:
        if entry["judge"] == judge:
            facts["worst case over all attacks" + answers] = f"{percent(entry)} %"
    facts |= poison_facts(found)
    if "clean" in found.get("heatmaps", {}):
        facts["mutual information of expert and position"] = (
            f"{found['heatmaps']['clean']['mutual_information']:.2f} nats"
        )
    if found["masking"]:
        passed = sum(check["passed"] for check in found["masking"])
        facts["checks for gradient masking passed"] = f"{passed} of {len(found['masking'])}"
    return facts


def _figures(
    evaluation: Evaluation, found: dict[str, Any], dataset: ImageDataset, outputs: Outputs, about: About
) -> list[tuple[Path, str]]:
    figures = []
    if isinstance(evaluation.target, MixtureTarget) and evaluation.loss_fn is not None:
        figures += _heatmap_figures(evaluation, evaluation.target, dataset, outputs)
    curves = found["curves"]
    if any(curves.values()):
        path = outputs.figures / "robustness.png"
        name = "gate mean" if evaluation.target.exact == "mean" else "accuracy"
        random = "gate sample" if evaluation.target.exact == "mean" else "accuracy"
        draws = {random: curves["draws"]} if curves["draws"] else {}
        robustness_figure({name: curves["eps"]}, {name: curves["steps"]}, path, accuracy_by_draws=draws)
        figures.append(
            (
                path,
                "PGD on the exact attacker's objective: accuracy falls to 0 as ε grows, and loss rises with steps, "
                "unless gradients are masked. The band is the 95 % Wilson interval."
                + (" Accuracy against draws is the expectation of what answers at random." if draws else ""),
            )
        )
    if about.records:
        path = outputs.figures / "curves.png"
        training_curves(about.records, path)
        figures.append((path, "Training: loss, accuracy and diversity after each epoch."))
    return figures


def _heatmap_figures(
    evaluation: Evaluation, target: MixtureTarget, dataset: ImageDataset, outputs: Outputs
) -> list[tuple[Path, str]]:
    loss_fn = evaluation.loss_fn
    assert loss_fn is not None
    shown = sample(dataset.test, FIGURE_ROWS)
    images, names = as_float(shown.images), dataset.classes
    pgd = [row for row in evaluation.rows if row.kind == "attack" and evaluation.has_heatmaps(row)]
    heatmaps, clean_labels = _looked_at(target, loss_fn, images, shown.labels, names)
    path = outputs.figures / "heatmaps.png"
    caption = (
        "Where each expert looks: its Grad-CAM heatmap for the true class on test images (true class → class predicted "
        "by the mean of the experts), each scaled by its own maximum"
    )
    if not pgd:
        heatmap_figure(images, heatmaps, clean_labels, path)
        return [(path, f"{caption}.")]
    with frozen(target.model):
        attacked = evaluation.attacked(pgd[0], images, shown.labels, evaluation.plan.seed)
    attacked_heatmaps, attacked_labels = _looked_at(target, loss_fn, attacked, shown.labels, names)
    labels = list(zip(clean_labels, attacked_labels, strict=True))
    attacked_heatmap_figure(images, attacked, heatmaps, attacked_heatmaps, labels, path)
    return [(path, f"{caption}; beneath each image the same under PGD-20 on gate mean.")]


def _looked_at(
    target: MixtureTarget, loss_fn: FusedImmunityLoss, images: Tensor, labels: Tensor, names: Sequence[str]
) -> tuple[Tensor, list[str]]:
    heatmaps, _ = expert_maps(target.model, loss_fn, images, labels)
    with torch.no_grad(), target.model.gate.switched("mean"):
        predicted = target.model(images).argmax(-1).tolist()
    return heatmaps, [f"{names[t]} → {names[p]}" for t, p in zip(labels.tolist(), predicted, strict=True)]
