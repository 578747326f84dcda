"""Where each expert of a trained mixture looks in images of a user's: figures, and the numbers beside them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from immunity_fast.deployment.loading import WhichCheckpoint, load_trained
from immunity_fast.deployment.pictures import find_pictures, read_picture
from immunity_fast.models.moe import ImmunityMoE
from immunity_fast.reporting.heatmaps import heatmap_figure
from immunity_fast.runtime import cli
from immunity_fast.runtime.files import abbreviated, write_atomically
from immunity_fast.selection import mean_mixture

FOLDER = Path("explained")


def explain_named(
    run: Path,
    images: Sequence[Path],
    device: torch.device,
    *,
    out: Path | None = None,
    class_name: str | None = None,
    checkpoint: WhichCheckpoint | None = None,
    trust_code: bool = False,
) -> list[Path]:
    """Draw, for each image, where each expert and the mixture look, and say what each takes it for.

    Args:
        run: a run's folder, a checkpoint, or a folder that `save_pretrained` has written.
        images: files, and folders of such.
        device: where.
        out: the folder that is written to; None is `explained`.
        class_name: of the class that heatmaps are for, or its number; None is the one that the mixture predicts.
        checkpoint: of a run; None is the best, where there is one.
        trust_code: see `immunity_fast.load`.

    Returns:
        The figures' files; the numbers of each lie beside it, with the ending `.json`.

    Raises:
        ValueError, OSError, ModuleNotFoundError: what was given is wrong; one clear line.
    """
    files = find_pictures(images)
    model = load_trained(run, device=device, checkpoint=checkpoint, trust_code=trust_code)
    names = class_names(model)
    asked = None if class_name is None else _class_index(class_name, names)
    folder = FOLDER if out is None else out
    _check_apart(folder, files)
    folder.mkdir(parents=True, exist_ok=True)
    figures: list[Path] = []
    broken: list[ValueError] = []
    for file in files:
        try:
            image, done = read_picture(file, model.image_size, model.channels)
        except ValueError as error:  # of many images one must not cost the others
            broken.append(error)
            continue
        figure = _free(folder / f"{file.stem}.png", figures)
        found, heatmaps = explained(model, image.to(next(model.parameters()).device), asked)
        found = {"image": file.name, "prepared": done} | found
        _draw(image, heatmaps, found, figure)
        write_atomically(figure.with_suffix(".json"), json.dumps(found, indent=1, ensure_ascii=False).encode())
        best = found["mixture"]
        cli.console.print(f"{file}: {done}; {best['predicted']} {_percent(best['probability'])} → {figure}")
        figures.append(figure)
    if broken and len(files) == 1:
        raise broken[0]
    if broken:
        raise ValueError(
            f"images: expected all to be readable, got {len(broken)} of {len(files)} that are not; the others are in "
            f"{folder}; {broken[0]}"
        ) from broken[0]
    return figures


def explained(model: ImmunityMoE, image: Tensor, asked: int | None = None) -> tuple[dict[str, Any], Tensor]:
    """What a mixture and its experts take an image for, and where they look.

    Args:
        model: in evaluation mode.
        image: (C, H, W) in [0, 1], on the model's device.
        asked: the class that heatmaps are for; None is the one that the mixture predicts.

    Returns:
        (a JSON object: the class that heatmaps are for, the prediction of the mixture and of each expert with its
        probability, the probability of every class; heatmaps (N + 1, H, W), the last the mean of the experts', each
        scaled to a maximum of 1).
    """
    names = class_names(model)
    with torch.no_grad():
        logits = model.expert_logits(image[None])
        # In float64, and by the mean of what the gate draws.
        probabilities = logits.double().softmax(-1)[:, 0].cpu()
        mixture = mean_mixture(model.gate, logits.double()).exp()[0].cpu()
    target = int(mixture.argmax()) if asked is None else asked
    heatmaps = model.heatmaps(image[None], target, normalize=True)[:, 0].cpu()
    answers = [_answer(each, names, target) for each in (*probabilities, mixture)]
    for answer, heatmap in zip(answers, heatmaps, strict=False):
        answer["has_heatmap"] = bool(heatmap.max() > 0)
    found = {
        "class": names[target],
        "mixture": answers[-1],
        "experts": answers[:-1],
        "probabilities": dict(zip(names, mixture.tolist(), strict=True)),
    }
    return found, torch.cat([heatmaps, heatmaps.mean(0, keepdim=True)])


def class_names(model: ImmunityMoE) -> tuple[str, ...]:
    """The names of a model's classes; where nobody has named them, their numbers from 0."""
    return model.classes or tuple(str(number) for number in range(model.num_classes))


def _class_index(name: str, names: Sequence[str]) -> int:
    """Which class is meant by its name, or by its number.

    Raises:
        ValueError: none of the model's.
    """
    if name in names:
        return names.index(name)
    if name.isdecimal() and int(name) < len(names):
        return int(name)
    raise ValueError(
        f"--class: expected one of {abbreviated(list(names))}, or a number below {len(names)}, got {name!r}"
    )


def _answer(probabilities: Tensor, names: Sequence[str], target: int) -> dict[str, Any]:
    best = int(probabilities.argmax())
    return {
        "predicted": names[best],
        "probability": float(probabilities[best]),
        "probability_of_class": float(probabilities[target]),
    }


def _percent(probability: float) -> str:
    return f"{100 * probability:.1f} %"


def _draw(image: Tensor, heatmaps: Tensor, found: dict[str, Any], file: Path) -> None:
    answers = {f"expert {i}": answer for i, answer in enumerate(found["experts"], start=1)}
    if len(answers) == 1:  # which is the mixture
        answers, heatmaps = {}, heatmaps[:1]
    answers["network" if not answers else "mixture"] = found["mixture"]
    titles = ["input"]
    for name, answer in answers.items():
        lines = [name, f"{answer['predicted']} {_percent(answer['probability'])}"]
        if answer["predicted"] != found["class"]:
            lines.append(f"{found['class']} {_percent(answer['probability_of_class'])}")
        titles.append("\n".join(lines))
    label = f"{found['image']}\nheatmaps for: {found['class']}"
    heatmap_figure(image[None], heatmaps[:, None], [label], file, titles)


def _check_apart(folder: Path, files: Sequence[Path]) -> None:
    """Check that a folder to write to holds none of the images: a figure would take the place of one of its name.

    Raises:
        ValueError: it holds one.
    """
    for file in files:
        if file.resolve().parent == folder.resolve():
            raise ValueError(f"--out: expected another folder than that of {file}, got {folder}")


def _free(file: Path, taken: Sequence[Path]) -> Path:
    """A name that no other figure of this call has: two folders may hold images of one name."""
    number = 1
    free = file
    while free in taken:
        number += 1
        free = file.with_name(f"{file.stem}-{number}{file.suffix}")
    return free
