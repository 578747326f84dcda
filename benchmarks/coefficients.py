"""How the defaults of α, β and γ were chosen: short runs on a validation split, one record of all of them.

    python -m benchmarks.coefficients --data cifar10.npz --out benchmarks/results/coefficients_cpu.json

Each run trains 5 ResNet8 experts; what is recorded is the last epoch's line of metrics.jsonl, measured on validation
images. The test split is not used. Runs that the output file already holds are not repeated.
"""

import argparse
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch

from immunity_fast.runtime.files import write_atomically
from immunity_fast.training.config import TrainConfig
from immunity_fast.training.loop import train
from immunity_fast.training.preparation import prepare

GRID = (
    # α, β, γ: the plain mixture, mutual information alone, γ in steps of ten, then β and α around the best
    (1.0, 0.0, 0.0),
    (1.0, 1.0, 2e-5),
    (1.0, 1.0, 0.0),
    (1.0, 1.0, 2e-4),
    (1.0, 3.0, 2e-4),
    (0.1, 1.0, 2e-4),
)


def main() -> None:
    """The command `python -m benchmarks.coefficients`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", required=True, help="CIFAR-10 as an .npz file")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write, or to go on with")
    parser.add_argument("--limit-train", type=int, default=3000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    record: dict[str, Any] = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "runs": json.loads(options.out.read_text())["runs"] if options.out.is_file() else [],
    }
    for alpha, beta, gamma in GRID:
        settings: dict[str, Any] = {
            "limit_train": options.limit_train,
            "epochs": options.epochs,
            "lr": options.lr,
            "seed": options.seed,
            "alpha": alpha,
            "beta": beta,
            "gamma": gamma,
            "flip": "on",
            "check_images": 128,
        }
        if any(run["settings"] == settings for run in record["runs"]):
            continue
        config = TrainConfig(dataset="npz", data=options.data, **settings)
        with tempfile.TemporaryDirectory() as folder:
            trainer, run = prepare(Path(folder) / "run", False, config)
            train(trainer, run)
            record["runs"].append({"settings": settings, "last_epoch": run.metrics()[-1]})
        write_atomically(options.out, (json.dumps(record, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
