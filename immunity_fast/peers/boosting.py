"""Boosting of robust networks: each member is trained where those before it and itself together are wrong.

Both methods were compared with the authors' code, https://github.com/zdhNarsil/Margin-Boosting and
https://github.com/hsndbk4/BARRE.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from immunity_fast.attacks.arc import Arc
from immunity_fast.attacks.descent import UnmovedWarning
from immunity_fast.attacks.members import EnsembleMembers
from immunity_fast.functional import log_mixture
from immunity_fast.losses import FusedImmunityLoss
from immunity_fast.models.moe import ImmunityMoE
from immunity_fast.peers.sequence import InTurn
from immunity_fast.peers.simplex import least_error
from immunity_fast.runtime.checks import check_weight, check_whole
from immunity_fast.runtime.modes import frozen
from immunity_fast.runtime.precision import accumulation_dtype, at_least_float32
from immunity_fast.targets import IGNORE_INDEX

# Of BARRE, as its authors' code has them.
UNIFORM = 3  # members that are as likely, whatever the attack finds
PAUSE = 10  # parts of a member's epochs, behind each of which in the second half probabilities are chosen
WALKS, CLASSES = 10, 2  # of ARC
AT_ONCE = 250  # images that are attacked


class BoostedLoss(InTurn):
    """CE + w·MCE of the member whose turn it is: what MRBoost and BARRE minimise.

    MCE is the mean over the wrong classes k of −log softmax(−f)_k: each wrong class is to be the least likely. It is
    of the labels as they are, neither smoothed nor weighted by class.

    Args:
        weight: w ≥ 0 of MCE.
        shared: see `EnsembleLoss`.

    Raises:
        ValueError: a weight that is negative or not finite.
        TypeError: one that is no number.
    """

    measured = ("loss", "cross_entropy", "margin_cross_entropy")

    def __init__(self, weight: float = 1.0, **shared: Any) -> None:
        super().__init__(**shared)
        check_weight("weight", weight)
        self.weight = weight
        ignored = shared.get("ignore_index", IGNORE_INDEX)
        self._ignored = ignored
        self._wrong = FusedImmunityLoss(0.0, 0.0, 0.0, ignore_index=ignored, group_name=shared.get("group_name", ""))

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of a batch, 0-d.

        Args:
            logits: (B, K) of the member that is trained.
            targets: (B,) integers or (B, K) probabilities.
        """
        return self._losses(logits, targets)[0]

    def margin_losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """MCE of each image, (B,) in nats, 0 of those that are ignored.

        Of probabilities t, class k is wrong by 1 − t_k. With one class alone none is wrong.

        Args:
            logits: (B, K).
            targets: (B,) integers or (B, K) probabilities.
        """
        classes = logits.shape[-1]
        # It is the cross-entropy of −f and of what is no part of the target.
        counted = None
        if targets.is_floating_point():
            there = at_least_float32(targets)
            if self._ignored is not None:
                counted = (targets != self._ignored).any(-1)
        else:
            labels = targets.long()
            there = (labels[:, None] == torch.arange(classes, device=labels.device)).to(at_least_float32(logits).dtype)
            if self._ignored is not None:
                counted = labels != self._ignored
        wrong = (1 - there) / (classes - 1)
        if counted is not None:
            wrong = torch.where(counted[:, None], wrong, float(self._ignored or 0))
        return self._wrong.class_losses(-logits[None], None, wrong, alpha=0.0)

    def loss_and_terms(
        self, model: ImmunityMoE, images: Tensor, targets: Tensor, prepared: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        loss, terms = self._losses(self.member_logits(model, images), targets)
        return self.all_used(model, loss), terms

    def _losses(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        classes = logits.shape[-1]
        entropy = self.mean(self.expert_losses(logits[None], targets)[0], targets, classes)
        margin = self.mean(self.margin_losses(logits, targets), targets, classes)
        return entropy + self.weight * margin, (entropy, margin)

    def passes(self, num_experts: int, attack_steps: int) -> float:
        """One member learns from an image of an epoch, and m are attacked, on average (N + 1) / 2."""
        return 1 + attack_steps * (num_experts + 1) / 2


class MRBoostLoss(BoostedLoss):
    """MRBoost (Zhang et al., ICML 2022, arXiv 2206.03362): CE + w·MCE of member m where members 1..m together fail.

    In adversarial training the images fool the mean of the logits of members 1..m, each frozen but the last. Without,
    they are clean, and the members are trained in turn, each as if it were alone.

    In the authors' code with MCE (ladder_mce_main.py) both terms are of member m alone, as here; that without MCE
    (ladder_main.py) takes the cross-entropy of the mean logits. Their adversary maximises CE + w·MCE of the mean
    logits, from a start within half the radius; here it is the cross-entropy, as of all adversarial training, by the
    run's own settings. Their answer is by the mean of logits, here by that of probabilities.

    Args:
        weight: w ≥ 0 of MCE.
        warm_start: begin each member from the one before it.
        label_smoothing, class_weights, ignore_index, group_name: see `EnsembleLoss`.

    Raises:
        ValueError: a weight that is negative or not finite.
        TypeError: one that is no number.
    """

    def __init__(self, weight: float = 1.0, warm_start: bool = False, **shared: Any) -> None:
        super().__init__(weight, **shared)
        self.warm_start = warm_start

    def check_model(self, model: ImmunityMoE) -> None:
        super().check_model(model)
        if self.warm_start:
            self.check_alike(model)

    def change(self, model: ImmunityMoE, seed: int) -> None:
        super().change(model, seed)
        if self.warm_start:
            self.begin_from_the_last(model)

    def attacked(self, model: ImmunityMoE) -> Callable[[Tensor], Tensor]:
        return partial(self._mean_logits, model)

    def _mean_logits(self, model: ImmunityMoE, images: Tensor) -> Tensor:
        return at_least_float32(model.some_logits(images, range(self.stage + 1))).mean(0)


class BARRELoss(BoostedLoss):
    """BARRE (Dbouk & Shanbhag, ICML 2023): boosting of an ensemble that answers by one member, drawn at random.

    Member m begins from the one before it and minimises CE + w·MCE on images that fool the mixture of members 1..m,
    log Σ p_i softmax(f_i), by their selection probabilities p. These are 1/m of up to three members. With more they are
    optimised, in the second half of a member's epochs, ten times for each hundred and behind the last: by projected
    subgradient steps, see `simplex.least_error`, on what each member gets wrong under ARC. Without adversarial training
    the images of the loss are clean.

    In the authors' code, too, both terms are of member m alone; its w is 0 by default and 1 for MCE, its adversary
    maximises CE + w·MCE of the mixture where here it is the cross-entropy, and it goes on from each member's epoch of
    the best test accuracy, which is not done here. Its steps have 10 times the learning rate of SGD, 0.1 at first.

    Args:
        weight: w ≥ 0 of MCE.
        images: training images that the probabilities are chosen by.
        updates: steps of a choice.
        rate: of the first step, which the others are parts of.
        label_smoothing, class_weights, ignore_index, group_name: see `EnsembleLoss`.

    Raises:
        ValueError: a number that is out of its range.
        TypeError: one that is no number.
    """

    gate = "selection"
    needs_examples = True

    def __init__(
        self, weight: float = 1.0, images: int = 2000, updates: int = 10, rate: float = 0.1, **shared: Any
    ) -> None:
        super().__init__(weight, **shared)
        check_whole("images", images, 1)
        check_whole("updates", updates, 1)
        check_weight("rate", rate)
        self.images, self.updates, self.rate = images, updates, rate

    def check_model(self, model: ImmunityMoE) -> None:
        super().check_model(model)
        self.check_alike(model)

    def change(self, model: ImmunityMoE, seed: int) -> None:
        super().change(model, seed)
        self.begin_from_the_last(model)

    def attacked(self, model: ImmunityMoE) -> Callable[[Tensor], Tensor]:
        return partial(self._mixture, model)

    def _mixture(self, model: ImmunityMoE, images: Tensor) -> Tensor:
        logits = model.some_logits(images, range(self.stage + 1))
        return log_mixture(logits, self._shares(model, accumulation_dtype(logits)).expand(len(images), -1))

    def _shares(self, model: ImmunityMoE, dtype: torch.dtype) -> Tensor:
        """The selection probabilities of the members so far."""
        weights = model.gate.fixed_weights(dtype)
        assert weights is not None
        return weights[: self.stage + 1]

    def chooses(self, epoch: int, epochs: int, num_experts: int) -> bool:
        """Whether probabilities are chosen behind an epoch: with four members or more.

        Args:
            epoch, epochs: see `begin_epoch`.
            num_experts: N.
        """
        length = epochs // num_experts
        member, within = divmod(epoch, length)
        every, second = max(1, round(length / PAUSE)), within - length // 2
        return member >= UNIFORM and second >= 0 and ((second + 1) % every == 0 or within == length - 1)

    def end_epoch(
        self,
        model: ImmunityMoE,
        examples: Callable[[int], tuple[Tensor, Tensor]],
        epoch: int,
        epochs: int,
        seed: int,
        eps: float,
    ) -> Sequence[float] | None:
        if not self.chooses(epoch, epochs, model.num_experts):
            return None
        images, labels = examples(self.images)
        generator = torch.Generator().manual_seed(seed + epoch)
        attack = Arc(eps, steps=WALKS, classes=min(CLASSES, model.num_classes - 1))

        def errors(shares: Tensor) -> Tensor:
            members = _Members(model, shares)
            wrong = torch.zeros(len(shares), dtype=torch.float64)
            for part, own in zip(torch.split(images, AT_ONCE), torch.split(labels, AT_ONCE), strict=True):
                found = attack.attack_members(members, part, own, generator, permuted=False)
                with torch.no_grad():
                    wrong += (members.logits(found).argmax(-1) != own).sum(1).cpu()
            return wrong / max(len(images), 1)

        with frozen(model), warnings.catch_warnings():
            warnings.simplefilter("ignore", UnmovedWarning)  # an image that cannot be moved counts as it is
            shares = least_error(errors, self._shares(model, torch.float64).cpu(), self.updates, self.rate)
        return shares.tolist() + [0.0] * (model.num_experts - len(shares))


class _Members(EnsembleMembers):
    """The first members of an ensemble, one of which answers.

    Args:
        model: in evaluation mode.
        shares: (m,) float64, with which probability each does.
    """

    def __init__(self, model: ImmunityMoE, shares: Tensor) -> None:
        self.model, self.shares = model, shares

    def logits(self, images: Tensor) -> Tensor:
        return self.model.some_logits(images, range(len(self.shares)))

    def one(self, index: int, images: Tensor) -> Tensor:
        return self.model.some_logits(images, [index])[0]

    def weights(self, images: Tensor) -> Tensor:
        return self.shares.to(images.device, accumulation_dtype(images)).expand(len(images), -1)
