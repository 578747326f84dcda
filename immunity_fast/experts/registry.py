"""Architectures by name: ours, torchvision's, timm's, whatever Python can import, and genotype files.

A mixture of different architectures is a list of names with commas between, `resnet18,torchvision:mobilenet_v3_small`.
What a run keeps of it is that text; `resolve` puts what a genotype file says into the place of its name.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence

from torch import nn

from immunity_fast.experts import genotypes, libraries
from immunity_fast.experts.darts import advrush, pdarts
from immunity_fast.experts.densenet import densenet121
from immunity_fast.experts.googlenet import googlenet
from immunity_fast.experts.imported import imported, made, names_import
from immunity_fast.experts.libraries import LIBRARIES
from immunity_fast.experts.resnet import resnet8, resnet18
from immunity_fast.experts.robnet import robnet_free, robnet_large, robnet_large_v2
from immunity_fast.experts.staged import StagedNetwork
from immunity_fast.experts.stems import Stem
from immunity_fast.experts.widths import split_width
from immunity_fast.runtime.checks import check_choice, check_whole

_WITH_STEMS: dict[str, Callable[[int, Stem, int, float], StagedNetwork]] = {
    "resnet18": resnet18,
    "googlenet": googlenet,
    "densenet121": densenet121,
}
_BUILDERS: dict[str, Callable[[int, int, float], StagedNetwork]] = {
    "resnet8": resnet8,
    "pdarts": pdarts,
    "advrush": advrush,
    "robnet_free": robnet_free,
    "robnet_large": robnet_large,
    "robnet_large_v2": robnet_large_v2,
}

WITH_STEMS: tuple[str, ...] = tuple(_WITH_STEMS)
"""The architectures that have an ImageNet form besides the CIFAR form."""

NAMES: tuple[str, ...] = (*_WITH_STEMS, *_BUILDERS)
"""The architectures that `create` knows by a name of ours."""

FORMS = (
    "one of them with a width (resnet8x1.5), torchvision:NAME, timm:NAME, module.path:callable, "
    "or a genotype file, ….json"
)
_LONGEST = 60  # characters of a file's name


def create(
    name: str,
    num_classes: int = 10,
    *,
    stem: Stem = "cifar",
    image_size: int | tuple[int, int] | None = None,
    channels: int = 3,
) -> nn.Module:
    """A freshly initialised network: images (B, channels, H, W) to logits (B, num_classes).

    Of ours it is a `StagedNetwork`. Of a library it has random weights: nothing is downloaded. What
    `module.path:callable` names is imported, which runs that module's code, and is called with `num_classes=` if it
    takes that, else with the number if it requires one argument, else without any; and with `in_channels=`, as
    `imported.made` says.

    Args:
        name: one of `NAMES`; one of them, `x` and a width, by which all numbers of channels of the published network
            are multiplied, as `resnet8x1.73`; `torchvision:NAME` or `timm:NAME`; `module.path:callable`; the path of a
            genotype file, `….json`; or the text of one, as `resolve` gives it.
        num_classes: K ≥ 2.
        stem: "cifar" for small images or "imagenet" for large ones, of `WITH_STEMS`; others have one form.
        image_size: the images' side or (H, W), for networks that are built for one size, as many transformers are.
        channels: of the images: 3, 1 for grey ones, or any other number. torchvision's networks, which take 3, get
            another first convolution, see `channels.adapted`.

    Raises:
        ValueError: `name` is none of these, what it names cannot be made, the genotype is wrong, or `num_classes` is
            below 2 or `channels` below 1.
        ModuleNotFoundError: the library is not installed.
    """
    check_choice("stem", stem, Stem)
    check_known(name)
    if num_classes < 2:
        raise ValueError(f"num_classes: expected at least 2, got {num_classes}")
    check_whole("channels", channels, 1)
    own, times = split_width(name, NAMES)
    if own in _WITH_STEMS:
        return _WITH_STEMS[own](num_classes, stem, channels, times)
    if own in _BUILDERS:
        return _BUILDERS[own](num_classes, channels, times)
    if name.startswith("{"):
        return genotypes.parse(name)(num_classes, in_channels=channels)
    if name.endswith(".json"):
        return genotypes.load(name)(num_classes, in_channels=channels)
    if library := _library(name):
        sides = (image_size, image_size) if isinstance(image_size, int) else image_size
        return libraries.create(library, name.partition(":")[2], num_classes, sides, channels)
    return made(name, num_classes, channels)


def is_ours(name: str) -> bool:
    """Whether a name is one of `NAMES`, with a width or without, or a genotype's text: nothing of others is run.

    Raises:
        ValueError: what stands where a width would be is none.
    """
    return name.startswith("{") or split_width(name, NAMES)[0] in NAMES


def has_stems(name: str) -> bool:
    """Whether a name is one of `WITH_STEMS`, with a width or without.

    Raises:
        ValueError: what stands where a width would be is none.
    """
    return split_width(name, NAMES)[0] in WITH_STEMS


def split_names(arch: str) -> tuple[str, ...]:
    """The names of a list with commas between; those inside of a genotype's text do not count.

    Raises:
        ValueError: a name is empty, or a genotype's text does not end.
    """
    if arch.endswith(".json") and os.path.exists(arch):  # a file whose name has a comma
        return (arch,)
    names: list[str] = []
    rest = arch.strip()
    while True:
        if rest.startswith("{"):
            try:
                _, end = json.JSONDecoder().raw_decode(rest)
            except (ValueError, RecursionError):
                return (*names, rest)  # the genotype's reader says what is wrong with it
        else:
            end = rest.find(",") if "," in rest else len(rest)
        name, after = rest[:end].strip(), rest[end:].strip()
        if not name or (after and not after.startswith(",")):
            raise ValueError(f"arch: expected names with commas between, got {arch!r}")
        names.append(name)
        if not after:
            return tuple(names)
        rest = after[1:].strip()


def repeated(arch: str | Sequence[str], num_experts: int) -> tuple[str, ...]:
    """The architecture of each of N experts: the names, in turn.

    Args:
        arch: names with commas between, or a sequence of them.
        num_experts: N.

    Raises:
        ValueError: more names than experts.
    """
    names = split_names(arch) if isinstance(arch, str) else tuple(arch)
    if len(names) > num_experts:
        raise ValueError(f"num_experts: expected at least {len(names)}, as many as there are names, got {num_experts}")
    return tuple(names[index % len(names)] for index in range(num_experts))


def counted(names: Sequence[str], num_experts: int) -> dict[str, int]:
    """How many of N experts are of each architecture, N being any number: nothing is made for each.

    Args:
        names: of the architectures, which take turns; a name may come twice.
        num_experts: N, at least as many as there are names.
    """
    rounds, more = divmod(num_experts, len(names))
    counts: Counter[str] = Counter()
    for index, name in enumerate(names):
        counts[name] += rounds + (index < more)
    return dict(counts)


def resolve(arch: str) -> str:
    """What a run keeps of an architecture's name: of a genotype file its text, so that the run does without the file.

    Of names with commas between, that of each.

    Raises:
        ValueError: there is no such architecture, or the genotype is wrong.
        ModuleNotFoundError: a library is not installed.
    """
    kept = []
    for name in split_names(arch):
        check_known(name)
        if names_import(name) and not _library(name):
            imported(name)
        kept.append(genotypes.text(os.path.expanduser(name)) if name.endswith(".json") else name)
    return ",".join(kept)


def title(arch: str, num_experts: int = 1) -> str:
    """An architecture, or N experts of some, as people read it: "3 × resnet8 + 2 × timm:resnet18".

    Args:
        arch: a name, also where `resolve` has made a long text of it; or several with commas between.
        num_experts: N; where it is 1 only the names are said.
    """
    words = [genotypes.title(name) if name.startswith("{") else name for name in split_names(arch)]
    if num_experts == 1:
        return " + ".join(words)
    counts = counted(words, max(num_experts, len(words)))
    return " + ".join(f"{count} × {word}" for word, count in counts.items())


def file_title(arch: str) -> str:
    """`title` as a part of a file's name: without colons, spaces and slashes, and not too long."""
    text = re.sub(r"[^\w.+-]", "-", title(arch).replace(" + ", "+"))
    if len(text) <= _LONGEST:
        return text
    return f"{text[: _LONGEST - 5]}-{hashlib.sha256(text.encode()).hexdigest()[:4]}"


def imports_code(arch: str) -> tuple[str, ...]:
    """Those names of an architecture that are `module.path:callable`, whose making runs code of that module."""
    return tuple(name for name in split_names(arch) if _is_import(name))


def check_trusted(place: object, arch: str, trust_code: bool) -> None:
    """Check that an architecture of a file may be made: `module.path:callable` runs code of that module.

    Args:
        place: where it was read, for the message.
        arch: what a run's settings or a checkpoint say.
        trust_code: whether the user trusts where the file comes from.

    Raises:
        ValueError: it runs code that is not trusted.
    """
    names = imports_code(arch)
    if names and not trust_code:
        raise ValueError(
            f"{place}: its architecture {', '.join(names)} is code that would be imported and run; where you trust it, "
            "add --trust-code (in Python trust_code=True)"
        )


def check_form(arch: str) -> None:
    """Check that each name of an architecture can be one; no library is asked, nothing is imported.

    Raises:
        ValueError: one cannot; or a genotype's text is wrong.
    """
    for name in split_names(arch):
        if name.startswith("{"):
            genotypes.parse(name)
        elif not is_ours(name) and not names_import(name) and not re.fullmatch(r"timm:[\w.-]+", name):
            raise ValueError(f"name: expected one of {', '.join(NAMES)}, {FORMS}, got {name!r}{_likely(name)}")


def check_known(name: str) -> None:
    """Check that a name is an architecture's; a library is asked for its names, nothing of the user's is imported.

    Raises:
        ValueError: it is none.
        ModuleNotFoundError: the library is not installed.
    """
    if is_ours(name) or name.endswith(".json"):
        return
    if library := _library(name):
        # timm's have a tag of the weights behind a dot, which changes nothing where none are loaded.
        if name.partition(":")[2].partition(".")[0] in libraries.names(library):
            return
        raise ValueError(f"name: expected a network of {library}, got {name!r}{_likely(name)}")
    if not names_import(name):
        raise ValueError(f"name: expected one of {', '.join(NAMES)}, {FORMS}, got {name!r}{_likely(name)}")


def _library(name: str) -> str | None:
    prefix, colon, _ = name.partition(":")
    return prefix if colon and prefix in LIBRARIES else None


def _is_import(name: str) -> bool:
    return not name.startswith("{") and not name.endswith(".json") and _library(name) is None and ":" in name


def _likely(name: str) -> str:
    """What may have been meant, of all libraries that are installed, as the end of a message."""
    word = name.rpartition(":")[2].lower()
    known = {own: own for own in reversed(NAMES)}
    for library in LIBRARIES:
        try:
            known |= {f"{library}:{each}": each for each in libraries.names(library)}
        except ModuleNotFoundError:
            continue
    asked = _library(name)
    first = [full for full, bare in known.items() if bare == word]
    first += [full for full, bare in known.items() if word and bare.startswith(word) and full not in first]
    close = difflib.get_close_matches(word, list(dict.fromkeys(known.values())), n=3, cutoff=0.7)
    first += [full for each in close for full, bare in known.items() if bare == each and full not in first]
    first.sort(key=lambda full: asked is not None and _library(full) != asked)
    return f"; did you mean {', '.join(first[:4])}?" if first else ""
