"""What poisons have done to a model: whether it is still right about clean images, and whether it does what they want.

Of a mixture the exact mean answers, and each expert alone; nothing here is random, and one pass finds all of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from immunity_fast.data.augmentation import as_float
from immunity_fast.data.datasets import AnySplit
from immunity_fast.data.poison_file import Poisons
from immunity_fast.data.poisoning import BadNets, Poison, triggered, words
from immunity_fast.data.sampling import EVALUATION_BATCH, batches
from immunity_fast.evaluation.targets import MixtureTarget, NetworkTarget, TargetModel
from immunity_fast.evaluation.words import JUDGES, find, percent, share
from immunity_fast.functional import log_mixture
from immunity_fast.reporting.html import Table

CLEAN, SUCCESS, RECOVERED = "clean", "attack success", "recovered"
HEADINGS = {CLEAN: "clean images", SUCCESS: "trigger: answered as the target", RECOVERED: "trigger: answered rightly"}


def measured(
    target: TargetModel, test: AnySplit, classes: Sequence[str], poison: Poison, found: Mapping[str, Any]
) -> dict[str, Any]:
    """What the poisons have done, as a JSON object:

    * what: in words;
    * accuracy: {measure, judge, correct, images, accuracy, interval (Wilson, 95 %)}: "clean" images; and with BadNets
      "attack success", test images of other classes than the target's that the trigger makes the target, and
      "recovered", those of them that are answered by their true class in spite of it;
    * target: of poisons that want one image to be classified wrongly, {judge, answer, name, probability (of the class
      that they want), true_probability (None where the true class is not known), fooled}; then also target_class,
      target_name and target_label.

    Args:
        target: in evaluation mode, on the images' device.
        test: the test split.
        classes: K names.
        poison: what the model was trained with.
        found: `results.results`, whose accuracies of clean images are taken.
    """
    names = [name for name in target.judges if name in ("mean", "output") or name.startswith("expert ")]
    clean = {name: find(found, "clean", None, name) for name in names}
    measures = [{"measure": CLEAN, "judge": name, **_counts(entry)} for name, entry in clean.items() if entry]
    result: dict[str, Any] = {"what": words(poison), "accuracy": measures}
    if isinstance(poison, BadNets):
        measures += _with_trigger(target, test, poison)
    if isinstance(poison, Poisons) and poison.target_image is not None and poison.target_class is not None:
        image = as_float(poison.target_image[None].to(test.labels.device))
        wanted, true = poison.target_class, poison.target_label
        result |= {"target_class": wanted, "target_name": classes[wanted], "target_label": true, "target": []}
        for name, probabilities in answers(target, image).items():
            answer = int(probabilities[0].argmax())
            result["target"].append(
                {
                    "judge": name,
                    "answer": answer,
                    "name": classes[answer],
                    "probability": float(probabilities[0, wanted]),
                    "true_probability": None if true is None else float(probabilities[0, true]),
                    "fooled": answer == wanted,
                }
            )
    return result


def answers(target: TargetModel, images: Tensor) -> dict[str, Tensor]:
    """The probabilities (B, K) by which each judge answers that is not random.

    Args:
        target: in evaluation mode.
        images: (B, C, H, W) in [0, 1].
    """
    with torch.no_grad():
        if isinstance(target, MixtureTarget):
            logits = target.expert_logits(images)
            experts = {f"expert {number + 1}": each.softmax(-1) for number, each in enumerate(logits)}
            return {"mean": log_mixture(logits).exp(), **experts}
        assert isinstance(target, NetworkTarget)
        return {"output": F.softmax(target.outputs(images), -1)}


def _with_trigger(target: TargetModel, test: AnySplit, poison: BadNets) -> list[dict[str, Any]]:
    """How many images of other classes the trigger makes the target, and how many are answered rightly with it."""
    bits: dict[tuple[str, str], list[bool]] = {}
    for images, labels in batches(test, EVALUATION_BATCH):
        others = labels != poison.target
        for name, probabilities in answers(target, triggered(images, poison.size)).items():
            answer = probabilities.argmax(-1)
            for measure, fits in ((SUCCESS, answer == poison.target), (RECOVERED, answer == labels)):
                bits.setdefault((measure, name), []).extend(fits[others].tolist())
    return [
        {"measure": measure, "judge": name, **share(bits[measure, name])}
        for measure in (SUCCESS, RECOVERED)
        for kind, name in bits
        if kind == measure and bits[kind, name]  # or all images are of the target's class
    ]


def _counts(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: entry[name] for name in ("correct", "images", "accuracy", "interval")}


def _called(judge: str) -> str:
    return "the network" if judge == "output" else JUDGES.get(judge, judge)


def poison_table(found: Mapping[str, Any]) -> Iterable[Table]:
    """The table of what `measured` has found; none of a model whose training images were clean."""
    poison = found.get("poison")
    if poison is None:
        return
    cells = {(entry["measure"], entry["judge"]): entry for entry in poison["accuracy"]}
    targets = {entry["judge"]: entry for entry in poison.get("target", [])}
    measures = [measure for measure in HEADINGS if any(kind == measure for kind, _ in cells)]
    headings = ["what answers", *(f"{HEADINGS[measure]}, %" for measure in measures)]
    if targets:
        headings += ["target image answered as", f"probability of {poison['target_name']}, which is wanted"]
    rows = []
    for name in dict.fromkeys(name for _, name in cells):
        row = [_called(name), *(percent(cells.get((measure, name))) for measure in measures)]
        if targets:
            row += [targets[name]["name"], f"{targets[name]['probability']:.3f}"]
        rows.append(row)
    note = f"The training data were poisoned: {poison['what']}. ± is half the 95 % Wilson interval."
    if SUCCESS in measures:
        note += " The trigger is put into test images of all classes but the target's."
    yield Table("After poisoned training", headings, rows, note)


def poison_facts(found: Mapping[str, Any]) -> dict[str, str]:
    """What a report says first of it: by the mean, or by the one network that there is."""
    poison = found.get("poison", {})
    facts = {
        f"{HEADINGS[entry['measure']]}, {_called(entry['judge'])}": f"{percent(entry)} %"
        for entry in poison.get("accuracy", [])
        if entry["measure"] != CLEAN and entry["judge"] in JUDGES
    }
    for entry in poison.get("target", []):
        if entry["judge"] in JUDGES:
            told = f"{entry['name']}, {'as' if entry['fooled'] else 'not as'} the poisons want"
            facts[f"target image answered as, {_called(entry['judge'])}"] = told
    return facts
