"""Architectures by name: ours, libraries', the user's own, several with commas between."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from immunity_fast.experts import create, resolve, split_names, title
from immunity_fast.experts.genotypes import reduced
from immunity_fast.experts.registry import check_trusted, counted, file_title, imports_code, repeated

CELL = reduced("pdarts", 6, 4)
MODULE = """
import functools
import torch
from torch import nn

class Network(nn.Sequential):
    def __init__(self, num_classes=2, width=3):
        super().__init__(nn.Conv2d(3, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))

class Namespace:
    nested = Network

def positional(classes, width=4):
    return Network(classes, width)

def keywords(**options):
    return Network(**options)

def without():
    return Network(4)

def two(classes, width):
    return Network(classes, width)

def broken(num_classes):
    raise RuntimeError("no\\nsuch luck")

def number(num_classes):
    return num_classes

partial = functools.partial(Network, width=5)
instance = Network()
constant = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of the user's."""
    (tmp_path / "own_networks.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_networks", raising=False)
    return "own_networks"


@pytest.mark.parametrize(
    ("name", "classes"),
    [("Network", 7), ("Namespace.nested", 7), ("positional", 7), ("keywords", 7), ("partial", 7), ("without", 4)],
)
def test_a_callable_is_given_the_number_of_classes(module: str, name: str, classes: int) -> None:
    network = create(f"{module}:{name}", 7)
    assert network(torch.rand(2, 3, 8, 8)).shape == (2, classes)
    assert resolve(f"resnet8,{module}:{name}") == f"resnet8,{module}:{name}"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("two", "takes num_classes, one argument or none, got one that requires classes, width"),
        ("broken", "expected it to make a network, got RuntimeError: no such luck"),
        ("number", "expected it to make an nn.Module, got int"),
        ("instance", "expected a class or a function that makes a network, got Network"),
        ("constant", "expected a class or a function that makes a network, got int"),
        ("nothing", "expected what can be imported, got AttributeError"),
    ],
)
def test_what_makes_no_network_is_a_line(module: str, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{module}:{name}: .*{message}") as raised:
        create(f"{module}:{name}", 7)
    assert "\n" not in str(raised.value)


def test_a_module_that_is_not_there_is_a_line() -> None:
    with pytest.raises(ValueError, match=r"^no_such_module:net: expected what can be imported, got ModuleNotFound"):
        create("no_such_module:net")


@pytest.mark.parametrize("name", ["os:system", "subprocess:run", "builtins:eval", "torch:os.system", "os.path:join"])
def test_python_s_own_library_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected a module of yours or of a library, got Python's own"):
        create(name)
    with pytest.raises(ValueError, match=f"^{name}: "):
        resolve(name)


@pytest.mark.parametrize(
    ("arch", "names"),
    [
        ("resnet8", ("resnet8",)),
        (" resnet8 ,timm:resnet18", ("resnet8", "timm:resnet18")),
        (CELL, (CELL,)),
        (f"{CELL},resnet8,{CELL}", (CELL, "resnet8", CELL)),
        ("{broken", ("{broken",)),
    ],
)
def test_names_with_commas_between(arch: str, names: tuple[str, ...]) -> None:
    assert split_names(arch) == names


@pytest.mark.parametrize("arch", ["", ",", "resnet8,", ",resnet8", "a,,b", f"{CELL}resnet8"])
def test_an_empty_name_is_refused(arch: str) -> None:
    with pytest.raises(ValueError, match=r"^arch: expected names with commas between, got "):
        split_names(arch)


def test_a_genotype_file_may_have_a_comma_in_its_name(tmp_path: Path) -> None:
    file = tmp_path / "a,b.json"
    file.write_text(CELL, encoding="utf-8")
    assert split_names(str(file)) == (str(file),)
    assert resolve(str(file)) == CELL
    (tmp_path / "c.json").write_text(CELL, encoding="utf-8")
    assert resolve(f"resnet8,{tmp_path / 'c.json'}") == f"resnet8,{CELL}"


def test_names_take_turns() -> None:
    assert repeated("resnet8,resnet18", 5) == ("resnet8", "resnet18", "resnet8", "resnet18", "resnet8")
    assert repeated(["resnet8"], 2) == ("resnet8", "resnet8")
    with pytest.raises(ValueError, match=r"^num_experts: expected at least 2, as many as there are names, got 1$"):
        repeated("resnet8,resnet18", 1)


def test_titles() -> None:
    assert title("resnet8", 5) == "5 × resnet8"
    assert title("resnet8") == "resnet8"
    assert title("resnet8,timm:resnet18", 3) == "2 × resnet8 + 1 × timm:resnet18"
    assert title("resnet8,resnet8", 2) == "2 × resnet8"
    assert file_title("resnet8,timm:resnet18") == "resnet8+timm-resnet18"
    long = file_title(",".join(["torchvision:mobilenet_v3_small"] * 9))
    assert len(long) <= 60
    assert long != file_title(",".join(["torchvision:mobilenet_v3_small"] * 8))
    assert all(letter not in file_title(f"{CELL},a.b:c,x:y/z") for letter in ':,/\\ "')


def test_what_runs_code_is_refused_unless_trusted() -> None:
    assert imports_code(f"resnet8,{CELL},timm:resnet18,torchvision:resnet18") == ()
    assert imports_code("resnet8,os:system,a.b:c") == ("os:system", "a.b:c")
    check_trusted("runs/x", "resnet8", False)
    check_trusted("runs/x", "a.b:c", True)
    with pytest.raises(ValueError, match=r"^runs/x: .* a\.b:c is code .* --trust-code .*trust_code=True"):
        check_trusted("runs/x", "resnet8,a.b:c", False)


def test_close_names_of_all_libraries_are_named() -> None:
    pytest.importorskip("torchvision.models", reason="names of torchvision")
    with pytest.raises(ValueError, match=r"'mobilenet_v3'; did you mean .*torchvision:mobilenet_v3_small") as raised:
        create("mobilenet_v3")
    assert "torchvision:mobilenet_v3_large" in str(raised.value)
    with pytest.raises(ValueError, match=r"expected a network of torchvision, got .*resnet19.; did you mean"):
        create("torchvision:resnet19")


@pytest.mark.parametrize("name", ["torchvision:fcn_resnet50", "timm:hf-hub:a/b", "timm:local-dir:x", "timm:"])
def test_only_a_library_s_own_classifiers_are_known(name: str) -> None:
    pytest.importorskip("timm" if name.startswith("timm") else "torchvision.models", reason="the library's names")
    with pytest.raises(ValueError, match=r"^name: expected a network of "):
        create(name)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_a_library_that_is_missing_is_a_line(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setitem(sys.modules, f"{library}.models", None)
    with pytest.raises(ModuleNotFoundError, match=f"needs {library}, which is not installed: pip install {library}$"):
        create(f"{library}:resnet18")
    with pytest.raises(ValueError, match="got 'resnet19'"):  # which other libraries' names are asked for
        create("resnet19")


@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v3_small"])
def test_networks_of_torchvision(name: str) -> None:
    models = pytest.importorskip("torchvision.models", reason="its networks")
    torch.manual_seed(0)
    expected = models.get_model(name, weights=None, num_classes=7).eval()
    torch.manual_seed(0)
    actual = create(f"torchvision:{name}", 7).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(actual(images), expected(images), rtol=0, atol=0)


def test_torchvision_s_googlenet_gives_logits_in_training() -> None:
    pytest.importorskip("torchvision.models", reason="its networks")
    with torch.device("meta"):
        network = create("torchvision:googlenet", 7).train()
        assert network(torch.empty(2, 3, 64, 64)).shape == (2, 7)


def test_transformers_are_built_for_the_images() -> None:
    pytest.importorskip("timm", reason="its networks")
    network = create("timm:vit_tiny_patch16_224", 5, image_size=(32, 48))
    assert isinstance(network, nn.Module)
    with torch.no_grad():
        assert network(torch.rand(2, 3, 32, 48)).shape == (2, 5)
        assert create("timm:resnet10t.c3_in1k", 5, image_size=40)(torch.rand(2, 3, 40, 40)).shape == (2, 5)


@pytest.mark.parametrize("number", [3, 4, 5, 11])
def test_counted_is_how_often_each_takes_its_turn(number: int) -> None:
    names = ("a", "b", "a")
    assert counted(names, number) == Counter(names[index % 3] for index in range(number))
    assert sum(counted(names, 2**62).values()) == 2**62, "and nothing is made for each"
