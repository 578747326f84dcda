"""A mixture of two networks that are none of ours, one of torchvision and one of timm, from weights of a file.

    pip install '.[train]' timm
    python examples/any_network.py

It makes a tiny data set in MedMNIST's layout and a state dict, as a pretrained network would come; then it does what
`python -m immunity_fast.train` does, for a few steps, and takes the mixture back from the run. Every file lies in a
temporary folder, and nothing is downloaded.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

from immunity_fast import train
from immunity_fast.experts import create
from immunity_fast.training.checkpoint import load_model
from immunity_fast.training.loop import train as take_all_steps
from immunity_fast.training.preparation import prepare
from immunity_fast.training.session import say_what_is_trained

CLASSES, SIDE = 3, 32
ARCHS = "torchvision:squeezenet1_1,timm:test_resnet"


def make_data(file: Path) -> None:
    """Noise, in which one colour, the class, is brighter."""
    random = np.random.default_rng(0)
    made = {}
    for part, count in (("train", 32), ("val", 8), ("test", 8)):
        labels = random.integers(0, CLASSES, count)
        images = random.integers(0, 200, (count, SIDE, SIDE, 3), dtype=np.uint8)
        images[np.arange(count), :, :, labels] += 50
        made |= {f"{part}_images": images, f"{part}_labels": labels}
    np.savez(file, **made)


def main() -> None:
    """Train three experts of two architectures, each architecture from a file."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        make_data(place / "colours.npz")
        # As somebody's pretrained network: for other classes, and saved from inside of DataParallel.
        torch.manual_seed(0)
        names = ARCHS.split(",")
        for name in names:
            state = create(name, num_classes=10).state_dict()
            torch.save(
                {"state_dict": {f"module.{key}": value for key, value in state.items()}}, place / f"{name[:4]}.pth"
            )
        options = {
            "dataset": "npz",
            "data": place / "colours.npz",
            "arch": ARCHS,
            "experts": 3,
            "weights": ",".join(str(place / f"{name[:4]}.pth") for name in names),
            "epochs": 1,
            "batch-size": 16,
            "check-images": 0,
            "device": "cpu",
            "out": place / "run",
        }
        words = [str(word) for option, value in options.items() for word in (f"--{option}", value)]
        # `train.main(words)` is the command, which goes on with attacks and a report.
        trainer, run = prepare(*train.parse(words))
        say_what_is_trained(trainer, run)
        take_all_steps(trainer, run)

        model, info = load_model(run.folder)
        images = torch.rand(2, 3, SIDE, SIDE)
        with torch.no_grad():
            logits, maps, gate = model.expert_outputs(images)
        print(f"from the run: {info['model']['arch']}, logits {tuple(logits.shape)}, gate {tuple(gate.shape)}")
        print(f"maps {[tuple(own.shape[1:]) for own in maps]}")


if __name__ == "__main__":
    argparse.ArgumentParser(description="A mixture of torchvision's and timm's networks, from weights.").parse_args()
    main()
