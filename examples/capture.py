"""The immunity loss over three networks that have nothing in common: a ResNet, a ViT and a Swin Transformer.

    pip install '.[train]' timm
    python examples/capture.py

`capture_activations` finds where Grad-CAM looks in each, and what it sees there: maps (B, C, h, w), tokens (B, T, C)
with a class token before them, maps with their channels last. The loss brings their heatmaps to one size. Where timm is
not installed the ViT and the Swin Transformer are torchvision's.
"""

import argparse
import warnings

import torch
from torch import Tensor, nn
from torchvision import models

from immunity_fast import FusedImmunityLoss, capture_activations

SIDE = 48  # of the images, in pixels


def networks() -> dict[str, nn.Module]:
    """Three small networks of other kinds, with fresh weights."""
    resnet = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=4)
    resnet.maxpool = nn.Identity()  # for small images
    try:
        import timm
    except ImportError:
        vit = models.VisionTransformer(SIDE, 4, 3, 2, 32, 64, num_classes=4)
        nn.init.normal_(vit.heads.head.weight, std=0.1)  # zero in torchvision's: no logit would depend on the images
        swin = models.SwinTransformer([2, 2], 16, [1, 1], [1, 2], [3, 3], num_classes=4)
    else:
        small = {"num_classes": 4, "img_size": SIDE}
        vit = timm.create_model("vit_tiny_patch16_224", patch_size=4, embed_dim=32, depth=3, num_heads=2, **small)
        blocks = {"depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8), "window_size": 3, "embed_dim": 16}
        swin = timm.create_model("swin_tiny_patch4_window7_224", patch_size=2, **blocks, **small)
    return {"resnet": resnet, "vit": vit, "swin": swin}


def batch(samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise with a bright square in one of four quarters, which is the label."""
    labels = torch.randint(4, (samples,), generator=generator)
    images = 0.5 * torch.rand(samples, 3, SIDE, SIDE, generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        row, column = (SIDE // 2) * (label // 2) + 6, (SIDE // 2) * (label % 2) + 6
        image[:, row : row + 12, column : column + 12] += 0.5
    return images, labels


def main() -> None:
    parser = argparse.ArgumentParser(description="A ResNet, a ViT and a Swin Transformer, trained to look apart.")
    parser.add_argument("--steps", type=int, default=8, help="optimiser steps of 8 images (default: 8)")
    arguments = parser.parse_args()
    # That attention runs the kernel which can be differentiated twice; here it is what we want.
    warnings.filterwarnings("ignore", message="attention behind")
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    named = networks()
    captured = capture_activations(named.values())
    optimizer = torch.optim.AdamW(captured.parameters(), lr=1e-3)
    immunity_loss = FusedImmunityLoss(size=(SIDE, SIDE))

    for step in range(arguments.steps):
        images, labels = batch(8, generator)
        logits, activations = captured(images)
        loss, terms = immunity_loss(logits, activations, labels, return_terms=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 0:
            print(f"images {tuple(images.shape)}, heatmaps {SIDE}×{SIDE}")
            for name, layer, maps in zip(named, captured.layers, activations, strict=True):
                print(f"  {name:8}{layer:12} maps {tuple(maps.shape)}")
        if step in (0, arguments.steps - 1):
            values = {name.replace("_", " "): float(value.detach()) for name, value in terms._asdict().items()}
            addends = ", ".join(f"{name} {value:,.3f}" for name, value in values.items())
            print(f"step {step + 1}: loss {float(loss.detach()):.3f}; {addends}")


if __name__ == "__main__":
    main()
