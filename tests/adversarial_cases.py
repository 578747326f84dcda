"""What the tests of adversarial training share: small mixtures, images, settings, and runs of two steps."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

from immunity_fast import FusedImmunityLoss, ImmunityMoE
from immunity_fast.experts.staged import GlobalAveragePool
from immunity_fast.training.adversarial import InnerAttack, InnerAttackSettings
from immunity_fast.training.config import TrainConfig
from immunity_fast.training.loop import train
from immunity_fast.training.run_folder import Run
from immunity_fast.training.state import TrainingState
from immunity_fast.training.step import TrainStep
from tests.small_runs import CPU, as_bytes, dataset

METHODS = ("pgd", "trades", "fgsm-rs")


EPS, ALPHA, STEPS = 0.06, 0.025, 3


LOSS = FusedImmunityLoss(0.5, 0.7, 1e-3, size=(8, 9))
LABELS = torch.tensor([0, 2, 1, 1, 0])
# What of a run's settings is of its attack, by the attack's own settings.
ATTACK_SETTINGS = {"adversarial", "eps", "trades_weight"} | {
    f"attack_{field.name}"
    for field in dataclasses.fields(InnerAttackSettings)
    if field.name not in ("method", "eps", "adversary")
}


class _Whole(nn.Module):
    """A network that is no chain, so that it cannot be cut into a trunk and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU())
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.body(x).mean((-2, -1)))
        return result


def chain(**batchnorm: Any) -> nn.Sequential:
    """BatchNorm on both sides of the cut."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3),
        nn.BatchNorm2d(5, **batchnorm),
        nn.ReLU(),
        GlobalAveragePool(),
        nn.Linear(5, 3),
    )


def small_mixture(
    experts: int = 3, *, batching: Any = "loop", dtype: torch.dtype = torch.float64, whole: bool = False, **norm: Any
) -> ImmunityMoE:
    """In training mode, with running statistics that are not those of any batch here."""
    torch.manual_seed(0)
    parts = [_Whole() if whole else chain(**norm) for _ in range(experts)]
    about = {} if whole else {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}
    model = ImmunityMoE.from_experts(parts, stage="body" if whole else "2", batching=batching, **about).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape).to(dtype))
        model(torch.rand(7, 3, 12, 13, generator=torch.Generator().manual_seed(8)).to(dtype) ** 2)
    return model


def noisy_images(seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    """Noise, a part of which is exactly 0 or 1."""
    noise = torch.rand(5, 3, 12, 13, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (1.4 * noise - 0.2).clamp(0, 1).to(dtype)


def inner_settings(method: Any, batchnorm: Any = "eval", gate: Any = "off", **changes: Any) -> InnerAttackSettings:
    return dataclasses.replace(InnerAttackSettings(method, EPS, ALPHA, STEPS, batchnorm, gate), **changes)


def attacked(attack: InnerAttack, images: Tensor, seed: int = 3) -> Tensor:
    torch.manual_seed(seed)
    return attack(images, LABELS)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def state_of(model: ImmunityMoE) -> dict[str, Any]:
    """Everything of a model that an attack might change, and random states apart, nothing may."""
    return {
        "tensors": {name: (id(t), as_bytes(t)) for name, t in model.state_dict(keep_vars=True).items()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "gradients": {n: None if p.grad is None else as_bytes(p.grad) for n, p in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "tracking": {n: m.track_running_stats for n, m in model.named_modules() if hasattr(m, "track_running_stats")},
        "switch": model.gate.switch,
        "hooks": [len(module._forward_hooks) for module in model.modules()],
    }


def train_step(
    model: ImmunityMoE, method: str | None = None, loss_fn: FusedImmunityLoss = LOSS, **changes: Any
) -> TrainStep:
    attack = None if method is None else InnerAttack(model, inner_settings(method, changes.pop("batchnorm", "eval")))
    return TrainStep(model, loss_fn, SGD(model.parameters(), 0.1), attack=attack, **changes)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) of two rows of logarithms."""
    total = torch.zeros((), dtype=torch.float64)
    for k in range(len(log_p)):
        total = total + log_p[k].exp() * (log_p[k] - log_q[k])
    return total


CONFIG = TrainConfig(experts=2, batch_size=10, epochs=1, check_images=0, adversarial="pgd", attack_steps=2)


def train_run(folder: Path, **changes: Any) -> tuple[TrainingState, Run]:
    """A whole run without a command line, by default of 2 steps."""
    config = dataclasses.replace(CONFIG, **changes)
    trainer, run = TrainingState(config, dataset(), CPU), Run.create(folder, config)
    train(trainer, run)
    return trainer, run


def records_of(under_pgd: list[float], under_fgsm: list[float]) -> list[dict[str, float]]:
    return [
        {"epoch": epoch, "val_pgd10_accuracy_mean": p, "val_fgsm_accuracy_mean": f}
        for epoch, (p, f) in enumerate(zip(under_pgd, under_fgsm, strict=True), start=1)
    ]
