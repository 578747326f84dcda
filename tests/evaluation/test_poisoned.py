"""What poisons have done to a model: counted one image after the other, by a model whose answers are known."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from immunity_fast.data.datasets import Split
from immunity_fast.data.poison_file import Poisons
from immunity_fast.data.poisoning import BadNets, LabelFlip
from immunity_fast.evaluation.metrics import wilson_interval
from immunity_fast.evaluation.poisoned import measured, poison_facts, poison_table
from immunity_fast.evaluation.targets import MixtureTarget, NetworkTarget
from tests.adversarial_cases import small_mixture

COUNT, CLASSES, TARGET = 261, 4, 2  # more than are looked at at once
CLEAN = {
    "attack": "clean",
    "attacker": None,
    "correct": 200,
    "images": COUNT,
    "accuracy": 200 / COUNT,
    "interval": [0, 1],
}


def _split() -> Split:
    images = torch.randint(200, (COUNT, 1, 6, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Split(images, torch.arange(COUNT) % CLASSES)


def _answer(image: Tensor) -> int:
    """A backdoor that works on dark images; else the first pixel says the class, seldom the true one."""
    marked = bool((image[0, 3:, 3:] == 1).all()) and bool(image[0, 2, 5] < 1)
    return TARGET if marked and float(image[0, 0, 1]) < 0.3 else int(255 * image[0, 0, 0] + 0.5) % CLASSES


def _model(images: Tensor) -> Tensor:
    return 5.0 * torch.eye(CLASSES)[[_answer(image) for image in images]]


def test_the_trigger_s_success_is_counted() -> None:
    split, found = _split(), {"accuracy": [CLEAN | {"judge": "output"}]}
    result = measured(NetworkTarget(_model, CLASSES), split, "abcd", BadNets(0.1, TARGET), found)
    success = recovered = others = 0
    for image, label in zip(split.images, split.labels.tolist(), strict=True):
        if label == TARGET:
            continue
        marked = image / 255
        for y, x in itertools.product(range(3, 6), repeat=2):
            marked[0, y, x] = 1.0
        others, answer = others + 1, _answer(marked)
        success, recovered = success + (answer == TARGET), recovered + (answer == label)
    assert 0 < recovered < success < others < COUNT
    got = {entry["measure"]: entry for entry in result["accuracy"]}
    assert got["clean"]["correct"] == 200
    for measure, count in (("attack success", success), ("recovered", recovered)):
        assert (got[measure]["correct"], got[measure]["images"]) == (count, others)
        assert got[measure]["interval"] == list(wilson_interval(count, others))
    (table,) = poison_table({"poison": result})
    assert table.rows[0][0] == "the network"
    assert f"{100 * success / others:.1f} ± " in table.rows[0][2]
    assert len(poison_facts({"poison": result})) == 2


def test_a_mixture_answers_by_its_mean_and_each_expert() -> None:
    model = small_mixture(dtype=torch.float32).eval()
    classes = model.num_classes
    image = torch.rand(1, *(3, *model.image_size), generator=torch.Generator().manual_seed(0))
    poison = Poisons(torch.tensor([0]), image, None, None, image[0], 0, 1)
    split = Split((255 * image).to(torch.uint8), torch.tensor([0]))
    found: dict[str, Any] = {"accuracy": []}
    result = measured(MixtureTarget(model, classes), split, "abcdefgh"[:classes], poison, found)
    with torch.no_grad():
        experts = [expert.eval()(image).double().softmax(-1)[0] for expert in model.unstack()]
    expected = [torch.stack(experts).mean(0), *experts]
    assert [entry["judge"] for entry in result["target"]] == ["mean", *(f"expert {i + 1}" for i in range(len(experts)))]
    for entry, shares in zip(result["target"], expected, strict=True):
        assert entry["answer"] == int(shares.argmax())
        assert entry["name"] == "abcdefgh"[entry["answer"]]
        assert entry["fooled"] == (int(shares.argmax()) == 1)
        assert [entry["probability"], entry["true_probability"]] == pytest.approx(shares[[1, 0]].tolist(), rel=1e-4)


def test_flipped_labels_are_seen_on_clean_images_alone() -> None:
    found = {"accuracy": [CLEAN | {"judge": "output"}]}
    result = measured(NetworkTarget(_model, CLASSES), _split(), "abcd", LabelFlip(0.2), found)
    assert [entry["measure"] for entry in result["accuracy"]] == ["clean"]
    (table,) = poison_table({"poison": result})
    assert "20 % of the labels flipped to another class" in table.note
    assert not list(poison_table({}))
    assert poison_facts({}) == {}


def test_images_of_the_target_alone_say_nothing_of_the_trigger() -> None:
    split = Split(_split().images, torch.full((COUNT,), TARGET))
    result = measured(NetworkTarget(_model, CLASSES), split, "abcd", BadNets(0.1, TARGET), {"accuracy": []})
    assert result["accuracy"] == []
