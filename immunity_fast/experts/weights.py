"""Weights from a file: which network's or mixture's they are, under which names, and how they fit an expert."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from immunity_fast.experts.channels import adapted, is_stem
from immunity_fast.experts.widths import split_width

WRAPPERS = ("state_dict", "model_state_dict", "model")  # under which training scripts keep a state dict
PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and of torch.compile
# Of what an expert has no use for: torchvision's auxiliary classifiers, and the normalisation of `ImmunityMoE.unstack`.
_IGNORED = re.compile(r"(aux1|aux2|AuxLogits|normalize)\.")
_SHOWN = 3  # names in a message

# torchvision's names, which are timm's, too, and ours; the first that matches. For ImageNet forms.
_TRANSLATIONS: dict[str, tuple[tuple[str, str], ...]] = {
    "resnet18": (
        (r"conv1\.(.*)", r"stem.conv.\1"),
        (r"bn1\.(.*)", r"stem.bn.\1"),
        (r"(layer\d\.\d)\.downsample\.(.*)", r"\1.shortcut.\2"),
        (r"fc\.(.*)", r"classifier.1.\1"),
    ),
    "googlenet": (
        (r"conv1\.(.*)", r"stem.0.\1"),
        (r"conv2\.(.*)", r"stem.2.\1"),
        (r"conv3\.(.*)", r"stem.3.\1"),
        (r"inception([345][a-e])\.branch1\.(.*)", r"inception<\1>.branch1.\2"),
        (r"inception([345][a-e])\.branch2\.(.*)", r"inception<\1>.branch3.\2"),
        (r"inception([345][a-e])\.branch3\.(.*)", r"inception<\1>.branch5.\2"),
        (r"inception([345][a-e])\.branch4\.(.*)", r"inception<\1>.branch_pool.\2"),
        (r"fc\.(.*)", r"classifier.1.\1"),
    ),
    "densenet121": (
        (r"features\.conv0\.(.*)", r"stem.conv.\1"),
        (r"features\.norm0\.(.*)", r"stem.bn.\1"),
        (r"features\.denseblock(\d)\.denselayer(\d+)\.(norm|conv)\.?([12])\.(.*)", r"block\1.<\2>.features.<\3\4>.\5"),
        (r"features\.transition(\d)\.(norm|conv)\.(.*)", r"block<\1>.0.<\2>.\3"),
        (r"features\.norm5\.(.*)", r"classifier.0.\1"),
        (r"classifier\.(weight|bias)", r"classifier.3.\1"),
    ),
}
_PARTS = {"norm1": "0", "conv1": "2", "norm2": "3", "conv2": "5", "norm": "0", "conv": "2"}  # of densenet121


class WeightsFile(NamedTuple):
    """What a file holds.

    Args:
        path: the file.
        tensors: by name, on the CPU.
        sha256: of the file, in hexadecimal digits.
        mixture: whether the names are those of a mixture of ours, of N ≥ 1 experts.
    """

    path: Path
    tensors: dict[str, Tensor]
    sha256: str
    mixture: bool


class Fitted(NamedTuple):
    """A file's weights as an expert's.

    Args:
        tensors: by the expert's names; those of a head that was replaced are not among them.
        replaced: the names of that head.
        classes: how many the file's head has; 0 where it has none.
        adapted: the name of what was made for other channels of the images, see `channels.adapted`; "" where none was.
        channels: those that the file's network takes, where one was.
    """

    tensors: dict[str, Tensor]
    replaced: tuple[str, ...]
    classes: int
    adapted: str = ""
    channels: int = 0


def read(path: str | os.PathLike[str]) -> WeightsFile:
    """Read a state dict; no code of the file's is run.

    Args:
        path: `.safetensors`, among them a checkpoint of a run; or what `torch.save` wrote, `.pt`, `.pth`, `.bin` or
            `.ckpt`, which is read with `weights_only=True`. A state dict may lie under "state_dict", "model_state_dict"
            or "model", and its names may begin with "module." or "_orig_mod.".

    Raises:
        ValueError: it cannot be read, or holds no state dict.
        ModuleNotFoundError: safetensors is not installed.
    """
    place = Path(path).expanduser()
    try:
        with place.open("rb") as file:
            digest = _digest(file)
        if place.suffix == ".safetensors":
            found, ours = _read_safetensors(place)
        else:
            found, ours = torch.load(place, map_location="cpu", weights_only=True), False
    except OSError as error:
        raise ValueError(f"{place}: {error.strerror or error}") from error
    except ModuleNotFoundError:
        raise
    except pickle.UnpicklingError as error:
        if "GLOBAL" not in str(error):
            raise ValueError(f"{place}: expected a file of weights, got one that is broken") from error
        raise ValueError(
            f"{place}: expected a state dict, tensors by name, got a file that holds other objects, which would run "
            "code: save model.state_dict() instead"
        ) from error
    except Exception as error:  # whatever the readers may raise
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{place}: expected a file of weights, got {type(error).__name__}: {reason}") from error
    tensors = _state_dict(place, found)
    if ours:
        group = "ema" if any(name.startswith("ema/") for name in tensors) else "model"
        tensors = {name.partition("/")[2]: value for name, value in tensors.items() if name.startswith(f"{group}/")}
    wrong = next((name for name, value in tensors.items() if not bool(value.isfinite().all())), None)
    if wrong is not None:
        raise ValueError(f"{place}: expected finite weights, got NaN or infinite ones in {wrong}")
    return WeightsFile(place, tensors, digest, any(name.startswith("experts.") for name in tensors))


def translated(arch: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under our names, where `arch` is of `WITH_STEMS` and they have torchvision's or timm's names.

    With a width the names are the same, and only tensors of that width will fit.
    """
    own, _ = split_width(arch, tuple(_TRANSLATIONS))
    rules = [(re.compile(pattern), target) for pattern, target in _TRANSLATIONS.get(own, ())]
    return {_translated(own, rules, name): value for name, value in tensors.items()}


def fitted(file: WeightsFile, arch: str, own: Mapping[str, Tensor], num_classes: int, channels: int = 3) -> Fitted:
    """The weights of one network as an expert's.

    A classifier head of another number of classes, or none, is left out: the expert keeps its own. A first convolution
    for other channels of the images becomes one for these, see `channels.adapted`.

    Args:
        file: of one network.
        arch: the expert's architecture, for the message and for torchvision's names of ours.
        own: the expert's tensors by name.
        num_classes: K.
        channels: of the images.

    Raises:
        ValueError: anything else is missing, unexpected, or of another shape; one line with the first of each.
    """
    given = translated(arch, file.tensors)
    if not own.keys() & given.keys():
        given = {name.removeprefix("expert."): value for name, value in given.items()}  # of `ImmunityMoE.unstack`
    given = {name: value for name, value in given.items() if name in own or not _IGNORED.match(name)}
    deep = ("", 0)
    first = next((name for name in own if name in given and given[name].shape != own[name].shape), "")
    if first and is_stem(own[first], given[first], channels):
        deep = first, given[first].shape[1]
        given[first] = adapted(given[first], channels)
    missing = [name for name in own if name not in given and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in given if name not in own]
    misshaped = [name for name in given if name in own and given[name].shape != own[name].shape]
    last = list(own)[-1].rpartition(".")[0] if own else ""
    head = [name for name in misshaped if _is_head(own[name], given[name], num_classes)]
    rows = {len(given[name]) for name in head}
    if head == misshaped and not missing and not unexpected and len(rows) <= 1:
        kept = {name: value for name, value in given.items() if name not in head}
        return Fitted(kept, tuple(head), rows.pop() if rows else num_classes, *deep)
    of_last = [name for name in missing if name.rpartition(".")[0] == last and len(own[name]) == num_classes]
    if missing and missing == of_last and not misshaped and not unexpected:
        return Fitted(given, tuple(missing), 0, *deep)
    wrong = []
    if missing:
        wrong.append(f"without {_listed(missing)}")
    if unexpected:
        wrong.append(f"with {_listed(unexpected)}, which it does not have")
    if misshaped:
        first = misshaped[0]
        shapes = f"{tuple(given[first].shape)} where {tuple(own[first].shape)} was expected"
        wrong.append(f"with {first} of shape {shapes}{_more(misshaped, 1)}")
    # Names that were translated are those of the ImageNet form: a stem that does not fit is that for CIFAR.
    other_form = any(name.startswith("stem.") and name not in file.tensors for name in unexpected)
    hint = "; torchvision's weights are of the form that --stem imagenet has" if other_form else ""
    raise ValueError(f"{file.path}: expected the weights of {arch}, got a file {', '.join(wrong)}{hint}")


def experts_of(file: WeightsFile) -> list[dict[str, Tensor]]:
    """Each expert's tensors of a mixture's file, stacked or one after another."""
    own = {name.removeprefix("experts."): value for name, value in file.tensors.items() if name.startswith("experts.")}
    if all(re.match(r"\d+\.", name) for name in own) and {"0", "1"} <= {name.partition(".")[0] for name in own}:
        numbers = sorted({int(name.partition(".")[0]) for name in own})
        return [
            {name.partition(".")[2]: value for name, value in own.items() if name.partition(".")[0] == str(number)}
            for number in numbers
        ]
    counts = {len(value) if value.dim() else 0 for value in own.values()}
    if len(counts) != 1:
        raise ValueError(f"{file.path}: expected tensors (N, …) of N experts, got first axes of {sorted(counts)}")
    return [{name: value[index] for name, value in own.items()} for index in range(counts.pop())]


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], bool]:
    try:
        from safetensors import safe_open
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path}: needs safetensors, which is not installed: pip install safetensors"
        ) from error
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dictionary
        return tensors, "immunity_fast" in (file.metadata() or {})


def _digest(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()


def _state_dict(path: Path, found: Any) -> dict[str, Tensor]:
    for wrapper in WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(wrapper), Mapping):
            found = found[wrapper]
    if not isinstance(found, Mapping):
        raise ValueError(f"{path}: expected a state dict, tensors by name, got {type(found).__name__}")
    tensors = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
    if not tensors:
        names = ", ".join(map(str, list(found)[:_SHOWN])) or "nothing"
        raise ValueError(f"{path}: expected a state dict, tensors by name, got {names}")
    for prefix in (*PREFIXES, *PREFIXES):  # one may be inside of the other
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def _translated(arch: str, rules: Sequence[tuple[re.Pattern[str], str]], name: str) -> str:
    for pattern, target in rules:
        if match := pattern.fullmatch(name):
            return _finished(arch, match.expand(target))
    return name


def _finished(arch: str, name: str) -> str:
    """A translation's numbers in brackets put right: children count from 0, and pooling comes before some."""
    if arch == "googlenet":
        name = re.sub(r"\.(conv|bn)\.", lambda match: f".{('conv', 'bn').index(match[1])}.", name)
        stage = re.search(r"<(\d)([a-e])>", name)
        if stage:
            child = "abcde".index(stage[2]) + (stage[1] != "3")
            name = name.replace(stage[0], f"{stage[1]}.{child}")
    elif arch == "densenet121":
        name = re.sub(r"^block<(\d)>", lambda match: f"block{int(match[1]) + 1}", name)
        name = re.sub(
            r"^block(\d)\.<(\d+)>", lambda match: f"block{match[1]}.{int(match[2]) - (match[1] == '1')}", name
        )
        name = re.sub(r"<(\w+)>", lambda match: _PARTS[match[1]], name)
    return name


def _is_head(own: Tensor, given: Tensor, num_classes: int) -> bool:
    """Whether a tensor is one of a classifier for another number of classes."""
    return (
        own.dim() == given.dim() > 0 and len(own) == num_classes and own.shape[1:] == given.shape[1:] and len(given) > 0
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + _more(names, _SHOWN)


def _more(names: Sequence[str], shown: int) -> str:
    return f" and {len(names) - shown} more" if len(names) > shown else ""
