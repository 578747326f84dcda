"""Attack libraries on a mixture: what they report of a gate that switches at random, and of its exact mean.

    pip install '.[train]' torchattacks foolbox adversarial-robustness-toolbox
    python examples/attack_libraries.py

A mixture of three small networks learns scikit-learn's digits. Then each library that is installed attacks it twice, as
its users would, and reports the accuracy on its own adversarial images. `model.eval()` draws a permutation of its
gate's weights at every call, so that an attack follows one permutation and is judged by another, a matter of luck.
`model.deterministic()` is the same mixture by the exact mean of all permutations.
"""

import argparse
import importlib.util
import warnings
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from immunity_fast import ImmunityMoE, SwitchingGateWarning
from immunity_fast.attacks import pgd
from immunity_fast.functional import mixture_cross_entropy

EPS, ALPHA = 24 / 255, 4 / 255


def by_immunity_fast(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> Tensor:
    return pgd(model, images, labels, eps=EPS, alpha=ALPHA, steps=steps)


def by_torchattacks(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> Tensor:
    import torchattacks

    return torchattacks.PGD(model, eps=EPS, alpha=ALPHA, steps=steps)(images, labels)


def by_foolbox(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> Tensor:
    import foolbox

    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=images.device)
    return foolbox.attacks.LinfPGD(abs_stepsize=ALPHA, steps=steps)(wrapped, images, labels, epsilons=EPS)[1]


def by_art(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> Tensor:
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    shape = tuple(images.shape[1:])
    classifier = PyTorchClassifier(
        model, loss=nn.NLLLoss(), input_shape=shape, nb_classes=10, clip_values=(0, 1), device_type="cpu"
    )
    attack = ProjectedGradientDescentPyTorch(
        classifier, eps=EPS, eps_step=ALPHA, max_iter=steps, num_random_init=1, batch_size=len(images), verbose=False
    )
    return torch.from_numpy(attack.generate(images.numpy(), labels.numpy()))


Attack = Callable[[nn.Module, Tensor, Tensor, int], Tensor]
LIBRARIES: dict[str, Attack] = {
    "immunity_fast": by_immunity_fast,
    "torchattacks": by_torchattacks,
    "foolbox": by_foolbox,
    "art": by_art,
}


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 digits as (n, 3, 16, 16) in [0, 1], shuffled, and labels."""
    source = load_digits()
    small = torch.from_numpy(source.images).float()[:, None] / 16
    images = F.interpolate(small, size=(16, 16), mode="bilinear").expand(-1, 3, -1, -1).contiguous()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], torch.from_numpy(source.target).long()[order]


def trained(images: Tensor, labels: Tensor, epochs: int) -> ImmunityMoE:
    """Three networks, each of which can classify, and a gate that prefers one of them."""
    torch.manual_seed(0)
    networks = [
        nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.Flatten(), nn.Linear(144, 10)
        )
        for _ in range(3)
    ]
    model = ImmunityMoE.from_experts(networks, stage="2", image_size=16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(128):
            logits, gate = model.expert_logits(images[rows]), model.gate_weights(images[rows])
            optimizer.zero_grad()
            mixture_cross_entropy(logits, gate, labels[rows], alpha=0.1).mean().backward()
            optimizer.step()
    return model.eval()


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """In %, in one call, as a library asks."""
    with torch.no_grad():
        return 100 * float((model(images).argmax(-1) == labels).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description="Attack libraries on a mixture whose gate switches, and on its mean.")
    parser.add_argument("--epochs", type=int, default=15, help="of training (default: 15)")
    parser.add_argument("--steps", type=int, default=10, help="of each attack (default: 10)")
    arguments = parser.parse_args()
    images, labels = digits()
    model = trained(images[200:], labels[200:], arguments.epochs)
    exact = model.deterministic()
    images, labels = images[:200], labels[:200]
    print(
        f"clean accuracy, exact mean: {accuracy(exact, images, labels):.1f} %; PGD-{arguments.steps}, Linf, ε = 24/255"
    )
    print(f"{'':16}{'model.eval()':>16}{'.deterministic()':>20}{'  its images, judged by the exact mean'}")
    for name, attack in LIBRARIES.items():
        if importlib.util.find_spec(name) is None:
            print(f"{name:16}is not installed")
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SwitchingGateWarning)  # which would say it
            of_draws = attack(model, images, labels, arguments.steps)
        of_mean = attack(exact, images, labels, arguments.steps)
        reported = (
            accuracy(model, of_draws, labels),
            accuracy(exact, of_mean, labels),
            accuracy(exact, of_draws, labels),
        )
        print(f"{name:16}{reported[0]:14.1f} %{reported[1]:18.1f} %{reported[2]:18.1f} %")


if __name__ == "__main__":
    main()
