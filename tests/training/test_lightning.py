"""The package's LightningModule: the loss and the update of the package's own step, and what it logs."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from immunity_fast import ImmunityMoE
from immunity_fast.training.config import TrainConfig
from immunity_fast.training.decay import parameter_groups
from immunity_fast.training.optimizers import make_optimizer
from tests.small_runs import split

lightning = pytest.importorskip("pytorch_lightning", reason="what the module is for")
pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's, on loaders without workers and the like

CONFIG = TrainConfig(experts=2, lr=0.01, schedule="linear", decay="weights", device="cpu")
IMAGES = split(8).images


def _module(*arguments: Any, **options: Any) -> Any:
    from immunity_fast.training import ImmunityLightningModule

    return ImmunityLightningModule(*arguments, **options)


def _mixture() -> ImmunityMoE:
    torch.manual_seed(0)
    return ImmunityMoE("resnet8", num_experts=2, num_classes=3, image_size=12)


def _fitted(module: Any, folder: Path, targets: torch.Tensor, **options: Any) -> Any:
    loader = DataLoader(TensorDataset(IMAGES, targets), batch_size=4)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(max_epochs=1, default_root_dir=folder, **quiet, **options)
    trainer.fit(module, loader, loader)
    return trainer


@pytest.mark.parametrize("kind", ["class numbers", "probabilities"])
def test_it_takes_the_steps_of_a_loop(kind: str, tmp_path: Path) -> None:
    labels = split(8).labels
    targets = labels if kind == "class numbers" else torch.eye(3)[labels] * 0.7 + 0.1
    model = _mixture()
    expected = copy.deepcopy(model)
    trainer = _fitted(_module(model, CONFIG), tmp_path, targets, enable_checkpointing=False)
    groups = parameter_groups(expected, CONFIG.weight_decay, CONFIG.decay)
    optimizer = make_optimizer("sgd", groups, CONFIG.lr, momentum=CONFIG.momentum)
    loss_fn = CONFIG.loss_fn((12, 12))
    expected.train()
    for step in range(2):
        for group in optimizer.param_groups:
            group["lr"] = CONFIG.lr * (1 - step / 2)
        part = slice(4 * step, 4 * step + 4)
        expected.loss_fn = loss_fn
        loss, terms = expected(IMAGES[part].float() / 255, targets[part], return_terms=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    metrics = trainer.callback_metrics
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-4)
    assert float(metrics["mutual_information_loss"]) == pytest.approx(float(terms.mutual_information), rel=1e-3)
    assert {"val_accuracy_mean", "val_accuracy_sample", "cross_entropy", "position_stability"} <= metrics.keys()


def test_a_checkpoint_of_lightning_s_makes_it_again(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, optimizer="adamw", lr=0.001)
    module = _module(config, num_classes=3, image_size=12)
    trainer = _fitted(module, tmp_path, split(8).labels)
    trainer.save_checkpoint(tmp_path / "file.ckpt")
    again = type(module).load_from_checkpoint(tmp_path / "file.ckpt", map_location="cpu")
    assert again.config == config
    for name, tensor in module.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor)


def test_what_it_does_not_do_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^adversarial: expected off in a LightningModule, .*got pgd;"):
        _module(dataclasses.replace(CONFIG, adversarial="pgd"))
    with pytest.raises(ValueError, match=r"^poison: expected None in a LightningModule, .*got badnets:0.1;"):
        _module(dataclasses.replace(CONFIG, poison="badnets:0.1"))
    with pytest.raises(TypeError, match=r"^model: expected an ImmunityMoE or a TrainConfig, got Linear$"):
        _module(torch.nn.Linear(1, 1))
