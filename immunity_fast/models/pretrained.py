"""Mixtures in folders as Hugging Face's `PyTorchModelHubMixin` has them: config.json, model.safetensors, README.md.

The mixin itself would read weights as a pickle where there are no others, and pass over tensors that are missing. Here
a folder is data: each name, type, shape and dtype is checked, nothing is unpickled, and a network of `module:callable`
is imported only where that is said to be trusted.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

from torch import Tensor, nn

from immunity_fast.experts import resolve
from immunity_fast.models.card import PLACE, model_card
from immunity_fast.models.described import expert_tensors
from immunity_fast.models.gate import kind_of_gate
from immunity_fast.models.maps import MapLayout
from immunity_fast.models.noise import is_noise
from immunity_fast.runtime.files import abbreviated, parse_json, write_atomically

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
CARD = "README.md"
LIBRARY = "immunity_fast"
FORMAT = 1
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


class Saved(NamedTuple):
    """What a folder holds."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    card: str | None


def save(model: Any, folder: Path, place: str | None = None) -> None:
    """Write `ImmunityMoE.save_pretrained`'s files; a README.md that is there already stays.

    Args:
        model: an `ImmunityMoE`.
        folder: is made where it is missing.
        place: what the card calls it where it says how to load it.

    Raises:
        ModuleNotFoundError: safetensors is not installed.
        OSError: the folder cannot be written.
    """
    needs_safetensors("saving a model")
    from safetensors import torch as safetensors

    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder}: expected a folder, got a file")
    folder.mkdir(parents=True, exist_ok=True)
    # Copies: a tensor that stands under two names is written twice.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    write_atomically(folder / WEIGHTS, safetensors.save(tensors, {"format": "pt"}))
    write_atomically(folder / CONFIG, (json.dumps(config_of(model), indent=2, ensure_ascii=False) + "\n").encode())
    if not (folder / CARD).exists():
        card: str = model.card or model_card(model)
        write_atomically(folder / CARD, card.replace(f'"{PLACE}"', json.dumps(place or PLACE)).encode())


def push(model: Any, repository: str, *, private: bool | None, token: str | None, message: str) -> str:
    """Write the files into a repository of Hugging Face's hub; its address.

    Raises:
        ModuleNotFoundError: huggingface_hub is not installed.
        OSError: the hub cannot be reached, or does not take it.
    """
    api = _hub().HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        try:
            name = api.create_repo(repo_id=repository, private=private, exist_ok=True).repo_id
            save(model, Path(folder), name)
            return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message=message))
        except ModuleNotFoundError:  # safetensors
            raise
        except Exception as error:  # of the network, of the hub, of a name
            reason = f"{type(error).__name__}: {abbreviated(str(error))}"
            raise OSError(f"{repository}: the hub does not take it: {reason}") from error


def read(place: str | Path, *, revision: str | None = None, token: str | None = None) -> Saved:
    """What is in a folder, or in a repository of the hub.

    Raises:
        FileNotFoundError: there is no such folder, or a file is missing in it.
        ValueError: a file that is not what `save` writes; by file and name.
        ModuleNotFoundError: safetensors, or for the hub huggingface_hub, is not installed.
        OSError: the hub does not give the repository.
    """
    needs_safetensors("loading a model")
    folder = Path(place).expanduser()
    if not folder.is_dir():
        if isinstance(place, Path) or not REPOSITORY.fullmatch(place):
            raise FileNotFoundError(f"{place}: there is no such folder")
        folder = _downloaded(place, revision, token)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: expected {CONFIG} and {WEIGHTS}, got a folder without {name}")
    config = checked_config(folder / CONFIG)
    tensors = _tensors(folder / WEIGHTS)
    card = folder / CARD
    return Saved(folder, config, tensors, card.read_text("utf-8", errors="replace") if card.is_file() else None)


def config_of(model: Any) -> dict[str, Any]:
    """What of a mixture is no tensor, as a JSON object; mostly arguments of its class."""
    stage = model.stage
    layouts = model.layout if isinstance(model.layout, tuple) else (model.layout,)
    named = [layout if isinstance(layout, str) else None for layout in layouts]  # a function has no name
    return {
        "library": LIBRARY,
        "format": FORMAT,
        "arch": resolve(model.arch) if model.arch else "",
        "num_experts": model.num_experts,
        "num_classes": model.num_classes,
        "stage": stage if isinstance(stage, str) else list(stage),
        "layout": named if len(named) > 1 else named[0],
        "image_size": list(model.image_size),
        "channels": model.channels,
        "stem": model.stem,
        "switch": model.gate.switch,
        **({} if (gate := kind_of_gate(model.gate)) == "switch" else {"gate": gate}),
        **({} if model.noise is None else {"noise": list(model.noise)}),
        "normalized": not isinstance(model.normalize, nn.Identity),
        "classes": None if model.classes is None else list(model.classes),
    }


def _is_count(value: Any, least: int = 1) -> bool:
    return type(value) is int and least <= value < 2**63


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "library": lambda value: value == LIBRARY,
    "format": lambda value: value == FORMAT,
    "arch": lambda value: isinstance(value, str),
    "num_experts": _is_count,
    "num_classes": lambda value: _is_count(value, 2),
    "stage": lambda value: isinstance(value, str) or _are_texts(value),
    "layout": lambda value: all(each in (None, *get_args(MapLayout)) for each in _listed(value)),
    "image_size": lambda value: isinstance(value, list) and len(value) == 2 and all(map(_is_count, value)),
    "channels": _is_count,
    "stem": lambda value: value in (None, "cifar", "imagenet"),
    "switch": lambda value: value in ("call", "sample", "off", "mean"),
    "normalized": lambda value: isinstance(value, bool),
    "classes": lambda value: value is None or _are_texts(value),
}


def checked_config(file: Path) -> dict[str, Any]:
    """What a config.json says, each entry of the type that `config_of` gives it.

    Raises:
        ValueError: it is another's, or says something else; by file and name.
    """
    try:
        config = parse_json(file.read_bytes())
    except ValueError:
        config = None
    if not isinstance(config, dict) or config.get("library") != LIBRARY:
        raise ValueError(f"{file}: expected what save_pretrained of immunity_fast writes, got another file")
    if config.get("gate", "uniform") not in ("uniform", "selection"):
        raise ValueError(f"{file}: gate: expected uniform or selection, got {abbreviated(config['gate'])}")
    if "noise" in config and not is_noise(config["noise"]):
        raise ValueError(f"{file}: noise: expected two standard deviations, got {abbreviated(config['noise'])}")
    for name, is_right in _CHECKS.items():
        if name not in config:
            raise ValueError(f"{file}: {name}: expected an entry, got none")
        if not is_right(config[name]):
            raise ValueError(f"{file}: {name}: expected what save_pretrained writes, got {abbreviated(config[name])}")
    return config


def check_fits(saved: Saved) -> None:
    """Check that the experts' tensors are those described, before a wrong number of them fills memory.

    Raises:
        ValueError: they are not; by file and name.
    """
    file, config = saved.folder / WEIGHTS, saved.config
    own = {name.removeprefix("experts."): tensor for name, tensor in saved.tensors.items() if name[:8] == "experts."}
    count = config["num_experts"]
    if count > len(own) and not any(tensor.shape[:1] == (count,) for tensor in own.values()):
        raise ValueError(f"{file}: expected the tensors of {count} experts, got others")
    try:
        expected = expert_tensors(
            config["arch"],
            count,
            own,
            num_classes=config["num_classes"],
            image_size=tuple(config["image_size"]),
            stem=config["stem"] or "cifar",
            channels=config["channels"],
        )
    except (ValueError, RuntimeError, TypeError) as error:
        raise ValueError(f"{saved.folder}: describes a model that cannot be made ({error})") from error
    found, shapes = ({name: tuple(tensor.shape) for name, tensor in each.items()} for each in (own, expected))
    check_shapes(file, found, shapes, "experts.")


def check_shapes(
    file: Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], prefix: str = ""
) -> None:
    """Check that two sets of tensors have the same names and shapes.

    Raises:
        ValueError: they have not; by file and name.
    """
    for name in sorted(found.keys() | expected.keys()):
        had, wanted = (str(shapes.get(name, "none")) for shapes in (found, expected))
        if had != wanted:
            raise ValueError(f"{file}: {prefix}{name}: expected shape {wanted}, got {had}")


def fill(model: nn.Module, saved: Saved) -> None:
    """Give a new mixture the saved tensors, in their dtype.

    Raises:
        ValueError: they are another's, or have several floating-point dtypes; by file and name.
    """
    file = saved.folder / WEIGHTS
    own = model.state_dict()
    found, expected = ({name: tuple(value.shape) for name, value in each.items()} for each in (saved.tensors, own))
    check_shapes(file, found, expected)
    dtypes = {tensor.dtype for tensor in saved.tensors.values() if tensor.is_floating_point()}
    if len(dtypes) > 1:
        raise ValueError(f"{file}: expected one floating-point dtype, got {' and '.join(sorted(map(str, dtypes)))}")
    for dtype in dtypes:
        model.to(dtype)
    model.load_state_dict(saved.tensors)


def needs_safetensors(what: str) -> None:
    """Check that safetensors is installed.

    Raises:
        ModuleNotFoundError: it is not.
    """
    try:
        import safetensors  # noqa: F401
    except ImportError as error:
        raise ModuleNotFoundError(f"{what} needs safetensors: pip install safetensors ({error})") from error


def _tensors(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        return dict(load_file(file))
    except Exception as error:  # safetensors' own and, of a strange dtype or size, nearly any of PyTorch's
        raise ValueError(f"{file}: expected whole weights, got {' '.join(str(error).split())}") from error


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ModuleNotFoundError(
            f"Hugging Face's hub needs huggingface_hub: pip install huggingface_hub ({error})"
        ) from error
    return huggingface_hub


def _downloaded(repository: str, revision: str | None, token: str | None) -> Path:
    hub = _hub()
    try:
        return Path(
            hub.snapshot_download(repository, revision=revision, token=token, allow_patterns=[CONFIG, WEIGHTS, CARD])
        )
    except Exception as error:  # of the network, of the hub, of a name
        raise OSError(
            f"{repository}: there is no such folder here, and the hub does not give it: "
            f"{type(error).__name__}: {abbreviated(str(error))}"
        ) from error
