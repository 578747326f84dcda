"""Adversarial images in a file: the images, what they were made of and by, and a claim that is checked on reading."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from immunity_fast.attacks.checks import check_images
from immunity_fast.attacks.descent import Attack, checked_bounds, radius_of
from immunity_fast.attacks.projections import UNIT, Bounds, Norm, outside
from immunity_fast.attacks.radii import Given, for_each_image, one_or_each
from immunity_fast.runtime.checks import check_choice, is_number
from immunity_fast.runtime.files import abbreviated, parse_json, write_atomically

FORMAT = 1


@dataclass(frozen=True)
class AdversarialImages:
    """What `load_adversarial` has read.

    Args:
        adversarial: (B, C, H, W) of the dtype that they had, on the CPU.
        labels: (B,) int64.
        eps: radius of the balls that they are said to be in; or of each, (B,) float64.
        norm: of the balls.
        bounds: the lowest and the highest value of a pixel.
        attack: what was said of the attack; empty where nothing was.
        model_hash: of the attacked module, see `hash_of_weights`; "" where it is not known.
    """

    adversarial: Tensor
    labels: Tensor
    eps: float | Tensor
    norm: Norm
    bounds: Bounds
    attack: dict[str, Any]
    model_hash: str


def save_adversarial(
    path: str | Path,
    adversarial: Tensor,
    labels: Tensor,
    *,
    eps: Given | None = None,
    norm: Norm = "Linf",
    bounds: Bounds = UNIT,
    attack: Attack | Mapping[str, Any] | None = None,
    model: object = None,
    images: Tensor | None = None,
) -> None:
    """Write adversarial images to one safetensors file, which only ever holds all of it.

    Args:
        path: of the file; what was there is replaced.
        adversarial: (B, C, H, W) floating-point, within the bounds.
        labels: (B,) integers.
        eps: radius of the balls, or (B,), of each; None is the attack's, or its default.
        norm: "Linf" or "L2"; of an `Attack` it is that one's.
        bounds: the lowest and the highest value of a pixel; of an `Attack` they are that one's.
        attack: the settings; or anything about it that JSON can hold.
        model: what was attacked; of a module the file holds a hash of the weights.
        images: (B, C, H, W), clean: the claim of the ball is checked before it is written.

    Raises:
        ModuleNotFoundError: safetensors is missing.
        ValueError: images out of bounds or of the ball, labels or radii of another shape.
        TypeError: no tensors; what JSON cannot hold.
        OSError: the file cannot be written.
    """
    save = _safetensors("save_adversarial").torch.save
    if isinstance(attack, Attack):
        norm, bounds, eps = attack.norm, attack.bounds, attack.radius if eps is None else eps
        loss = attack.loss if isinstance(attack.loss, str) else getattr(attack.loss, "__qualname__", "own")
        attack = asdict(attack) | {"loss": loss}
    check_choice("norm", norm, Norm)
    bounds = checked_bounds(bounds)
    radius, radii = one_or_each(eps)
    radius = radius_of(radius, norm, bounds) if radii is None else None
    _check_claim(adversarial, labels, radii if radius is None else radius, norm, bounds, images)
    tensors = {"adversarial": adversarial, "labels": labels.long()}
    if radii is not None:
        tensors["eps"] = radii.double()
    info = {
        "format": FORMAT,
        "eps": radius,
        "norm": norm,
        "bounds": bounds,
        "attack": dict(attack or {}),
        "model": hash_of_weights(model) if isinstance(model, nn.Module) else "",
    }
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_atomically(Path(path), save(copies, {"adversarial_images": json.dumps(info, sort_keys=True)}))


def load_adversarial(path: str | Path, *, images: Tensor | None = None, model: object = None) -> AdversarialImages:
    """Read what `save_adversarial` has written, bit for bit; nothing in the file is run.

    Args:
        path: of the file.
        images: (B, C, H, W), clean: the file's claim, that its images are in their balls, is checked.
        model: a module that is to be the attacked one, by its weights.

    Raises:
        ModuleNotFoundError: safetensors is missing.
        FileNotFoundError: there is no such file.
        ValueError: not such a file, images out of bounds or of their balls, other weights.
    """
    safetensors = _safetensors("load_adversarial")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file of adversarial images")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dictionary
            info = parse_json((file.metadata() or {}).get("adversarial_images", ""))
    except Exception as error:  # safetensors' own and, of a strange dtype or size, nearly any of PyTorch's
        raise ValueError(f"{path}: not a file of adversarial images ({' '.join(str(error).split())})") from error
    found = _read(path, tensors, info)
    try:
        _check_claim(found.adversarial, found.labels, found.eps, found.norm, found.bounds, images)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    if isinstance(model, nn.Module) and (own := hash_of_weights(model)) != found.model_hash:
        raise ValueError(
            f"model: expected the weights that {path} was made with, hash {found.model_hash[:12] or 'unknown'}, got "
            f"{own[:12]}"
        )
    return found


def _read(path: Path, tensors: dict[str, Tensor], info: Any) -> AdversarialImages:
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        raise ValueError(f"{path}: not a file of adversarial images of format {FORMAT}")
    eps: Any = tensors.pop("eps", info.get("eps"))
    checks = {
        "eps": isinstance(eps, Tensor) or is_number(eps),
        "norm": info.get("norm") in get_args(Norm),
        "bounds": isinstance(info.get("bounds"), list) and len(info["bounds"]) == 2,
        "attack": isinstance(info.get("attack"), dict),
        "model": isinstance(info.get("model"), str),
        "tensors": tensors.keys() == {"adversarial", "labels"},
    }
    for name, fine in checks.items():
        if not fine:
            raise ValueError(
                f"{path}: not a whole file of adversarial images: {name} was {abbreviated(info.get(name))}"
            )
    try:
        bounds = checked_bounds(tuple(info["bounds"]))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return AdversarialImages(
        tensors["adversarial"], tensors["labels"], eps, info["norm"], bounds, info["attack"], info["model"]
    )


def _check_claim(
    adversarial: Tensor, labels: Tensor, eps: float | Tensor | None, norm: Norm, bounds: Bounds, images: Tensor | None
) -> None:
    check_images(adversarial, labels, None, bounds)
    radius, radii = one_or_each(eps)
    each = for_each_image("eps", radii, adversarial)
    if each is None:
        radius = Attack(eps=radius, norm=norm, bounds=bounds).radius
    if images is None:
        return
    if images.shape != adversarial.shape or images.dtype != adversarial.dtype:
        raise ValueError(
            f"images: expected {adversarial.dtype} {tuple(adversarial.shape)}, as the adversarial ones, got "
            f"{images.dtype} {tuple(images.shape)}"
        )
    ball: Any = radius if each is None else each.cpu()
    further = outside(adversarial.cpu(), images.detach().cpu(), ball, norm)
    if bool(further.any()):
        first = int(further.nonzero()[0, 0])
        size = float(eps[first]) if isinstance(eps, Tensor) else radius
        raise ValueError(
            f"adversarial: expected images within {size} ({norm}) of `images`, got number {first} further away"
        )


def hash_of_weights(module: nn.Module) -> str:
    """A hash of a module's structure and of all of its tensors."""
    digest = hashlib.sha256(repr(module).encode())
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _safetensors(name: str) -> Any:
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{name} needs safetensors: pip install safetensors", name="safetensors") from error
    return safetensors
