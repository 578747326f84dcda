"""What attack libraries report of a mixture whose gate switches at random, beside its exact mean.

    python -m benchmarks.libraries --out benchmarks/results/libraries_cpu.json

A small mixture is trained on scikit-learn's digits. Each library then attacks it as its users do: `model.eval()`, whose
gate draws a permutation at every call, and `model.eval().deterministic()`. What a library reports is the accuracy on
its own adversarial images, answered by the model that it was given. The images that were made of the switching model
are judged by the exact mean and by the worst of all permutations, too.
"""

import argparse
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchattacks
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.outcomes import write
from benchmarks.record import header
from immunity_fast import ImmunityMoE, SwitchingGateWarning
from immunity_fast.attacks import autoattack, pgd
from immunity_fast.attacks.mixtures import trained_gate
from immunity_fast.evaluation.gate_attackers import answered_rightly, attacker
from immunity_fast.functional import mixture_cross_entropy

EPS, ALPHA, STEPS = 24 / 255, 4 / 255, 20
SIDE, CLASSES = 16, 10
OWN_SHARE = 0.1  # α, of the experts' own cross-entropies

Attack = Callable[[Any, Tensor, Tensor], Tensor]


def by_torchattacks(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return torchattacks.PGD(model, eps=EPS, alpha=ALPHA, steps=STEPS)(images, labels)


def by_foolbox(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    import foolbox

    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=images.device)
    attack = foolbox.attacks.LinfPGD(abs_stepsize=ALPHA, steps=STEPS)
    return attack(wrapped, images, labels, epsilons=EPS)[1]


def by_art(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    classifier = PyTorchClassifier(
        model,
        loss=nn.NLLLoss(),
        input_shape=tuple(images.shape[1:]),
        nb_classes=CLASSES,
        clip_values=(0, 1),
        device_type="cpu",
    )
    attack = ProjectedGradientDescentPyTorch(
        classifier, eps=EPS, eps_step=ALPHA, max_iter=STEPS, num_random_init=1, batch_size=len(images), verbose=False
    )
    return torch.from_numpy(attack.generate(images.numpy(), labels.numpy()))


def by_autoattack(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return autoattack(model, images, labels, num_classes=CLASSES, eps=EPS, steps=20, queries=100)


def by_ours(model: Any, images: Tensor, labels: Tensor) -> Tensor:
    return pgd(model, images, labels, eps=EPS, alpha=ALPHA, steps=STEPS)


ATTACKS: dict[str, Attack] = {
    "torchattacks, PGD-20": by_torchattacks,
    "foolbox, LinfPGD-20": by_foolbox,
    "ART, PGD-20": by_art,
    "attacks.pgd, 20 steps": by_ours,
    "attacks.autoattack, 20 steps, 100 queries": by_autoattack,
}


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 digits as (n, 3, 16, 16) in [0, 1], shuffled, and labels."""
    source = load_digits()
    small = torch.from_numpy(source.images).float()[:, None] / 16
    images = F.interpolate(small, size=(SIDE, SIDE), mode="bilinear").expand(-1, 3, -1, -1).contiguous()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], torch.from_numpy(source.target).long()[order]


def trained(images: Tensor, labels: Tensor, *, experts: int, epochs: int, seed: int) -> ImmunityMoE:
    """Small convolutional networks, each of which can classify; the gate prefers one of them."""
    torch.manual_seed(seed)
    networks = [
        nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * (SIDE // 4) ** 2, CLASSES),
        )
        for _ in range(experts)
    ]
    model = ImmunityMoE.from_experts(networks, stage="2", image_size=SIDE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(128):
            logits, gate = model.expert_logits(images[rows]), model.gate_weights(images[rows])
            loss = mixture_cross_entropy(logits, gate, labels[rows], OWN_SHARE).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share that is right, in one call of the whole batch, as a library asks."""
    with torch.no_grad():
        return float((model(images).argmax(-1) == labels).double().mean())


def judged(model: ImmunityMoE, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Share that is right by the exact mean, and under all permutations."""
    with torch.no_grad():
        right = answered_rightly(model.expert_logits(images), trained_gate(model, images), labels)
    return {name: float(right[name].double().mean()) for name in ("mean", "worst")}


def measure(model: ImmunityMoE, images: Tensor, labels: Tensor, draws: int) -> list[dict[str, Any]]:
    """What each attack reports of the switching mixture, over several seeds, and of its exact mean."""
    exact, found = model.deterministic(), []
    knowing = attacker(model, "eot")
    rows = ATTACKS | {"attacks.pgd, 20 steps, on attacker eot": lambda _, x, y: by_ours(lambda z: knowing(z, y), x, y)}
    for name, attack in rows.items():
        seen: dict[str, list[float]] = {"reported": [], "mean": [], "worst": [], "exact": []}
        for seed in range(1 if "autoattack" in name else draws):  # which has a seed of its own
            torch.manual_seed(seed)
            adversarial = attack(model, images, labels)
            seen["reported"].append(accuracy(model, adversarial, labels))
            for judge, share in judged(model, adversarial, labels).items():
                seen[judge].append(share)
            torch.manual_seed(seed)
            seen["exact"].append(accuracy(exact, attack(exact, images, labels), labels))
        found.append({"attack": name} | {key: round(statistics.mean(values), 4) for key, values in seen.items()})
        found[-1]["reported_range"] = [min(seen["reported"]), max(seen["reported"])]
        print(found[-1], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="What attack libraries report of a gate that switches at random.")
    parser.add_argument("--out", type=Path, required=True, help="the JSON record")
    parser.add_argument("--experts", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--images", type=int, default=100, help="attacked (default: 100)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each attack (default: 3)")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", SwitchingGateWarning)
    images, labels = digits()
    model = trained(images[400:], labels[400:], experts=arguments.experts, epochs=arguments.epochs, seed=0)
    images, labels = images[: arguments.images], labels[: arguments.images]
    command = (
        f"python -m benchmarks.libraries --experts {arguments.experts} --epochs {arguments.epochs} --images "
        f"{arguments.images} --seeds {arguments.seeds}"
    )
    record = header(command) | {"eps": EPS, "steps": STEPS, "clean": judged(model, images, labels)}
    print(record["clean"])
    record["attacks"] = measure(model, images, labels, arguments.seeds)
    write(arguments.out, record)


if __name__ == "__main__":
    main()
