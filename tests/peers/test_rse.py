"""RSE: one network trained and judged with noise, from the command's words to the numbers of its evaluation."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from immunity_fast import ensemble, evaluate
from immunity_fast.evaluation.targets import TRIES, MixtureTarget, NetworkTarget
from immunity_fast.experts import create
from immunity_fast.models.moe import ImmunityMoE, SingleNetwork
from immunity_fast.peers import RSELoss, method_of
from immunity_fast.training.checkpoint import load_checkpoint, load_model, save_checkpoint
from immunity_fast.training.config import TrainConfig
from immunity_fast.training.run_evaluation import DRAWS, target_of
from immunity_fast.training.run_folder import Run
from immunity_fast.training.state import TrainingState
from immunity_fast.training.trainer import Trainer
from tests import evaluated
from tests.evaluated import accuracy_of, results_of
from tests.small_runs import CPU, dataset, error_line, interrupted, options, split, trained

plain = evaluated.plain

IMAGES = torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 2, 1, 2])


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    words = options(data, ensemble="rse:first=0.3,inner=0.05", experts=1, arch="resnet8x0.25")
    return trained([*words, "--out", str(tmp_path_factory.mktemp("runs") / "rse")])[1]


def _model(**changes: Any) -> SingleNetwork:
    torch.manual_seed(0)
    return SingleNetwork("resnet8x0.25", 3, image_size=12, **({"noise": (0.2, 0.1)} | changes)).eval()


def test_the_loss_is_the_cross_entropy_of_a_noisy_pass() -> None:
    model, loss_fn = _model().double(), RSELoss(label_smoothing=0.1)
    torch.manual_seed(3)
    loss, terms = loss_fn.loss_and_terms(model, IMAGES.double(), LABELS)
    torch.manual_seed(3)
    expected = F.cross_entropy(model.expert_logits(IMAGES.double())[0], LABELS, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.stack(terms), expected[None], rtol=1e-12, atol=1e-12)


def test_words_name_the_deviations() -> None:
    for text, noise in (
        ("rse", (0.2, 0.1)),
        ("rse:first=0.4", (0.4, 0.1)),
        ("rse:first=0.02,inner=1/100", (0.02, 0.01)),
    ):
        method = method_of(text)
        assert isinstance(method, RSELoss)
        assert method.noise == noise
        assert TrainConfig(ensemble=text, experts=1).noise == noise
    assert TrainConfig(ensemble="plain").noise is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rse:first=-1", "ensemble: rse: noise: expected two finite standard deviations of at least 0"),
        ("rse:inner=inf", "ensemble: rse: noise: expected two finite standard deviations of at least 0"),
        ("rse:passes=3", "ensemble: expected rse with first=…, inner=…, got passes=3"),
        ("rse:first=a", "ensemble: expected a number for first, got a"),
    ],
)
def test_wrong_words_are_a_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        method_of(text)
    with pytest.raises(ValueError, match=f"^--{message}"):
        TrainConfig(ensemble=text, experts=1)


def test_it_is_of_one_network() -> None:
    with pytest.raises(ValueError, match=r"^--experts: expected 1 with --ensemble rse, got 2$"):
        TrainConfig(ensemble="rse", experts=2)


def test_a_checkpoint_has_the_noise(run: Run) -> None:
    model, info = load_model(run.folder)
    assert info["model"]["noise"] == [0.3, 0.05]
    assert model.noise == (0.3, 0.05)
    assert not torch.equal(model(IMAGES), model(IMAGES))


@pytest.mark.parametrize("noise", [None, 0.1, [0.1], [0.1, -0.1], ["a", 0.1]])
def test_a_checkpoint_of_wrong_noise_is_refused(run: Run, noise: Any, tmp_path: Path) -> None:
    tensors, info = load_checkpoint(run.checkpoint)
    save_checkpoint(tmp_path / "a.safetensors", tensors, info | {"model": info["model"] | {"noise": noise}})
    with pytest.raises(ValueError, match="not a whole checkpoint: model was "):
        load_model(tmp_path / "a.safetensors")


def test_a_run_goes_on_to_the_same_bits(data: Path, tmp_path: Path, run: Run) -> None:
    words = options(data, ensemble="rse:first=0.3,inner=0.05", experts=1, arch="resnet8x0.25")
    interrupted((TrainingState, "advance"), 8, [*words, "--checkpoint-every", "1", "--out", str(tmp_path / "half")])
    again = trained(["--resume", str(tmp_path / "half"), "--device", "cpu"])[1]
    for name, value in load_checkpoint(run.checkpoint)[0].items():
        assert torch.equal(load_checkpoint(again.checkpoint)[0][name], value), name


def test_a_model_that_is_given_needs_that_noise() -> None:
    config = TrainConfig(ensemble="rse", experts=1, batch_size=4, epochs=1, check_images=0)
    data = dataset(train=split(8), test=split(4))
    with pytest.raises(ValueError, match=r"^--ensemble rse: expected a model with noise=\(0.2, 0.1\), got None$"):
        Trainer(config, data, model=_model(noise=None), device=CPU).fit()
    assert Trainer(config, data, model=_model(), device=CPU).model.noise == (0.2, 0.1)
    own = Trainer(config, data, model=create("resnet8x0.25", 3), device=CPU).model
    assert own.noise == (0.2, 0.1), "a network of the user's gets it"


def test_it_answers_by_the_mean_of_ten_passes() -> None:
    """One pass is differentiated, ten are averaged to an answer, and twenty to the average attacker's gradient."""
    model, generator = _model(), torch.Generator()
    target = target_of(model, 3)
    assert isinstance(target, NetworkTarget)
    assert (target.attackers, target.random, target.draws) == (("output", "eot"), ("output", "eot"), DRAWS)
    torch.manual_seed(1)
    one = target.attacker("output", generator)(IMAGES, LABELS)
    torch.manual_seed(1)
    torch.testing.assert_close(one, model(IMAGES))
    torch.manual_seed(1)
    assert target.attacker("eot", generator)(IMAGES, LABELS).shape == (DRAWS, 4, 3)
    torch.manual_seed(1)
    verdict = target.judge(IMAGES, LABELS, generator)
    torch.manual_seed(1)
    with torch.no_grad():
        answer = torch.stack([model.deterministic()(IMAGES).exp() for _ in range(10)]).mean(0)
    assert torch.equal(verdict.right["output"], answer.argmax(-1) == LABELS)
    torch.testing.assert_close(verdict.loss, -answer[torch.arange(4), LABELS].log())
    assert verdict.tries is not None
    assert verdict.tries.shape == (TRIES, 4)
    assert not target.repeats(IMAGES)


def test_the_average_attacker_s_gradient_is_an_average() -> None:
    target = target_of(_model(), 3, draws=3)
    images = IMAGES.clone().requires_grad_()

    def slope(outputs: Tensor) -> Tensor:
        losses = torch.stack([F.cross_entropy(each, LABELS) for each in outputs])
        return torch.autograd.grad(losses.mean(), images)[0]

    torch.manual_seed(1)
    found = slope(target.attacker("eot", torch.Generator())(images, LABELS))
    torch.manual_seed(1)
    single = [slope(target.attacker("output", torch.Generator())(images, LABELS)[None]) for _ in range(3)]
    torch.testing.assert_close(found, torch.stack(single).mean(0), rtol=1e-4, atol=1e-7)


@pytest.mark.usefixtures("plain")
def test_its_evaluation_averages_and_tries_ten_times(run: Run, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run.folder, tmp_path / "run"))
    words = ["--attacks", "fgsm", "--draws", "3", "--masking-images", "0", "--limit", "4", "--device", "cpu"]
    evaluate.main([str(folder), *words])
    assert {("fgsm", "output", "output"), ("fgsm", "eot", "output")} <= accuracy_of(folder).keys()
    drawn = {(entry["attack"], entry["attacker"]): entry for entry in results_of(folder)["drawn"]}
    assert {("fgsm", "output"), ("fgsm", "eot")} <= drawn.keys()
    before = accuracy_of(folder)
    evaluate.main([str(folder), *words, "--again"])
    assert accuracy_of(folder) == before, "what is drawn is seeded"


def test_a_mixture_with_noise_is_not_judged() -> None:
    torch.manual_seed(0)
    model = ImmunityMoE("resnet8x0.25", 2, 3, image_size=12, noise=(0.2, 0.1)).eval()
    with pytest.raises(ValueError, match=r"^model: expected one network with noise, got a mixture of 2 experts$"):
        target_of(model, 3)
    assert isinstance(target_of(ImmunityMoE("resnet8x0.25", 2, 3, image_size=12).eval(), 3), MixtureTarget)


def test_networks_without_noise_are_judged_as_ever() -> None:
    target = target_of(_model(noise=None), 3)
    assert target.random == ()
    assert target.attackers == ("output",)


def test_noisy_networks_are_not_joined(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = Path(shutil.copytree(run.folder, tmp_path / "other"))
    words = [str(run.folder), str(other), "--out", str(tmp_path / "joined")]
    assert "expected a run of a network without noise, got noise=(0.3, 0.05)" in error_line(
        capsys, ensemble.main, words
    )
