"""Networks that are no architecture of ours, on the device that is there: capture, loss, a training step, an attack."""

import torch
import torchvision
from torch import Tensor, nn
from torch.optim import SGD

from immunity_fast import FusedImmunityLoss, ImmunityMoE
from immunity_fast.attacks import pgd
from immunity_fast.training.step import TrainStep


class Residual(nn.Module):
    """A network with a `forward` of its own, normalised by `norm`."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = norm(8) if norm is not nn.GroupNorm else nn.GroupNorm(2, 8)
        self.block = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        return self.head((x + self.block(x)).mean((-2, -1)))


def networks() -> dict[str, tuple[list[nn.Module], str | None]]:
    """Two of a kind each, and the stage that Grad-CAM looks at."""

    def chain() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, momentum=None), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(6, 6, 3), nn.InstanceNorm2d(6), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10),
        )  # fmt: skip

    found: dict[str, tuple[list[nn.Module], str | None]] = {"a chain": ([chain(), chain()], "2")}
    for norm in (nn.BatchNorm2d, nn.InstanceNorm2d, nn.GroupNorm):
        found[f"a forward of its own, {norm.__name__}"] = ([Residual(norm), Residual(norm)], "block")
    for name in ("resnet18", "shufflenet_v2_x0_5", "squeezenet1_0"):
        pair = [torchvision.models.get_model(name, num_classes=10) for _ in range(2)]
        stages = {"resnet18": "layer2", "shufflenet_v2_x0_5": "stage2", "squeezenet1_0": "features.3"}
        found[f"torchvision's {name}"] = (pair, stages[name])
    return found


def main() -> None:
    """The command."""
    torch.manual_seed(0)
    images, labels = torch.rand(4, 3, 32, 32).cuda(), torch.arange(4).cuda()
    for name, (experts, stage) in networks().items():
        for batching in ("loop", "vmap"):
            model = ImmunityMoE.from_experts(experts, stage=stage, batching=batching).cuda()
            if any(isinstance(part, nn.Dropout) for part in model.modules()):
                model.experts.apply(lambda part: setattr(part, "p", 0.0) if isinstance(part, nn.Dropout) else None)
            optimizer = SGD(model.parameters(), 0.01, 0.9, fused=True)
            step = TrainStep(model, FusedImmunityLoss(), optimizer, clip_grad_norm=1.0)
            measured = [step(images, labels) for _ in range(2)][-1]
            adversarial = pgd(model.eval(), images, labels, steps=2)
            assert measured.isfinite().all(), name
            assert float((adversarial - images).abs().max()) <= 8 / 255, name
            print(f"{name}, {batching}: loss {float(measured[0]):.3f}", flush=True)


if __name__ == "__main__":
    main()
