"""`immunity_fast.load`: a run's model as it was evaluated, and one line where there is none."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import immunity_fast
from immunity_fast import ImmunityMoE
from immunity_fast.data.datasets import load as load_data
from immunity_fast.models.moe import SingleNetwork
from immunity_fast.training import checkpoint
from immunity_fast.training.checkpoint import BEST, LAST, load_checkpoint, save_checkpoint
from immunity_fast.training.run_folder import Run
from tests.places import REPOSITORY
from tests.small_runs import CLASSES, change_config, options, trained, write_data

NAMES = ["red", "green | blue", "ÿ"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with named classes, trained to its end; what an evaluation would write is in it."""
    folder = tmp_path_factory.mktemp("runs")
    data = write_data(folder / "data.npz", classes=NAMES)
    trained([*options(data, check_images=6), "--out", str(folder / "run")])
    Run(folder / "run").results_file.write_text(json.dumps({"accuracy": [], "worst_case": []}), encoding="utf-8")
    (folder / "run" / "results.md").write_text("| PGD-20 | gate mean | 41.0 |", encoding="utf-8")
    return folder / "run"


@pytest.fixture(autouse=True)
def nothing_is_warned_of() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def test_it_is_the_model_of_the_checkpoint_ready_to_answer(run: Path) -> None:
    model = immunity_fast.load(run)
    assert type(model) is ImmunityMoE
    assert not any(module.training for module in model.modules())
    assert model.classes == tuple(NAMES)
    assert (model.image_size, model.num_classes, model.num_experts) == ((12, 12), CLASSES, 2)
    tensors, _ = load_checkpoint(run / LAST)
    assert model.stage == "layer1"  # whose map is the last above 8×8
    own = model.state_dict()
    assert {f"model/{name}" for name in own} == {name for name in tensors if name.startswith("model/")}
    assert all(torch.equal(tensor, tensors[f"model/{name}"]) for name, tensor in own.items())
    images = load_data("npz", str(run.parent / "data.npz")).test.images.float() / 255
    experts = torch.stack([expert.eval()(images) for expert in model.unstack()])
    expected = experts.double().softmax(-1).mean(0).log()
    assert model.gate.switch == "mean"
    assert torch.allclose(model(images).double(), expected, atol=1e-5)
    assert torch.equal(model(images), model(images))


def test_a_checkpoint_alone_will_do(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.safetensors"
    file.write_bytes((run / LAST).read_bytes())
    one, other = immunity_fast.load(file), immunity_fast.load(str(run))
    assert all(torch.equal(one.state_dict()[name], tensor) for name, tensor in other.state_dict().items())
    assert one.classes == tuple(NAMES)


def test_of_two_checkpoints_the_best_is_taken_unless_asked(copied: Path) -> None:
    tensors, info = load_checkpoint(copied / LAST)
    model = {name: tensor for name, tensor in tensors.items() if name.startswith("model/")}
    model["model/gate.network.0.bias"] = torch.full((16,), 7.0)
    save_checkpoint(copied / BEST, model, info)
    for asked, value in ((None, 7.0), ("best", 7.0), ("last", None)):
        bias = immunity_fast.load(copied, checkpoint=asked).gate.network[0].bias  # type: ignore[arg-type, index]
        assert bool((bias == 7).all()) == (value is not None)
    assert "41.0" in (immunity_fast.load(copied).card or "")
    assert "41.0" not in (immunity_fast.load(copied, checkpoint="last").card or ""), "which was not what was evaluated"


def test_what_is_no_run_is_said_in_one_line(run: Path, copied: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere: there is no such run$"):
        immunity_fast.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"there is no run \(no config.json\) in this folder$"):
        immunity_fast.load(tmp_path)
    with pytest.raises(ValueError, match="checkpoint: expected 'best', 'last' or None, got 'first'"):
        immunity_fast.load(run, checkpoint="first")  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"best.safetensors: there is no such checkpoint"):
        immunity_fast.load(run, checkpoint="best")
    file = copied / LAST
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        immunity_fast.load(copied)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="this run has no checkpoint yet; train it first"):
        immunity_fast.load(copied)
    other = tmp_path / "notes.txt"
    other.write_text("x", encoding="utf-8")
    with pytest.raises(ValueError, match=r"notes.txt: not a whole checkpoint"):
        immunity_fast.load(other)


def test_a_run_that_stopped_is_loaded_with_a_warning(copied: Path) -> None:
    change_config(copied, epochs=9)
    with pytest.warns(UserWarning, match="this run stopped after 2 of 9 epochs; .* goes on with it") as caught:
        immunity_fast.load(copied)
    assert caught[0].filename == __file__, "the line that loads it is what is warned of"


def test_weights_that_are_no_numbers_are_refused(copied: Path) -> None:
    tensors, info = load_checkpoint(copied / LAST)
    tensors["model/experts.classifier.1.bias"][0, 0] = torch.nan
    save_checkpoint(copied / LAST, tensors, info)
    with pytest.raises(ValueError, match=r"expected finite weights, got .* \(experts.classifier.1.bias\)"):
        immunity_fast.load(copied)


def test_averaged_weights_are_the_model(copied: Path) -> None:
    tensors, info = load_checkpoint(copied / LAST)
    average = {f"ema/{name[6:]}": tensor + 1 for name, tensor in tensors.items() if name.startswith("model/")}
    save_checkpoint(copied / LAST, tensors | average, info)
    found = immunity_fast.load(copied).state_dict()
    assert all(torch.equal(found[name[4:]], tensor) for name, tensor in average.items())


def test_a_run_of_one_network_is_one(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data.npz")
    trained([*options(data, experts=1, epochs=1), "--out", str(tmp_path / "run")])
    model = immunity_fast.load(tmp_path / "run")
    assert isinstance(model, SingleNetwork)
    assert "A network, made with immunity_fast" in (model.card or "")
    assert "mutual-information" not in (model.card or "")


def test_code_of_a_run_is_run_where_it_is_trusted(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, info = load_checkpoint(copied / LAST)
    info["model"] |= {"arch": "their_module:network"}
    save_checkpoint(copied / LAST, tensors, info)
    (copied.parent / "their_module.py").write_text("raise SystemError('ran')", encoding="utf-8")
    monkeypatch.syspath_prepend(str(copied.parent))
    with pytest.raises(ValueError, match="their_module:network is code that would be imported and run"):
        immunity_fast.load(copied)
    with pytest.raises(ValueError, match="SystemError: ran"):
        immunity_fast.load(copied, trust_code=True)


def test_it_goes_into_a_folder_and_back_with_its_card(run: Path, tmp_path: Path) -> None:
    model = immunity_fast.load(run)
    model.save_pretrained(tmp_path / "saved")
    text = (tmp_path / "saved" / "README.md").read_text(encoding="utf-8")
    assert "| data set | npz |" in text
    assert "| epochs | 2 |" in text
    assert "| β, weight of the mutual-information loss | 0.5 |" in text
    assert "| adversarial training | none |" in text
    assert r"3: red, green \| blue, ÿ" in text
    assert "| PGD-20 | gate mean | 41.0 |" in text
    found = immunity_fast.load(tmp_path / "saved")
    assert (found.gate.switch, found.classes, found.card) == ("mean", tuple(NAMES), text)
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match=r"checkpoint: expected None for .*, got 'best'"):
        immunity_fast.load(tmp_path / "saved", checkpoint="best")


def test_the_card_does_without_what_is_broken(copied: Path) -> None:
    for name in ("config.json", "results.json"):
        (copied / name).write_text("{", encoding="utf-8")
    card = immunity_fast.load(copied).card or ""
    assert "2 × resnet8" in card
    assert "Nothing was measured" in card
    change_config_text = json.dumps({"lr": "high", "epochs": [1], "dataset": 3, "adversarial": "pgd", "eps": 8 / 255})
    (copied / "config.json").write_text(change_config_text, encoding="utf-8")
    assert "| adversarial training | pgd, Linf, ε = 8/255 |" in (immunity_fast.load(copied).card or "")


def test_it_needs_torch_and_safetensors_alone(run: Path) -> None:
    missing = ["numpy", "rich", "jinja2", "matplotlib", "sklearn", "torchvision", "torchattacks", "PIL", "timm"]
    program = (
        "import sys, warnings\nwarnings.simplefilter('ignore')\n"
        f"sys.modules.update(dict.fromkeys({missing}))\n"
        f"import immunity_fast\nprint(immunity_fast.load({str(run)!r}).num_experts)\n"
        "sys.modules['safetensors'] = None\n"
        f"try:\n    immunity_fast.load({str(run)!r})\nexcept ModuleNotFoundError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    count, message = done.stdout.splitlines()
    assert count == "2"
    assert message.startswith("loading a model needs safetensors: pip install safetensors")


def test_what_it_reads_is_what_training_writes() -> None:
    from immunity_fast.deployment import loading

    assert Run(Path()).config_file.name == loading.CONFIG
    assert checkpoint.LAST.suffix == ".safetensors"
