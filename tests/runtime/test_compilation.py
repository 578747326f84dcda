"""The compiled step: one graph, the same numbers as eager, and a fall-back that says so."""

from __future__ import annotations

import copy
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.runtime import cache_dir_utils
from torch.optim import SGD

from immunity_fast import FusedImmunityLoss, ImmunityMoE, RandomSwitchGate
from immunity_fast.data.augmentation import draw_affine
from immunity_fast.experts.staged import GlobalAveragePool
from immunity_fast.runtime import strategies
from immunity_fast.runtime.compilation import Compiled, innermost_cause, keep_caches, place_of, resolve
from immunity_fast.runtime.profiling import RECORDED
from immunity_fast.training.state import TrainingState
from immunity_fast.training.step import TrainStep
from tests import grids
from tests.graphs import captured
from tests.places import REPOSITORY
from tests.small_runs import TIMINGS, interrupted, options, saved, trained, write_data

CPU = torch.device("cpu")
LOSS = FusedImmunityLoss(0.5, 0.7, 1e-3, size=(8, 9))


def _model(batching: Any = "loop") -> ImmunityMoE:
    """Small enough to be compiled in seconds, with BatchNorm on both sides of the cut."""
    torch.manual_seed(0)
    experts = [
        nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 5, 3),
            nn.BatchNorm2d(5),
            nn.ReLU(),
            GlobalAveragePool(),
            nn.Linear(5, 3),
        )
        for _ in range(2)
    ]
    return ImmunityMoE.from_experts(experts, stage="2", batching=batching, mean=[0.5] * 3, std=[0.2] * 3)


def _batch(count: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (count, 3, 12, 13), generator=generator, dtype=torch.uint8)
    return images, torch.arange(count) % 3, draw_affine(count, generator, padding=1)


def _steps(step: TrainStep, count: int = 3) -> Tensor:
    return torch.stack([step(*_batch()) for _ in range(count)])


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph is captured and differentiated as it would be, but then run by PyTorch's own kernels."""
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", captured())


def _same_training(compiled: TrainStep, eager: TrainStep) -> None:
    torch.testing.assert_close(_steps(compiled), _steps(eager), rtol=2e-4, atol=1e-5)
    assert compiled.compiled
    assert not eager.compiled
    torch.testing.assert_close(
        compiled.model.state_dict(), eager.model.state_dict(), rtol=1e-3, atol=1e-4, check_stride=False
    )


def _step(model: ImmunityMoE, **options: Any) -> TrainStep:
    return TrainStep(model, LOSS, SGD(model.parameters(), 0.05, 0.9, fused=True), **options)


@pytest.mark.parametrize(
    ("amp", "double_backprop"),
    grids.grid(
        ("off", "bf16"),
        ("reverse", "forward"),
        ordinary=lambda amp, double_backprop: (amp, double_backprop) == ("bf16", "reverse"),
    ),
)
@pytest.mark.usefixtures("without_inductor")
def test_a_step_is_one_graph_and_trains_as_eager_does(amp: Any, double_backprop: Any) -> None:
    """And is compiled once, whatever the learning rate is set to."""
    options = {"double_backprop": double_backprop, "amp": amp}
    compiled, eager = _step(_model(), compile="on", **options), _step(_model(), **options)
    if amp == "off":
        _same_training(compiled, eager)
    else:  # two ways of rounding: it is the first step that can be compared
        torch.testing.assert_close(_steps(compiled, 1), _steps(eager, 1), rtol=2e-2, atol=1e-2)
    with torch.compiler.set_stance("fail_on_recompile"):
        for group in compiled.optimizer.param_groups:
            group["lr"] = 0.01
        _steps(compiled)
    assert compiled.compiled


@pytest.mark.exhaustive  # of `make test`, a head in forward mode is one, and the rehearsal compiles it
@pytest.mark.parametrize("double_backprop", [pytest.param("reverse", marks=pytest.mark.exhaustive), "forward"])
def test_a_step_of_all_experts_at_once_is_one_graph(double_backprop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Dynamo captures it, run operator by operator; `aot_eager` cannot run some of what comes out of a `vmap`."""
    compile_ = torch.compile
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", lambda f, **_: compile_(f, fullgraph=True, dynamic=False, backend="eager"))
    options = {"double_backprop": double_backprop}
    _same_training(_step(_model("vmap"), compile="on", **options), _step(_model("vmap"), **options))


@pytest.mark.exhaustive  # a minute; a step is one graph for the tests above, and compiled for a GPU in the rehearsal
@pytest.mark.slow
@pytest.mark.parametrize("augmented", [False, True])
def test_the_real_compiler_trains_as_eager_does(augmented: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of little: each kernel that is generated costs a call of the C++ compiler.

    Which need not optimise: Inductor's kernels are the same, and few images run through them.
    """
    monkeypatch.setenv("TORCHINDUCTOR_DEBUG_COMPILE", "1")

    def step(**options: Any) -> TrainStep:
        torch.manual_seed(0)
        experts = [
            nn.Sequential(
                nn.Conv2d(3, 4, 3), *([nn.BatchNorm2d(4)] if augmented else []), GlobalAveragePool(), nn.Linear(4, 3)
            )
            for _ in "ab"
        ]
        model = ImmunityMoE.from_experts(
            experts,
            gate=RandomSwitchGate(2, nn.Sequential(GlobalAveragePool(), nn.Linear(3, 2))),
            stage="0",
            batching="vmap",
        )
        return TrainStep(model, LOSS, SGD(model.parameters(), 0.05, fused=True), **options)

    torch.compiler.reset()
    images, labels, affine = _batch()
    found, batch = [], (images, labels, affine) if augmented else (images / 255, labels)
    for compile in ("on", "off"):
        train_step = step(compile=compile)
        found.append(torch.stack([train_step(*batch) for _ in range(3)]))
        assert train_step.compiled == (compile == "on")
    torch.testing.assert_close(*found, rtol=2e-4, atol=1e-5)


# Where compiling fails


class _Backward(torch.autograd.Function):
    """The identity, whose backward pass fails the first time."""

    failures = 1

    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        _Backward.failures -= 1
        if _Backward.failures >= 0:
            raise RuntimeError("no backward pass\nand why")
        return gradient


def test_a_failure_is_a_line_and_training_goes_on_in_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_function: Any, **_options: Any) -> Any:
        def call(*_arguments: Any) -> Any:
            raise RuntimeError("no compiler\nhere")

        return call

    monkeypatch.setattr(torch, "compile", failing)
    said: list[str] = []
    step = _step(_model(), compile="on", log=said.append)
    expected = _steps(_step(_model()))
    assert torch.equal(_steps(step), expected)
    assert said == ["compiling failed, going on in eager mode: RuntimeError: no compiler"]
    assert not step.compiled


def test_a_failure_in_the_backward_pass_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(function: Any, **_options: Any) -> Any:
        def call(*arguments: Any) -> Any:
            loss, measured = function(*arguments)
            return _Backward.apply(loss), measured  # type: ignore[no-untyped-call]

        return call

    monkeypatch.setattr(torch, "compile", failing)
    monkeypatch.setattr(_Backward, "failures", 1)
    said: list[str] = []
    step, eager = _step(_model(), compile="on", log=said.append), _step(_model())
    assert torch.equal(_steps(step), _steps(eager))
    assert len(said) == 1
    for mine, other in zip(step.model.state_dict().values(), eager.model.state_dict().values(), strict=True):
        assert torch.equal(mine, other)


def test_a_wrong_batch_is_not_taken_for_a_failure_to_compile() -> None:
    said: list[str] = []
    step = _step(_model(), compile="on", log=said.append)
    images, labels, affine = _batch()
    with pytest.raises(ValueError, match="targets: expected shape"):
        step(images, labels[:-1], affine)
    assert said == []


def _unknown_to_inductor() -> Any:
    """An operator that Dynamo traces and Inductor then stops at, with the cause three exceptions deep."""

    @torch.library.custom_op("immunity_fast_tests::unknown", mutates_args=())
    def unknown(x: Tensor) -> Tensor:
        return x + 1

    @unknown.register_fake
    def _(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    @torch._inductor.lowering.register_lowering(torch.ops.immunity_fast_tests.unknown.default)
    def _(_x: Any) -> Any:
        try:
            raise KeyError("not what it failed for")
        except KeyError:
            raise NotImplementedError("no kernel for this one\nand more") from ZeroDivisionError("because of this")

    return unknown


def test_the_line_has_the_cause_and_the_file_of_the_traceback(tmp_path: Path) -> None:
    import torch._inductor.lowering

    torch.compiler.reset()
    unknown, said, file = _unknown_to_inductor(), list[str](), tmp_path / "compilation.log"
    for _ in range(2):
        compiled = Compiled(lambda x: unknown(x) * 2, "on", CPU, said.append, file)
        assert compiled(torch.ones(2)).tolist() == [4, 4]
        assert not compiled.active
    line = (
        "compiling failed, going on in eager mode: ZeroDivisionError: because of this; in the operation "
        f"immunity_fast_tests.unknown.default; whole traceback: {file}"
    )
    assert said == [line, line]
    kept = file.read_text(encoding="utf-8")
    assert kept.count("Traceback (most recent call last)") >= 6
    for part in ("no kernel for this one", "and more", "ZeroDivisionError: because of this", "lowering.py"):
        assert part in kept


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("no compiler\nhere"), "RuntimeError: no compiler"),
        (RuntimeError(), "RuntimeError: "),
        (ValueError("at 3:4:\n  x = y\n      ^\ny is not defined\n"), "ValueError: at 3:4: y is not defined"),
        (RuntimeError("In a process:\nTraceback (most recent call last):\n  File\nOSError: disk\n"), "OSError: disk"),
        (RuntimeError("a" * 400 + "z"), f"RuntimeError: {'a' * 134} … {'a' * 147}z"),
    ],
)
def test_a_cause_is_one_line(error: Exception, line: str) -> None:
    assert innermost_cause(error) == line


def test_a_cause_that_goes_round_in_a_circle_ends() -> None:
    one, other = RuntimeError("one"), RuntimeError("other")
    one.__cause__, other.__cause__ = other, one
    assert innermost_cause(one) == "RuntimeError: other"


def test_what_was_only_being_handled_is_no_cause() -> None:
    def missed() -> None:
        try:
            raise KeyError("cache")
        except KeyError:
            raise RuntimeError("this")  # noqa: B904

    with pytest.raises(RuntimeError) as caught:
        missed()
    assert innermost_cause(caught.value) == "RuntimeError: this"


def test_a_traceback_that_cannot_be_kept_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_function: Any, **_options: Any) -> Any:
        def call(*_arguments: Any) -> Any:
            raise RuntimeError("no compiler")

        return call

    monkeypatch.setattr(torch, "compile", failing)
    said: list[str] = []
    compiled = Compiled(torch.neg, "on", CPU, said.append, tmp_path / "no such folder" / "compilation.log")
    assert compiled(torch.ones(2)).tolist() == [-1, -1]
    assert said == ["compiling failed, going on in eager mode: RuntimeError: no compiler"]


def test_a_run_keeps_the_traceback_in_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(_function: Any, **_options: Any) -> Any:
        def call(*_arguments: Any) -> Any:
            raise RuntimeError("backend raised:") from NotImplementedError("this operator")

        return call

    monkeypatch.setattr(torch, "compile", failing)
    data, folder = write_data(tmp_path / "data.npz"), tmp_path / "run"
    trained([*options(data, compile="on", epochs=1), "--out", str(folder)])
    kept = (folder / "compilation.log").read_text(encoding="utf-8")
    assert "NotImplementedError: this operator" in kept
    assert "RuntimeError: backend raised:" in kept
    line = f"going on in eager mode: NotImplementedError: this operator; whole traceback: {folder / 'compilation.log'}"
    assert line in capsys.readouterr().out


def test_without_an_announcer_it_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_function: Any, **_options: Any) -> Any:
        def call(*_arguments: Any) -> Any:
            raise RuntimeError

        return call

    monkeypatch.setattr(torch, "compile", failing)
    compiled = Compiled(torch.neg, "on", CPU)
    with pytest.warns(UserWarning, match="compiling failed, going on in eager mode: RuntimeError"):
        assert compiled(torch.ones(2)).tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("choice", "device", "expected"),
    [
        ("auto", "cpu", "off"),
        ("auto", "cuda", "on"),
        ("off", "cuda", "off"),
        ("on", "cpu", "on"),
        ("max", "cpu", "max"),
    ],
)
def test_auto_compiles_on_a_gpu_only(choice: Any, device: str, expected: str) -> None:
    assert resolve(choice, torch.device(device)) == expected


CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


@pytest.fixture
def no_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """None are named, and what a test has named is forgotten."""
    for name in CACHES:
        monkeypatch.setenv(name, "")  # so that the end of the test takes back what `keep_caches` sets
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("no_caches")
def test_caches_are_kept_where_the_user_wants_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "mine too"))
    assert keep_caches() == tmp_path / "mine"
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "mine too")


@pytest.mark.usefixtures("no_caches")
@pytest.mark.parametrize("first", ["", "torch._dynamo"])
def test_caches_are_kept_where_the_readme_says(first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where PyTorch's compiler, imported first, has named its own folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if first:
        importlib.import_module(first)
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", cache_dir_utils.default_cache_dir())
    assert keep_caches() == tmp_path / "immunity_fast" / "inductor"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "immunity_fast" / "inductor")
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "immunity_fast" / "triton")
    assert keep_caches() == tmp_path / "immunity_fast" / "inductor"


@pytest.mark.usefixtures("no_caches")
@pytest.mark.parametrize("given", [None, "none/of/mine"])
def test_where_no_cache_can_be_written_to_temporary_files_are(
    given: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "none").write_text("a file, below which there is no folder, for any user")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "none"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if given is not None:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / given))
    folder = keep_caches()
    assert folder == tmp_path / f"immunity_fast-{os.getuid()}" / "inductor"
    assert folder.parent.stat().st_mode & 0o077 == 0


# The user is nobody's account, without a home, and may read everything, as a container's user may; write only here.
NOBODY = """
import ctypes, os, sys
libc = ctypes.CDLL(None)
libc.prctl(8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS: the interpreter itself may lie where only its owner looks
os.setgroups([])
os.setgid(12345)
os.setuid(12345)
libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(4, 4))  # CAP_DAC_READ_SEARCH
for name in ("HOME", "XDG_CACHE_HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "TORCHINDUCTOR_CACHE_DIR",
             "TRITON_CACHE_DIR"):
    os.environ.pop(name, None)
if len(sys.argv) > 1:
    from tests.processes import trained_and_evaluated
    trained_and_evaluated(sys.argv[1:])
"""


@pytest.mark.exhaustive  # a whole run; of `make test`, where caches are kept
@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="another user can be had by root alone")
def test_a_user_without_home_and_account_trains_and_evaluates(tmp_path: Path) -> None:
    data, folder = write_data(tmp_path / "data.npz"), tmp_path / "mine"
    folder.mkdir()
    os.chown(folder, 12345, 12345)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-c", NOBODY, *command]
        return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, check=False)

    if run().returncode:
        pytest.skip("another user cannot read the interpreter")
    ended = run(*options(data, epochs=1, check_images=2, attack_images=2), "--out", "run", "--compile", "off")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("report: run/report.html") == 2, "of training, and of the command evaluate"
    assert (folder / "run" / "report.html").stat().st_uid == 12345


def test_the_package_s_import_is_light() -> None:
    """Neither it nor the use of a loss on a CPU imports anything heavy, or changes environment or signals' handlers."""
    program = (
        "import os, signal, sys\nimport torch\nbefore = dict(os.environ)\n"
        "from immunity_fast import FusedImmunityLoss, ImmunityMoE, RandomSwitchGate, capture_activations\n"
        "model = ImmunityMoE('resnet8', 2)\n"
        "logits, activations, gate = model.expert_outputs(torch.rand(2, 3, 8, 8))\n"
        "FusedImmunityLoss()(logits, activations, torch.tensor([0, 1]), gate)\n"
        "heavy = ('torch._dynamo', 'torch._inductor', 'triton', 'sympy', 'numpy.testing', 'matplotlib', 'rich', "
        "'safetensors', 'sklearn', 'torchvision')\n"
        "print([name for name in heavy if name in sys.modules], dict(os.environ) == before)\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=120
    )
    assert ended.stdout == "[] True\n", ended.stderr


def test_the_choice_of_a_strategy_is_a_constant_to_the_compiler() -> None:
    def marked() -> None: ...

    torch.compiler.assume_constant_result(marked)
    assert vars(marked).items() <= vars(strategies.fastest).items()
    assert vars(marked)


def test_deep_copies_of_a_model_are_no_part_of_its_step() -> None:
    model = _model()
    twin = copy.deepcopy(model)
    _steps(_step(model), 1)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


# The command


@pytest.mark.usefixtures("without_inductor")
def test_a_compiled_run_says_what_it_waits_for_and_records_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training, validation, and the attack of each epoch's check."""
    data = write_data(tmp_path / "data.npz")
    settings = {"epochs": 1, "check_images": 6, "lr": 1e-3, "arch": "tests.own_networks:smooth", "stage": "2"}
    records = []
    for compile in ("on", "off"):
        _, run = trained([*options(data, **settings, compile=compile), "--out", str(tmp_path / compile)])
        records.append(run.metrics()[0])
        printed = capsys.readouterr().out
        assert ("compiling the training step" in printed) == (compile == "on")
        assert ("first step after" in printed) == (compile == "on")
        assert "failed" not in printed
    for name in records[0].keys() - set(TIMINGS):
        assert records[0][name] == pytest.approx(records[1][name], rel=1e-2, abs=1e-3), name


def test_a_profile_is_a_trace_and_a_table(tmp_path: Path) -> None:
    _, run = trained([*options(write_data(tmp_path / "data.npz")), "--profile", "--out", str(tmp_path / "run")])
    trace = json.loads((run.profile / "trace.json").read_text(encoding="utf-8"))
    names = {event.get("name") for event in trace["traceEvents"]}
    assert "aten::convolution_backward" in names
    assert sum(str(name).startswith("ProfilerStep#") for name in names) == RECORDED
    assert "aten::convolution_backward" in (run.profile / "operators.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_a_run_in_half_precision_is_taken_up_bit_for_bit(amp: str, tmp_path: Path) -> None:
    arguments = options(write_data(tmp_path / "data.npz"), amp=amp, checkpoint_every=1, arch="tests.own_networks:Plain")
    trained([*arguments, "--out", str(tmp_path / "whole")])
    interrupted((TrainingState, "advance"), 8, [*arguments, "--out", str(tmp_path / "run")])
    trained(["--resume", str(tmp_path / "run"), "--trust-code"])
    assert saved(tmp_path / "run") == saved(tmp_path / "whole")
    assert ("scaler/scale" in saved(tmp_path / "run")["tensors"]) == (amp == "fp16")


def _prints(x: torch.Tensor) -> torch.Tensor:
    torch._dynamo.graph_break()  # what a user's network may do in many ways
    return x + 1


def test_a_failure_names_the_function_and_its_code() -> None:
    """Of Dynamo, whatever it is that it cannot trace; in one line."""
    said: list[str] = []
    torch.compiler.reset()
    compiled = Compiled(lambda x: _prints(2 * x), "on", torch.device("cpu"), said.append)
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 3.0))
    (line,) = said
    assert re.search(r"; in _prints, test_compilation\.py:\d+: torch\._dynamo\.graph_break\(\)", line)
    assert "\n" not in line
    torch.compiler.reset()


def test_a_failure_names_the_operation() -> None:
    """Of Inductor, whose text this is; and nothing where no place is told."""
    text = "LoweringException: NotImplementedError: no\n  target: aten._fft_c2r.default\n  args[0]: TensorBox("
    assert place_of(RuntimeError(text)) == "; in the operation aten._fft_c2r.default"
    assert place_of(RuntimeError("no compiler")) == ""
