"""The model card: what somebody who finds a saved mixture has to know of it, as Hugging Face's hub shows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from immunity_fast.experts import title

PLACE = "PLACE"
"""What stands in a card for where the model is, which nobody knows of a folder that is to be moved."""

_HEAD = """\
---
library_name: immunity_fast
pipeline_tag: image-classification
license: unknown
tags:
- mixture-of-experts
- adversarial-robustness
- grad-cam
- arxiv:2402.18787
---
"""

_LOAD = """\
```python
from immunity_fast import ImmunityMoE

model = ImmunityMoE.from_pretrained("PLACE"{trust})  # this folder, or its repository on the hub
log_probabilities = model(images)  # (B, {classes}), of images (B, {channels}, {height}, {width}) in [0, 1]
heatmaps = model.heatmaps(images)  # where each expert looks
```

`immunity_fast.load("PLACE"{trust})` gives the same with the gate's exact mean, which answers the same every time."""

_LIMITS = """\
* It answers for images like those it was trained on, of {height}×{width} pixels, and names one of its classes for any
  other image, too.
* A random gate is no defence by itself: whoever attacks the mean of what it draws (`model.gate.switch = "mean"`)
  attacks what it answers on average. Judge it by attacks that know the gate.
* Accuracies under attack are upper bounds: a stronger attack can only lower them.
* Heatmaps show where an expert's answer comes from, not whether it is right."""


def model_card(model: Any, *, about: Mapping[str, str] | None = None, accuracy: str = "") -> str:
    """A card in Markdown, with the hub's metadata at its head.

    Args:
        model: an `ImmunityMoE`.
        about: more rows of the table: what → the value.
        accuracy: a section in Markdown; without it the card says that nothing was measured.
    """
    height, width = model.image_size
    shape = {"height": height, "width": width, "channels": model.channels, "classes": model.num_classes}
    stage = model.stage if isinstance(model.stage, str) else ", ".join(model.stage)
    single = model.num_experts == 1
    rows = {
        "architecture": _architecture(model),
        "images": f"{model.channels} × {height} × {width}, in [0, 1]; normalisation is inside",
        "classes": _classes(model),
        "Grad-CAM looks at": stage,
        **({} if single else {"gate in evaluation": f"`{model.gate.switch}`"}),
        **({} if model.noise is None else {"noise before each convolution": _noise(*model.noise)}),
        **(about or {}),
    }
    what = "A network" if single else f"A mixture of {model.num_experts} experts"
    table = ["| what | |", "|---|---|", *(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items())]
    trust = ", trust_code=True" if ":" in model.arch.replace("timm:", "").replace("torchvision:", "") else ""
    parts = [
        f"{_HEAD}\n# {what}, made with immunity_fast",
        'Of the kind of *Enhancing the "Immunity" of Mixture-of-Experts Networks for Adversarial Defense* '
        "([arXiv 2402.18787](https://arxiv.org/abs/2402.18787)).",
        "\n".join(table),
        "## Loading it",
        _LOAD.format(trust=trust, **shape),
        "## Accuracy",
        accuracy or "Nothing was measured, or what was is not here.",
        "## Limits",
        _LIMITS.format(**shape),
        "## Licence",
        "Not stated. Whoever publishes this model names its licence here and in the head of this file, once it is seen "
        "to fit the data that it was trained on.",
    ]
    return "\n\n".join(parts) + "\n"


def _architecture(model: Any) -> str:
    return title(model.arch, model.num_experts) if model.arch else f"{model.num_experts} networks of the user's own"


def _noise(first: float, inner: float) -> str:
    return f"standard deviation {first:g} before the first, {inner:g} before the others; no two answers are the same"


def _classes(model: Any) -> str:
    if model.classes is None:
        return str(model.num_classes)
    shown = ", ".join(model.classes[:20])
    more = "" if model.num_classes <= 20 else ", …"
    return f"{model.num_classes}: {shown}{more}"


def _cell(text: str) -> str:
    return " ".join(str(text).split()).replace("|", r"\|")
