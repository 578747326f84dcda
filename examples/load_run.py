"""A model back from a run: load it, ask it, see where its experts look, hand it on.

    pip install '.[train]'
    python examples/load_run.py [RUN]

Without a run it trains a small one first, on scikit-learn's digits for one epoch: seconds. What it writes lies in
`load_run/`.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

import immunity_fast
from immunity_fast import ImmunityMoE, explain, train

OUT = Path("load_run")


def trained() -> Path:
    """The folder of a small run on digits of 16×16 pixels, trained where it is not there yet."""
    run, data = OUT / "run", OUT / "digits.npz"
    if (run / "report.html").is_file():
        return run
    digits = load_digits()
    images = (digits.images * 15.9).astype("uint8").repeat(2, 1).repeat(2, 2)
    parts = {"train": slice(200), "val": slice(200, 220), "test": slice(220, 250)}
    arrays = {f"{part}_images": images[where] for part, where in parts.items()}
    arrays |= {f"{part}_labels": digits.target[where] for part, where in parts.items()}
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    np.savez(data, classes=names, **arrays)
    options = f"--dataset npz --data {data} --experts 2 --epochs 1 --check-images 0 --attack-images 4 --device cpu"
    train.main([*options.split(), "--out", str(run)])
    return run


def photograph() -> Path:
    """A digit as an image file, larger than the model's images."""
    digit = Image.fromarray((load_digits().images[7] * 15.9).astype("uint8"))
    file = OUT / "digit.png"
    digit.resize((200, 160)).save(file)
    return file


def main() -> None:
    OUT.mkdir(exist_ok=True)
    run = Path(sys.argv[1]) if len(sys.argv) > 1 else trained()

    model = immunity_fast.load(run)  # the one line
    print(
        f"{model.num_experts} experts of {model.arch}, images of {model.image_size}, classes {', '.join(model.classes)}"
    )

    images = torch.rand(2, model.channels, *model.image_size)
    log_probabilities = model(images)  # the gate's exact mean: the same every time
    print("predicted:", ", ".join(model.classes[index] for index in log_probabilities.argmax(-1)))

    heatmaps = model.heatmaps(images, normalize=True)  # of the class that the mixture predicts
    for number, (row, column) in enumerate(divmod(int(each[0].argmax()), each.shape[-1]) for each in heatmaps):
        print(f"expert {number + 1} looks most at row {row}, column {column} of the first image")

    explain.main([str(run), str(photograph()), "--out", str(OUT / "explained"), "--device", "cpu"])

    model.save_pretrained(OUT / "saved")  # or model.push_to_hub("user/name")
    same = ImmunityMoE.from_pretrained(OUT / "saved")
    print("back from its folder to the same bits:", bool(torch.equal(same(images), log_probabilities)))


if __name__ == "__main__":
    main()
