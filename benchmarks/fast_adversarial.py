"""Which single-step attack to train on: FGSM from a random start against N-FGSM, by what is left on validation images.

    python -m benchmarks.fast_adversarial --data cifar10.npz --out benchmarks/results/fast_adversarial_cpu.json

One ResNet8 a training, with the one-cycle schedule; after each epoch clean accuracy and accuracy under FGSM and PGD-10
of as many validation images, never of test images. A collapse shows as FGSM's accuracy far above PGD's. Trainings that
are in the record already are not done again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.record import header
from immunity_fast.runtime.files import write_atomically
from immunity_fast.training.config import TrainConfig
from immunity_fast.training.trainer import Trainer

METHODS = ("fgsm-rs", "n-fgsm")
RADII = (8, 16)  # of 255
SEEDS = (0, 1)
SEEN = ("val_accuracy_mean", "val_fgsm_accuracy_mean", "val_pgd10_accuracy_mean")


def trained(config: TrainConfig) -> dict[str, Any]:
    """Accuracies after each epoch of a training."""
    begin = time.monotonic()
    trainer = Trainer(config=config, progress=False)
    trainer.fit()
    return {
        "epochs": [{name: round(record[name], 4) for name in SEEN} for record in trainer.history],
        "seconds": round(time.monotonic() - begin, 1),
    }


def table(record: dict[str, Any]) -> str:
    """The record as Markdown: after the last epoch, mean over the seeds and half their range."""
    lines = ["| ε | trained on | clean | FGSM | PGD-10 | seeds |", "|---:|---|---:|---:|---:|---:|"]
    for eps, method in itertools.product(RADII, METHODS):
        runs = [run["epochs"][-1] for run in record["runs"] if (run["eps"], run["method"]) == (eps, method)]
        if not runs:
            continue
        cells = []
        for name in SEEN:
            values = [100 * run[name] for run in runs]
            spread = f" ± {(max(values) - min(values)) / 2:.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.1f}{spread}")
        lines.append(f"| {eps}/255 | {method} | {' | '.join(cells)} | {len(runs)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """The command `python -m benchmarks.fast_adversarial`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", required=True, help="CIFAR-10 as .npz, in MedMNIST's layout")
    parser.add_argument("--train-images", type=int, default=3000, help="training images (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=8, help="of each training (default: %(default)s)")
    parser.add_argument("--check-images", type=int, default=400, help="validation images (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    record: dict[str, Any] = header("python -m benchmarks.fast_adversarial")
    record |= {name: getattr(options, name) for name in ("train_images", "epochs", "check_images")} | {"runs": []}
    if options.out.is_file():
        before = json.loads(options.out.read_text(encoding="utf-8"))
        for name in ("train_images", "epochs", "check_images"):
            if before[name] != record[name]:
                raise SystemExit(f"error: {options.out}: expected {name} {record[name]}, got {before[name]}")
        record["runs"] = before["runs"]
    known = [(run["seed"], run["eps"], run["method"]) for run in record["runs"]]
    for seed, eps, method in itertools.product(SEEDS, RADII, METHODS):
        if (seed, eps, method) in known:
            continue
        config = TrainConfig(
            dataset="npz",
            data=options.data,
            flip="on",
            experts=1,
            limit_train=options.train_images,
            epochs=options.epochs,
            batch_size=64,
            lr=0.1,
            schedule="onecycle",
            adversarial=method,  # type: ignore[arg-type]
            eps=eps / 255,
            check_images=options.check_images,
            seed=seed,
            loggers="none",
        )
        record["runs"].append({"seed": seed, "eps": eps, "method": method} | trained(config))
        write_atomically(options.out, (json.dumps(record, indent=1) + "\n").encode())
        print(f"seed {seed}, {eps}/255, {method}: {record['runs'][-1]['epochs'][-1]}", flush=True)
    print(table(record))


if __name__ == "__main__":
    main()
