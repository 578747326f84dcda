"""Mistakes that are easily made, each made on purpose, and the line that says what is wrong and what to do.

    pip install '.[train]'
    python examples/messages.py

What is no mistake any more is here, too: networks with outputs in a tuple, one number for a square, layers followed by
an operation in place, attention.
"""

import argparse
import contextlib
import io
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from immunity_fast import FusedImmunityLoss, ImmunityMoE, capture_activations, evaluate, export
from immunity_fast.attacks import pgd
from immunity_fast.runtime import cli
from immunity_fast.runtime.compilation import Compiled

SIDE = 16  # of the images, in pixels
LABELS = torch.tensor([0, 1, 2, 3])


def images() -> Tensor:
    return torch.rand(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 12 * 12, 4))


def hooked(networks: list[nn.Sequential], detach: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    """Logits of the networks, and what plain hooks keep of the layer "2"."""
    kept: list[Tensor] = []
    for each in networks:
        each[2].register_forward_hook(
            lambda _module, _inputs, output: kept.append(output.detach() if detach else output)
        )
    return [each(images()) for each in networks], kept


class Wrapping(nn.Module):
    """The network inside of a module that puts its logits into something else, or calls a layer twice."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.network, self.how = network(), how
        self.again = nn.Conv2d(8, 8, 3, padding=1)
        self.aside = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> object:
        if self.how == "in place":
            maps = self.network[2](self.network[:2](x))
            return self.network[3:](maps.relu_())
        if self.how == "twice":
            return self.network[2:](self.again(self.again(self.network[:2](x))))
        logits = self.network(x)
        return (logits, self.aside(x.mean((2, 3)))) if self.how == "tuple" else {"scores": logits}


class Attention(nn.Module):
    """Patches that look at each other, by attention's fast kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.qkv, self.head = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, 24), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        query, key, value = self.qkv(tokens)[:, None].chunk(3, -1)
        logits: Tensor = self.head(nn.functional.scaled_dot_product_attention(query, key, value)[:, 0].mean(1))
        return logits


def loss_of(logits: list[Tensor], activations: list[Tensor], labels: Tensor = LABELS) -> Tensor:
    loss: Tensor = FusedImmunityLoss(size=SIDE)(logits, activations, labels)
    return loss


def captured(networks: list[nn.Module], layer: str) -> Tensor:
    return loss_of(*capture_activations(networks, layer)(images()))


# Mistakes


def frozen_trunk() -> object:
    networks = [network(), network()]
    for each in networks:
        each[:3].requires_grad_(False)
    return loss_of(*hooked(networks))


def detached() -> object:
    return loss_of(*hooked([network(), network()], detach=True))


def no_grad() -> object:
    with torch.no_grad():
        return captured([network(), network()], "2")


def inference_mode() -> object:
    with torch.inference_mode():
        return captured([network(), network()], "2")


def disorder() -> object:
    logits, activations = hooked([network(), network()])
    return loss_of(logits, activations[::-1])


def attention_by_hooks() -> object:
    networks, kept = [Attention(), Attention()], []
    for each in networks:
        each.patches.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    return loss_of([each(images()) for each in networks], kept)


def no_logits() -> object:
    return captured([Wrapping("dictionary"), Wrapping("dictionary")], "network.2")


def layer_that_is_none() -> object:
    return captured([network(), network()], "layer2")


def layer_called_twice() -> object:
    return captured([Wrapping("twice"), Wrapping("twice")], "again")


def numpy_images() -> object:
    model = ImmunityMoE.from_experts([network(), network()], stage="2", image_size=SIDE)
    return model(images().numpy())


def numpy_images_attacked() -> object:
    model = ImmunityMoE.from_experts([network(), network()], stage="2", image_size=SIDE)
    return pgd(model.eval().deterministic(), images().numpy(), LABELS)


def bytes_as_images() -> object:
    model = ImmunityMoE.from_experts([network(), network()], stage="2", image_size=SIDE)
    return model((255 * images()).byte())


def another_size() -> object:
    return ImmunityMoE.from_experts([network(), network()], stage="2", image_size=64)


def size_of_a_word() -> object:
    return FusedImmunityLoss(size="large")  # type: ignore[arg-type]


def gate_that_draws() -> object:
    model = ImmunityMoE.from_experts([network(), network()], stage="2", image_size=SIDE)
    return pgd(model.eval(), images(), LABELS, steps=1)


def exported_gate_that_draws() -> object:
    model = ImmunityMoE.from_experts([network(), network()], stage="2", image_size=SIDE)
    return export(model, "model.onnx", gate="call")  # type: ignore[arg-type]


def not_compiled() -> object:
    def step(x: Tensor) -> Tensor:
        return x + float(input_of_the_user(x))

    return Compiled(step, "on", torch.device("cpu"))(images())


def input_of_the_user(x: Tensor) -> str:
    """What no compiler can see through."""
    return (sys.stdin.encoding and str(x.sum().item())) or "0"


def evaluated_at_another_size() -> object:
    """`python -m immunity_fast.evaluate messages:network --dataset folder …`, on a folder of larger images."""
    with tempfile.TemporaryDirectory() as place:
        for index in range(8):
            file = Path(place) / "images" / "test" / str(index % 4) / f"{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (24, 24), (index, 0, 0)).save(file)
            other = Path(str(file).replace("test", "train"))
            other.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (24, 24), (index, 1, 0)).save(other)
        where = ["--dataset", "folder", "--data", f"{place}/images", "--out", f"{place}/out", "--device", "cpu"]
        return command([f"{Path(__file__).stem}:network", *where, "--attacks", "fgsm", "--masking-images", "0"])


def command(arguments: list[str]) -> str:
    """What `python -m immunity_fast.evaluate` says where it stops."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        cli.run_command(lambda: evaluate.main(arguments))
    raise SystemExit(said.getvalue().strip())


MISTAKES: dict[str, Callable[[], object]] = {
    "hooks behind a trunk that is frozen": frozen_trunk,
    "activations that a hook has detached": detached,
    "the loss under torch.no_grad": no_grad,
    "the loss in torch.inference_mode": inference_mode,
    "activations of one expert at the place of another": disorder,
    "attention's fast kernel behind plain hooks": attention_by_hooks,
    "a network whose dictionary has no logits": no_logits,
    "a layer that the network does not have": layer_that_is_none,
    "a layer that is called twice": layer_called_twice,
    "images as an array of NumPy": numpy_images,
    "images as an array of NumPy, attacked": numpy_images_attacked,
    "images as bytes": bytes_as_images,
    "a mixture for images of another size than its networks": another_size,
    "a size that is none": size_of_a_word,
    "gradients through a gate that draws": gate_that_draws,
    "a file of a gate that draws": exported_gate_that_draws,
    "a function that cannot be compiled": not_compiled,
    "evaluate without --image-size": evaluated_at_another_size,
}

# No mistakes


def no_mistakes() -> dict[str, bool]:
    """What was one, and whether it works."""
    torch.manual_seed(0)
    frozen = [network(), network()]
    for each in frozen:
        each[:3].requires_grad_(False)
    in_place = [Wrapping("in place"), Wrapping("in place")]
    layers = [(each.network[:3](images()), each.network[3:]) for each in in_place]
    logits = [head(maps.relu()) for maps, head in layers]
    same = loss_of(logits, [maps for maps, _ in layers])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        attention = captured([Attention(), Attention()], "patches")
    square = FusedImmunityLoss(size=SIDE).size == (SIDE, SIDE)
    return {
        "size=16 is a square": square,
        "networks that return a tuple": bool(captured([Wrapping("tuple"), Wrapping("tuple")], "network.2").isfinite()),
        "a frozen trunk, captured": bool(captured(frozen, "2").isfinite()),
        "a layer with an operation in place behind it, captured": bool(
            torch.allclose(captured(in_place, "network.2"), same)
        ),
        "attention, captured: by its math kernel, with a warning": bool(attention.isfinite())
        and any("math kernel" in str(each.message) for each in said),
    }


def line_of(mistake: Callable[[], object]) -> str:
    """What a mistake is told in: an error's line, or a warning's."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            mistake()
        except (Exception, SystemExit) as error:
            return f"{type(error).__name__}: {error}".removeprefix("SystemExit: ")
    return "; ".join(f"{each.category.__name__}: {each.message}" for each in said) or "nothing was said"


def main() -> None:
    argparse.ArgumentParser(description="Mistakes, and the line that each gives.").parse_args()
    torch.manual_seed(0)
    for name, mistake in MISTAKES.items():
        print(f"{name}\n    {line_of(mistake)}")
    print("\nWhat is none any more:")
    for name, works in no_mistakes().items():
        print(f"    {name}: {'works' if works else 'does not work'}")


if __name__ == "__main__":
    main()
