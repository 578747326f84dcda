"""Genotype files: the networks they make, and one line for everything that may be wrong with one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from immunity_fast import ImmunityMoE
from immunity_fast.experts import create, resolve, title
from immunity_fast.experts.darts import ADVRUSH, advrush, darts_network
from immunity_fast.experts.genotypes import load, reduced
from immunity_fast.experts.robnet import ROBNET_FREE, ROBNET_LARGE, robnet_free, robnet_network
from tests import grids

DARTS: dict[str, Any] = {
    "kind": "darts",
    "normal": [list(pair) for pair in ADVRUSH.normal],
    "reduce": [list(pair) for pair in ADVRUSH.reduce],
    "channels": 4,
    "cells": 6,
}
ROBNET: dict[str, Any] = {"kind": "robnet", "cells": list(ROBNET_LARGE), "channels": 4, "layers": 6}


def _file(folder: Path, description: object) -> Path:
    path = folder / "my_cell.json"
    path.write_text(json.dumps(description), encoding="utf-8")
    return path


def test_darts(tmp_path: Path) -> None:
    network = load(_file(tmp_path, DARTS))(3)
    assert repr(network) == repr(darts_network(ADVRUSH, 3, 4, 6))


def test_robnet(tmp_path: Path) -> None:
    assert repr(load(_file(tmp_path, ROBNET))(3)) == repr(robnet_network(ROBNET_LARGE, 3, 4, 6))
    free = ROBNET | {"cells": list(ROBNET_FREE[:6])}
    assert repr(load(_file(tmp_path, free))(3)) == repr(robnet_network(ROBNET_FREE[:6], 3, 4, 6))


@pytest.mark.exhaustive  # of `make test`, networks with fewer cells and channels compare whole ones, too
def test_published_networks_as_files(tmp_path: Path) -> None:
    free = {"kind": "robnet", "cells": list(ROBNET_FREE), "channels": 36, "layers": 20}
    with torch.device("meta"):
        published = load(_file(tmp_path, DARTS | {"channels": 36, "cells": 20}))(10)
        assert repr(published) == repr(advrush(10))
        assert repr(load(_file(tmp_path, free))(10)) == repr(robnet_free(10))


def test_a_file_is_read_once(tmp_path: Path) -> None:
    path = _file(tmp_path, ROBNET)
    build = load(path)
    path.unlink()
    first, second = build(3), build(3)
    assert not torch.equal(first.get_parameter("stem.0.weight"), second.get_parameter("stem.0.weight"))


def test_a_text_says_the_same_and_needs_no_file(tmp_path: Path) -> None:
    for description, expected in (
        (DARTS, darts_network(ADVRUSH, 3, 4, 6)),
        (ROBNET, robnet_network(ROBNET_LARGE, 3, 4, 6)),
    ):
        path = _file(tmp_path, description)
        name = resolve(str(path))
        path.unlink()
        assert json.loads(name) == description
        assert resolve(name) == name
        assert repr(create(name, 3)) == repr(expected)
    # However it is laid out in the file.
    path.write_text(json.dumps(ROBNET, indent=4), encoding="utf-8")
    assert resolve(str(path)) == name
    assert resolve("resnet8") == "resnet8"
    with pytest.raises(ValueError, match="expected one of resnet18"):
        resolve("resnet9")
    with pytest.raises(ValueError, match="channels"):
        create(name.replace('"channels":4', '"channels":0'))


def test_a_title_is_a_word_and_tells_genotypes_apart(tmp_path: Path) -> None:
    assert title("resnet8") == "resnet8"
    titles = [title(reduced(name, 6, 4)) for name in ("pdarts", "advrush", "robnet_large")]
    titles.append(title(reduced("pdarts", 8, 4)))
    assert len(set(titles)) == 4
    assert all(re.fullmatch(r"(darts|robnet)-[68]x4-[0-9a-f]{4}", text) for text in titles)
    assert title(resolve(str(_file(tmp_path, DARTS)))) == titles[1]


@pytest.mark.parametrize("name", grids.each(2, ["pdarts", "advrush", "robnet_large"]))
def test_a_published_network_with_fewer_cells_and_channels(name: str) -> None:
    with torch.device("meta"):
        assert repr(create(reduced(name, 20, 36))) == repr(create(name))
    assert create(reduced(name, 5, 2), 3)(torch.rand(2, 3, 8, 8)).shape == (2, 3)


def test_a_network_of_cells_all_different_cannot_be_reduced() -> None:
    with pytest.raises(ValueError, match=r"expected one of pdarts, advrush, robnet_large, got 'robnet_free'$"):
        reduced("robnet_free", 8, 8)


def test_create(tmp_path: Path) -> None:
    path = str(_file(tmp_path, DARTS))
    assert create(path, 7)(torch.rand(2, 3, 9, 9)).shape == (2, 7)
    model = ImmunityMoE(path, 2, 4, image_size=20)
    assert model.stage == "cells2"
    assert model(torch.rand(2, 3, 20, 20)).shape == (2, 4)
    with pytest.raises(ValueError, match="num_classes: expected at least 2, got 1"):
        create(path, 1)
    with pytest.raises(ValueError, match=r"robnet_large_v2, .*, or a genotype file, ….json, got '.*my_cell'$"):
        create(path.removesuffix(".json"))


def _wrong(text: str | bytes, message: str, folder: Path) -> None:
    path = folder / "my_cell.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    for read in (load, create):
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: {message}") as raised:
            read(str(path))
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expecting value"),
        ('{"kind": "darts",}', "Illegal trailing comma|Expecting property name"),
        (b'{"kind": "\xff"}', "'utf-8' codec"),
        ("[" * 100_000, "expected a genotype, got JSON that is nested too deeply"),
        ("[1, 2]", r"expected an object, got \[1, 2\]$"),
        ("null", "expected an object, got null$"),
        (json.dumps("x" * 1000), 'expected an object, got "x{59}…$'),
        ('{"kind": "darts", "cells": 6, "cells": 7}', "cells: expected once, got twice$"),
        ("{}", "kind: expected one of darts, robnet, got null$"),
        ('{"kind": "nas\\nnet"}', r'kind: expected one of darts, robnet, got "nas\\nnet"$'),
        ('{"kind": ["darts"]}', r'kind: expected one of darts, robnet, got \["darts"\]$'),
        (
            '{"kind": "darts", "cells": 6}',
            "members: expected normal, reduce, .*, got none of channels, normal, reduce$",
        ),
        ('{"kind": "robnet", "cells": 6}', "members: expected cells, channels, layers, got none of channels, layers$"),
    ],
)
def test_no_genotype(text: str | bytes, message: str, tmp_path: Path) -> None:
    _wrong(text, message, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"auxiliary": 1}, "members: expected normal, reduce, channels, cells, got 'auxiliary'$"),
        ({"channels": 0}, "channels: expected a whole number from 1 to 1000, got 0$"),
        ({"channels": 1001}, "channels: expected .*, got 1001"),
        ({"channels": 4.0}, "channels: expected .*, got 4.0"),
        ({"channels": float("nan")}, "channels: expected .*, got NaN"),
        ({"channels": "4"}, 'channels: expected .*, got "4"'),
        ({"channels": True}, "channels: expected .*, got true"),
        ({"cells": 4}, "cells: expected a whole number from 5 to 1000, got 4$"),
        ({"cells": 10**30}, "cells: expected a whole number from 5 to 1000, got 1000.*$"),
        ({"cells": None}, "cells: expected .*, got null"),
        ({"normal": "sep_conv_3x3"}, r'normal: expected a list of pairs \[operation, input\], got "sep_conv_3x3"$'),
        ({"reduce": {}}, "reduce: expected a list .*, got {}$"),
        ({"reduce": []}, "reduce: expected 8 pairs, got 0$"),
        ({"normal": DARTS["normal"][:7]}, "normal: expected 8 pairs, got 7$"),
        ({"normal": [["sep_conv_3x3"]] * 8}, r'normal\[0\]: expected a pair .*, got \["sep_conv_3x3"\]$'),
        ({"normal": [["sep_conv_3x3", 0, 1]] * 8}, r"normal\[0\]: expected a pair .*, got "),
        ({"normal": [{"none": 0}] * 8}, r"normal\[0\]: expected a pair .*, got "),
        ({"normal": [[0, "none"]] * 8}, r"normal\[0\]: expected a pair .*, got "),
        ({"normal": [["none", True]] * 8}, r'normal\[0\]: expected a pair .*, got \["none", true\]$'),
        ({"normal": [["none", 0.0]] * 8}, r"normal\[0\]: expected a pair .*, got "),
        (
            {"reduce": [["conv\n", 0]] * 8},
            r"reduce\[0\]: expected an operation of none, skip_.*, got 'conv\\n'$",
        ),
        ({"reduce": [["skip_connect", 2]] * 8}, r"reduce\[0\]: expected an input of 0 to 1, got 2$"),
        ({"reduce": [["none", 1]] * 8}, "reduce: expected an output that depends on the inputs, got none operations"),
    ],
)
def test_wrong_darts(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    _wrong(json.dumps(DARTS | change), message, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normal": []}, "members: expected cells, channels, layers, got 'normal'$"),
        ({"channels": -4}, "channels: expected a whole number from 1 to 1000, got -4$"),
        ({"layers": 4}, "layers: expected a whole number from 5 to 1000, got 4$"),
        ({"cells": ROBNET_LARGE[0]}, 'cells: expected a list of strings, got "11 11 .*$'),
        ({"cells": [ROBNET_LARGE]}, r'cells: expected a list of strings, got \[\["11 11 .*$'),
        ({"cells": []}, "cells: expected 1 or one for each of the 6 layers, got 0$"),
        ({"cells": list(ROBNET_FREE)}, "cells: expected 1 or one for each of the 6 layers, got 20$"),
        ({"cells": ["11 11"]}, r"cells\[0\]: expected 14 codes, got 2$"),
        ({"cells": ["11 " * 13 + "1x"]}, r"cells\[0\]: code 13: expected 00, 01, 10 or 11, got '1x'$"),
    ],
)
def test_wrong_robnet(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    _wrong(json.dumps(ROBNET | change), message, tmp_path)


def test_no_file(tmp_path: Path) -> None:
    for path, message in [(tmp_path / "none.json", "No such file"), (tmp_path / "folder.json", "Is a directory")]:
        (tmp_path / "folder.json").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: {message}") as raised:
            create(str(path))
        assert "\n" not in str(raised.value)
