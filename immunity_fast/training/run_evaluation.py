"""The evaluation of a training run's model on the test split of its data."""

import dataclasses
from typing import Any

import torch

from immunity_fast.data.datasets import ImageDataset
from immunity_fast.evaluation.pipeline import evaluate
from immunity_fast.evaluation.report import About, Outputs
from immunity_fast.evaluation.runner import CLEAN_CHUNK, SETS, Plan
from immunity_fast.evaluation.targets import Mixture, Network, Subject
from immunity_fast.experts import title
from immunity_fast.models.modes import frozen
from immunity_fast.models.moe import ExactMean, ImmunityMoE
from immunity_fast.runtime import cli
from immunity_fast.runtime.compilation import Compile, Compiled, at_size
from immunity_fast.training.checkpoint import load_model
from immunity_fast.training.config import TrainConfig
from immunity_fast.training.run_folder import Run
from immunity_fast.training.trainer import Trainer

CHUNK = {"cpu": 50, "cuda": 250}  # images at once

# What a training run ends with: minutes on a CPU. The command finds out more.
AFTER_TRAINING = Plan(
    attacks=SETS["quick"],
    attackers=("single", "mean"),
    masking_images=32,
    curve_eps=(0.25, 1, 4, 32),
    curve_steps=(1, 5, 20),
)


def evaluate_run(
    run: Run,
    model: ImmunityMoE,
    dataset: ImageDataset,
    config: TrainConfig,
    plan: Plan,
    outputs: Outputs | None = None,
    *,
    draws: int = 20,
    transfer: ImmunityMoE | None = None,
    compile: Compile = "off",
) -> dict[str, Any]:
    """Evaluate the model of a training run, in evaluation mode, on its data set's test split.

    Writes into the run's folder, or `outputs`. `transfer`: an independently trained model, attacked for its images.
    """
    outputs = outputs or Outputs(run.folder)
    other = None if transfer is None else ExactMean(transfer)
    single = model.num_experts == 1
    if single:
        subject: Subject = Network(ExactMean(model), dataset.num_classes, transfer=other)
        what = title(config.arch)
    else:
        # One compiled function for all attacks and attackers: what each makes of the experts' logits is little.
        device = next(model.parameters()).device
        logits = Compiled(model.expert_logits, compile, device, cli.console.print, outputs.tracebacks)
        size = max(plan.chunk, CLEAN_CHUNK)
        subject = Mixture(
            model,
            dataset.num_classes,
            draws=draws,
            transfer=other,
            expert_logits=(lambda images: at_size(logits, images, size)) if logits.active else None,
        )
        what = f"{config.experts} × {title(config.arch)}"
    trained = "" if config.adversarial == "off" else f", adversarially ({config.adversarial})"
    weights = (
        ""
        if single
        else f" α\u00a0=\u00a0{config.alpha:g}, β\u00a0=\u00a0{config.beta:g}, γ\u00a0=\u00a0{config.gamma:g}."
    )
    about = About(
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
    )
    loss_fn = None if single else config.loss_fn(dataset.image_size)
    with frozen(model):
        return evaluate(subject, dataset, plan, outputs, about, loss_fn)


def evaluate_trained(trainer: Trainer, run: Run) -> None:
    """What a run ends with: attacks on test images, tables, figures and the report."""
    config = trainer.config
    model, _ = load_model(run.folder, trainer.device)  # the best one, or the average of the weights, if there is
    plan = dataclasses.replace(
        AFTER_TRAINING, images=config.attack_images, seed=config.seed, chunk=chunk_of(trainer.device)
    )
    if config.experts == 1:  # nothing about a gate to know
        plan = dataclasses.replace(plan, attackers=None)
    evaluate_run(run, model, trainer.dataset, config, plan, compile=config.compile)


def chunk_of(device: torch.device) -> int:
    """How many images are attacked at once."""
    return CHUNK.get(device.type, CHUNK["cuda"])
