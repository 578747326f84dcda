"""The model card of a run: what it was trained on and how, and how far it withstood attacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from immunity_fast.models.card import model_card
from immunity_fast.models.moe import ImmunityMoE
from immunity_fast.runtime.files import parse_json

# What of a run's settings a reader of its card asks for; of some only where they are not None or off.
_SETTINGS = (
    ("epochs", "epochs", "{}"),
    ("batch_size", "images a step", "{}"),
    ("lr", "learning rate", "{:g}"),
    ("weight_decay", "weight decay", "{:g}"),
    ("alpha", "α, weight of the experts' own cross-entropies", "{:g}"),
    ("beta", "β, weight of the mutual-information loss", "{:g}"),
    ("gamma", "γ, weight of the position-stability loss", "{:g}"),
    ("ema", "average of the weights, decay", "{:g}"),
    ("seed", "seed", "{}"),
)
_MIXTURES = ("alpha", "beta", "gamma")


def run_card(folder: Path, model: ImmunityMoE, *, evaluated: bool = True) -> str:
    """A card of a run's model, from the settings and the results in its folder, as far as they are there.

    Args:
        folder: the run's.
        model: its model.
        evaluated: whether it is the checkpoint that the run's evaluation was of.
    """
    config = _json(folder / "config.json")
    results = _json(folder / "results.json")
    tables = folder / "results.md"
    accuracy = ""
    if evaluated and results and tables.is_file():
        accuracy = (
            "On images of the test split, which training did not see. Each attacked number says what the attacker knew "
            "of the gate (the second column), and each column what answers.\n\n"
            + tables.read_text(encoding="utf-8", errors="replace").strip()
        )
    return model_card(model, about=_about(config, single=model.num_experts == 1), accuracy=accuracy)


def _about(config: dict[str, Any], *, single: bool) -> dict[str, str]:
    """Rows of the card's table on data and training; nothing where the settings are not readable."""
    rows: dict[str, str] = {}
    if isinstance(config.get("dataset"), str):
        limit = config.get("limit_train")
        rows["data set"] = config["dataset"] + (f", {limit} images of it" if isinstance(limit, int) else "")
    poison = config.get("poison")
    if isinstance(poison, str):
        rows["poisoned training images"] = _poison(poison)
    adversarial = config.get("adversarial")
    if isinstance(adversarial, str):
        rows["adversarial training"] = _attack(adversarial, config)
    for name, title, form in _SETTINGS:
        value = config.get(name)
        if type(value) in (int, float) and not (single and name in _MIXTURES):
            rows[title] = form.format(value)
    return rows


def _poison(text: str) -> str:
    """What the settings say of poisons; of a file its name alone, not where it lies on somebody's machine."""
    try:
        from immunity_fast.data.poisoning import named  # not at the top: it needs NumPy, which loading does not

        found = named(text)
    except ValueError:
        return text
    return f"the poisons {found.name}" if isinstance(found, Path) else f"{found} ({text})"


def _attack(adversarial: str, config: dict[str, Any]) -> str:
    if adversarial == "off":
        return "none"
    eps, steps = config.get("eps"), config.get("attack_steps")
    radius = f", Linf, ε = {255 * eps:.3g}/255" if isinstance(eps, float) else ""
    return f"{adversarial}{radius}{f', {steps} steps' if isinstance(steps, int) else ''}"


def _json(file: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is no whole file of one: a card does without."""
    try:
        found = parse_json(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
