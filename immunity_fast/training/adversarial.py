"""Adversarial training: the attack inside a training step, and TRADES' losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from immunity_fast.attacks import Attack, BoundAttack
from immunity_fast.functional import mixture_cross_entropy, mixture_log_probabilities
from immunity_fast.models.gate import Switch
from immunity_fast.models.moe import ImmunityMoE
from immunity_fast.peers.base import each_experts
from immunity_fast.runtime.compilation import Compile, Log
from immunity_fast.runtime.modes import batch_statistics, evaluating, frozen
from immunity_fast.runtime.precision import Amp, accumulation_dtype, autocast
from immunity_fast.targets import hard_labels

Adversarial = Literal["off", "pgd", "trades", "fgsm-rs", "n-fgsm"]
Adversary = Literal["mixture", "each"]
BatchNormMode = Literal["eval", "train"]

FGSM_RS_STEP = 1.25  # of eps: Wong et al., arXiv 2001.03994
N_FGSM_NOISE = 2.0  # of eps: de Jorge et al., arXiv 2202.01181
TRADES_START = 1e-3  # standard deviation of the noise that TRADES' attack starts from


@dataclass(frozen=True)
class InnerAttackSettings:
    """What is attacked in a training step, and how.

    Args:
        method: "pgd" (Madry et al., arXiv 1706.06083): from a random point of the ball, cross-entropy of the mixture;
            "trades" (Zhang et al., arXiv 1901.08573): from the image with a little noise, KL divergence from the clean
            output; "fgsm-rs" (Wong et al., arXiv 2001.03994): one step of 1.25·eps from a random point; "n-fgsm" (de
            Jorge et al., arXiv 2202.01181): one step of eps from uniform noise of up to 2·eps, not brought back into
            the ball, so that images may be 3·eps away.
        eps: radius, Linf.
        alpha: size of a step; "fgsm-rs" and "n-fgsm" have one of their own.
        steps: number of steps; theirs is 1.
        batchnorm: "eval" attacks with running statistics; "train" with those of the batch, as it is trained, but
            without counting them in the running ones.
        gate: what weighs the attacked mixture: the trained gate ("off"), a permutation ("call", "sample"), or 1/N.
        adversary: "mixture" attacks what that gives; "each" attacks each expert alone, which then has images of its
            own.
    """

    method: Literal["pgd", "trades", "fgsm-rs", "n-fgsm"]
    eps: float = 8 / 255
    alpha: float = 2 / 255
    steps: int = 10
    batchnorm: BatchNormMode = "eval"
    gate: Switch = "off"
    adversary: Adversary = "mixture"

    def attack(self) -> Attack:
        """The settings of the attack alone, as `attacks.Attack` takes them."""
        if self.method == "fgsm-rs":
            return Attack(self.eps, FGSM_RS_STEP * self.eps, steps=1, random_start=True)
        if self.method == "n-fgsm":  # a ball that holds the noise and the step
            return Attack(min((N_FGSM_NOISE + 1) * self.eps, 1.0), self.eps, steps=1)
        return Attack(self.eps, self.alpha, self.steps, random_start=self.method == "pgd")


class InnerAttack:
    """Adversarial images of a batch, made against a model that is being trained, which is left as it was.

    Args:
        model: the mixture.
        settings: see there.
        attacked: what is attacked in the place of the mixture: images (B, C, H, W) to outputs (B, K).
        amp: the number format of the attacked model's convolutions and products.
        compile, log, traceback_file: see `BoundAttack`.
        device: where the model is.
    """

    def __init__(
        self,
        model: ImmunityMoE,
        settings: InnerAttackSettings,
        *,
        attacked: Callable[[Tensor], Tensor] | None = None,
        amp: Amp = "off",
        compile: Compile = "off",
        device: torch.device | None = None,
        log: Log | None = None,
        traceback_file: Path | None = None,
    ) -> None:
        self.model, self.settings, self.amp = model, settings, amp
        self.attacked = attacked or model
        self.device = device or next(model.parameters()).device
        self._attack = BoundAttack(
            settings.attack(),
            self._outputs,
            compile=compile,
            device=self.device,
            log=log,
            traceback_file=traceback_file,
        )

    @property
    def compiled(self) -> bool:
        """Whether the attack's step is compiled, or will be at its first call."""
        return self._attack.compiled

    def __call__(self, images: Tensor, targets: Tensor) -> Tensor:
        """Adversarial images of `images` (B, C, H, W), floating-point in [0, 1], of the same shape.

        With the adversary "each" they are (N, B, C, H, W), each expert's own; `images` may then be so, too, and so may
        the targets.

        The targets are labels (B,), or probabilities (B, K). The divergence from these has the gradient of their
        cross-entropy −Σ_k t_k log ŷ_k. Samples that are ignored are attacked, too, whatever that makes of them.
        """
        if self.settings.adversary == "each":
            experts, samples = self.model.num_experts, images.shape[-4]
            own = each_experts(targets, experts, samples).flatten(0, 1)
            seen = images if images.dim() == 5 else images.expand(experts, *images.shape)
            return self._attacked_images(seen.flatten(0, 1), own).view(experts, samples, *images.shape[-3:])
        return self._attacked_images(images, targets)

    def _attacked_images(self, images: Tensor, targets: Tensor) -> Tensor:
        labels = hard_labels(targets)
        with frozen(self.model), attacked_mode(self.model, self.settings):
            if self.settings.method != "trades":
                probabilities = targets.clamp_min(0) if targets.dim() == 2 else None
                start = self._noisy(images) if self.settings.method == "n-fgsm" else None
                return self._attack(images, labels, start=start, reference=probabilities, trusted=True)
            with torch.no_grad():
                reference = self._outputs(images, labels).softmax(-1)
            start = images + TRADES_START * torch.randn_like(images)
            return self._attack(images, labels, start=start, reference=reference, trusted=True)

    def _outputs(self, images: Tensor, _labels: Tensor) -> Tensor:
        with autocast(self.amp, self.device):
            if self.settings.adversary == "each":
                own = images.view(self.model.num_experts, -1, *images.shape[1:])
                return self.model.expert_logits(own).flatten(0, 1)
            outputs: Tensor = self.attacked(images)
        return outputs

    def _noisy(self, images: Tensor) -> Tensor:
        """N-FGSM's start."""
        noise = torch.rand_like(images).mul_(2).sub_(1)
        return (images + N_FGSM_NOISE * self.settings.eps * noise).clamp_(0, 1)


@contextmanager
def attacked_mode(model: ImmunityMoE, settings: InnerAttackSettings) -> Iterator[None]:
    """Evaluation mode, but for the gate and BatchNorm that the settings name, in a `with` block."""
    counted = model.modules() if settings.batchnorm == "train" else ()
    with evaluating(model), model.gate.switched(settings.gate), batch_statistics(counted):
        yield


def trades_losses(
    clean: tuple[Tensor, Tensor | None],
    adversarial: tuple[Tensor, Tensor | None],
    labels: Tensor,
    alpha: float,
    weight: float,
    cross_entropy: Callable[[Tensor, Tensor | None, Tensor, float], Tensor] = mixture_cross_entropy,
) -> Tensor:
    """TRADES' loss (arXiv 1901.08573, eq. 5) in the place of eq. (2): cross-entropy of the clean images, and λ times
    the KL divergence of the adversarial output from the clean one; both of the mixture and, by α, of each expert.

    Args:
        clean, adversarial: (logits (N, B, K), gate (B, N)) of the same images.
        labels: (B,) integers, or (B, K) probabilities.
        alpha: weight of the experts' own.
        weight: λ; the authors' 1/λ.
        cross_entropy: (logits, gate, labels, alpha) to (B,), which is eq. (2), smoothed or weighted, say.

    Returns:
        (B,) in nats, differentiable in both.
    """
    losses = cross_entropy(*clean, labels, alpha)
    drift = divergence(mixture_log_probabilities(*clean), mixture_log_probabilities(*adversarial))
    if alpha > 0:
        dtype = accumulation_dtype(clean[0])
        experts = divergence(*(logits.log_softmax(-1, dtype=dtype) for logits in (clean[0], adversarial[0])))
        drift = drift + alpha * experts.sum(0)
    return losses + weight * drift


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) over the last axis, of logarithms."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
