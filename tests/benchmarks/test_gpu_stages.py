"""The first minutes on a GPU, without one: what runs when, what is known of what failed, and what is left of it."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from benchmarks import check, gpu, outcomes, science, stages, training
from benchmarks.outcomes import FAILED, NOT_FINISHED, NOT_JUDGED, NOT_RUN, PASSED
from benchmarks.stages import STAGES, Job
from benchmarks.step_cases import CPU_WAYS, CROSS_ENTROPY, DETACHED, FULL, StepCase
from immunity_fast.runtime.precision import Amp
from immunity_fast.runtime.strategies import Batching, DoubleBackprop
from tests.places import REPOSITORY
from tests.small_runs import write_data

HANG = "import threading; threading.Event().wait()"
GENEROUS = 60.0  # seconds in which a process that does nothing has ended on any machine


def _python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def _told(name: str, outcome: str) -> str:
    return f"print({outcomes.line(name, outcome)!r}, flush=True)"


def _run(*jobs: Job, cores: int = 2, seconds: float = GENEROUS) -> list[dict[str, Any]]:
    taken: list[dict[str, Any]] = []
    stages.run(jobs, cores=cores, deadline=time.monotonic() + seconds, take=taken.append, environment={"HERE": "yes"})
    return taken


# Stages and their shares


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("check,kernels,steps,science", ("check", "kernels", "steps", "science")),
        ("science,check", ("check", "science")),
        (" steps , steps,", ("steps",)),
    ],
)
def test_stages_run_in_their_order(text: str, expected: tuple[str, ...]) -> None:
    assert stages.parse(text) == expected


@pytest.mark.parametrize("text", ["", "check,kernel", "all"])
def test_an_unknown_stage_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="expected some of check, kernels, steps, science"):
        stages.parse(text)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_shares_are_of_the_stages_asked_for_and_the_rest_goes_on(count: int) -> None:
    for names in itertools.combinations(STAGES, count):
        left, used = 400.0, []
        for name in names:
            used.append(stages.share(name, names, left))
            left -= used[-1]
        assert left == pytest.approx(0)
        for one, other in itertools.pairwise(names):
            assert used[names.index(one)] / used[names.index(other)] == pytest.approx(STAGES[one] / STAGES[other])
    assert stages.share("check", ("check", "kernels", "steps"), 470.0) == pytest.approx(110)
    assert stages.share("steps", ("check", "steps"), 420.0) == 420.0  # check took no time
    assert stages.share("steps", ("steps", "science"), -3.0) == 0.0


# Jobs


def test_a_job_tells_what_became_of_it() -> None:
    raising = "raise ValueError('first') from KeyError('the cause')"
    found = _run(
        Job("good", _python("import os; assert os.environ['HERE'] == 'yes' and os.environ['MORE'] == 'too'"),
            environment={"MORE": "too"}),
        Job("bad", _python(raising)),
        Job("missing", ["a-program-that-nobody-has"]),
        Job("killed", _python("import os; os.kill(os.getpid(), 9)")),
    )  # fmt: skip
    by_name = {outcome["name"]: outcome for outcome in found}
    assert {name: outcome["outcome"] for name, outcome in by_name.items()} == {
        "good": PASSED,
        "bad": FAILED,
        "missing": NOT_RUN,
        "killed": FAILED,
    }
    assert by_name["bad"]["cause"] == "ValueError: first"
    assert by_name["bad"]["tail"][-1] == "ValueError: first"
    assert by_name["killed"]["cause"] == "killed by SIGKILL"
    assert by_name["missing"]["cause"] == "there is no a-program-that-nobody-has here"


def test_what_hangs_is_ended_with_its_children_and_stops_nothing(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    starting = (
        f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {HANG!r}]);"
        f"open({str(file)!r}, 'w').write(str(p.pid)); {_told('part', PASSED)}; p.wait()"
    )
    found = _run(
        Job("hangs", _python(starting), limit=3, expected=("part", "other part")), Job("next", _python("")), cores=1
    )
    assert [(outcome["name"], outcome["outcome"]) for outcome in found] == [
        ("part", PASSED),
        ("other part", FAILED),
        ("next", PASSED),
    ]
    assert found[1]["cause"] == "hung: stopped at its limit of 3 s"
    assert not _alive(int(file.read_text()))


def _alive(process: int) -> bool:
    """Whether it runs; one that was ended and that nobody has waited for does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")


def test_at_the_deadline_everything_is_over_and_said_to_be() -> None:
    found = _run(Job("runs", _python(HANG)), Job("waits", _python("")), cores=1, seconds=0.5)
    assert [(one["name"], one["outcome"]) for one in found] == [("waits", NOT_FINISHED), ("runs", NOT_FINISHED)]


def test_outcomes_that_are_missing_are_failures() -> None:
    found = _run(
        Job("a", _python(_told("one", PASSED)), expected=("one", "two")),
        Job("b", _python(f"{_told('three', NOT_JUDGED)}; raise RuntimeError('late')"), expected=("three", "four")),
    )
    by_name = {outcome["name"]: outcome for outcome in found}
    assert {name: outcome["outcome"] for name, outcome in by_name.items()} == {
        "one": PASSED, "two": FAILED, "three": NOT_JUDGED, "four": FAILED
    }  # fmt: skip
    assert "RuntimeError: late" in by_name["four"]["cause"]


def test_jobs_wait_for_cores_and_for_each_other(tmp_path: Path) -> None:
    """Each writes how many run beside it; a job of all cores is alone, and one that comes after another comes after."""
    code = (
        f"import os, sys, pathlib; folder = pathlib.Path({str(tmp_path)!r}); name = sys.argv[1];"
        "(folder / name).touch(); print('@outcome ' + __import__('json').dumps({'name': name, 'outcome': 'passed',"
        "'beside': sorted(p.name for p in folder.iterdir())}), flush=True); (folder / name).unlink()"
    )
    jobs = [
        Job("first", [*_python(code), "first"], expected=("first",)),
        Job("large", [*_python(code), "large"], cores=8, expected=("large",), after="first"),
        Job("last", [*_python(code), "last"], cores=2, expected=("last",), after="large"),
    ]
    found = _run(*jobs)
    assert [(outcome["name"], outcome["beside"]) for outcome in found] == [
        ("first", ["first"]), ("large", ["large"]), ("last", ["last"])
    ]  # fmt: skip


# The command


def _stage(out: Path) -> gpu.Stage:
    return gpu.Stage(out, [sys.executable], True, None, 0.0, {}, {"machine": "none"})


def test_a_stage_that_fails_or_hangs_stops_no_other(tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def broken(stage: gpu.Stage, take: stages.Take) -> None:
        raise ImportError("nothing of this can be imported") from OSError("no such library")

    def hanging(stage: gpu.Stage, take: stages.Take) -> None:
        (stage.out / ".kernels.json.unfinished").touch()  # of a process that was killed
        stage.run([Job("hangs", _python(HANG))], take)

    def good(stage: gpu.Stage, take: stages.Take) -> None:
        seen.append([one["name"] for one in json.loads((tmp_path / "stages.json").read_text())["stages"]])
        stage.run([Job("good", _python(""))], take)

    run = {"check": broken, "kernels": hanging, "steps": good, "science": gpu.science}
    begin = time.monotonic()
    counts, failures = gpu.run_stages(tuple(STAGES), _stage(tmp_path), begin + 20, run)
    assert counts == {FAILED: 1, NOT_FINISHED: 1, PASSED: 1, NOT_RUN: 1}
    assert time.monotonic() - begin < 20 + GENEROUS
    assert seen == [["check", "kernels"]]
    assert [(one["stage"], one["name"], one["cause"]) for one in failures] == [
        ("check", "check", "OSError: no such library")
    ]
    found = json.loads((tmp_path / "stages.json").read_text())
    assert [one["outcomes"] for one in found["stages"]] == [{FAILED: 1}, {NOT_FINISHED: 1}, {PASSED: 1}, {NOT_RUN: 1}]
    assert [path.name for path in tmp_path.iterdir()] == ["stages.json"]


def test_a_benchmark_goes_on_behind_what_has_cost_it_the_device(tmp_path: Path) -> None:
    """As often as that happens, each time in a new process, and not where it ends as it should."""
    program = tmp_path / "benchmark.py"
    program.write_text(
        "import json, pathlib, sys\n"
        "out = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])\n"
        "found = json.loads(out.read_text()) if '--go-on' in sys.argv else {'calls': []}\n"
        "found['calls'].append([word for word in sys.argv if word in ('--go-on', '--write-strategies')])\n"
        "found['device_lost'] = len(found['calls']) < 3\n"
        "out.write_text(json.dumps(found))\n"
        "sys.exit(found['device_lost'])\n"
    )
    stage, told = _stage(tmp_path), list[str]()
    stage.python, stage.rehearse = [sys.executable, str(program)], False
    stage.deadline = time.monotonic() + 10 * GENEROUS
    gpu._benchmark(stage, lambda outcome: told.append(outcome["outcome"]), "steps", "steps", "--write-strategies")
    assert told == [FAILED, FAILED, PASSED]
    assert json.loads((tmp_path / "steps.json").read_text())["calls"] == [
        ["--write-strategies"], *[["--write-strategies", "--go-on"]] * 2
    ]  # fmt: skip


def test_at_most_eight_files_with_plain_names(tmp_path: Path) -> None:
    """As many as the stages write, if all of them were killed as they wrote."""
    written = {"check.json", "kernels.json", "steps.json", "strategies.json", "science.json", "stages.json"}
    text = "".join((REPOSITORY / "benchmarks" / name).read_text(encoding="utf-8") for name in ("gpu.py",))
    assert {name for name in written if name in text} == written
    assert len(written) + 2 <= 8  # two may be in the middle of being written
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz._-") for name in written)


def test_check_writes_each_outcome_as_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [Job("one", _python("")), Job("two", _python("raise RuntimeError('x')"), after="one")]
    monkeypatch.setattr(check, "jobs", lambda *_: jobs)
    stage, told = _stage(tmp_path), list[list[str]]()
    stage.deadline = time.monotonic() + GENEROUS

    def take(_outcome: dict[str, Any]) -> None:
        found = json.loads((tmp_path / "check.json").read_text())
        told.append([f"{one['name']} {one['outcome']}" for one in found["outcomes"]])

    gpu.check(stage, take)
    assert told == [["one passed"], ["one passed", "two failed"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages", "check,all"], "--stages check,all: expected some of"),
        (["--budget", "1"], "--budget 1: expected more than"),
        (["--budget", "inf"], "--budget inf: expected more than"),
        (["--data", "nowhere.npz"], "--data nowhere.npz: there is no such file"),
    ],
)
def test_what_is_wrong_with_the_command_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["gpu", "--budget", "60", "--out", str(out), *arguments])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert str(ended.value.code).startswith(f"error: {message}")
    assert "\n" not in str(ended.value.code)
    assert not out.exists()


# What is said of failures


def test_the_innermost_cause_is_what_was_raised_first() -> None:
    class WrappedError(RuntimeError):
        def __init__(self, inner: Exception) -> None:
            super().__init__("backend='inductor' raised:")
            self.inner_exception = inner

    def first() -> None:
        raise KeyError("the very cause")

    caught: Exception | None = None
    try:
        try:
            try:
                first()
            except KeyError as error:
                raise TypeError("then this") from error
        except TypeError as error:
            raise WrappedError(error) from None
    except WrappedError as error:
        caught = error
    assert caught is not None
    assert outcomes.innermost_cause(caught).startswith("KeyError (test_gpu_stages.py:")
    assert outcomes.innermost_cause(caught).endswith("'the very cause'")


def test_a_traceback_that_came_as_text_is_looked_through() -> None:
    text = 'raised:\nTraceback (most recent call last):\n  File "a.py", line 3, in f\ntriton.Error: no\nValueError: 7'
    assert outcomes.innermost_cause(RuntimeError(text)).endswith("ValueError: 7")
    assert outcomes.innermost_line("E   AssertionError: 3 != 4\n2 failed") == "AssertionError: 3 != 4"
    assert outcomes.innermost_line("Fatal Python error: Segmentation fault\n\nmodules").startswith("Fatal")
    assert outcomes.innermost_line("no such thing\n\n") == "no such thing"
    assert outcomes.innermost_line("") == ""


def test_a_compiled_step_that_falls_back_fails_with_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: Any, **_options: Any) -> Any:
        def call(*_batch: Any) -> Any:
            raise RuntimeError("backend raised:") from ZeroDivisionError("in the compiler")

        return call

    monkeypatch.setattr("torch.compile", refuse)
    with pytest.raises(RuntimeError, match="fell back to eager mode: ZeroDivisionError: in the compiler"):
        check.taken(check.Combination("loop", "off", "reverse", "on"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/opt/somewhere/lib/python3.12/site-packages/torch/_inductor/x.py:7", "…/x.py:7"),
        (f"{REPOSITORY}/benchmarks/gpu.py", "./benchmarks/gpu.py"),
        ('File "/usr/local/cuda/bin/compute-sanitizer"', 'File "…/compute-sanitizer"'),
        ("8/255, 12 images/s, torch/_dynamo/x.py", "8/255, 12 images/s, torch/_dynamo/x.py"),
        ("https://example.org/a/b", "https://example.org/a/b"),
    ],
)
def test_no_place_of_the_machine_is_told(text: str, expected: str) -> None:
    assert outcomes.portable(text) == expected
    assert sys.executable not in outcomes.portable(f"{sys.executable} -m benchmarks.gpu")


def test_what_is_written_names_no_place(tmp_path: Path) -> None:
    outcomes.write(tmp_path / "x.json", {"command": sys.executable, "tail": [f"{REPOSITORY}/a.py", "/srv/data/b.py"]})
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(text)["tail"] == ["./a.py", "…/b.py"]
    assert "/srv" not in text
    assert sys.prefix not in text


# What is checked


def test_all_combinations_are_checked_each_by_one_job() -> None:
    choices = [set(get_args(choice)) - {"auto"} for choice in (Batching, Amp, DoubleBackprop)]
    product = set(itertools.product(*choices, {"off", "on"}))
    assert {tuple(way) for way in check.COMBINATIONS} == product
    assert len(check.COMBINATIONS) == len(product) == 24
    jobs = check.jobs([sys.executable], 16, False)
    expected = [name for job in jobs for name in job.expected if "," in name]
    assert sorted(expected) == sorted(map(str, check.COMBINATIONS))
    compiled = [job for job in jobs if "compiled" in job.name]
    assert all(job.expected == (job.name,) for job in compiled)
    assert len(compiled) == 12
    assert all(job.limit < float("inf") for job in jobs)
    commands = [" ".join(job.command) for job in jobs]
    assert set(check.NUMBERS) < {job.name for job in jobs}
    for part in (
        "tests/kernels",
        "tests/training/test_step_gpu.py",
        "memcheck",
        "racecheck",
        "benchmarks.check device",
    ):
        assert any(part in command for command in commands)


EAGER = [way for way in check.COMBINATIONS if way.compile == "off"]


@pytest.mark.parametrize(
    "way",
    # By their places, for each is a tuple: of every choice each value.
    [pytest.param(way, marks=() if i in (0, 3, 7, 10) else pytest.mark.exhaustive) for i, way in enumerate(EAGER)],
    ids=str,
)
def test_an_eager_step_is_the_expected_one(way: check.Combination) -> None:
    found = check.compared(way, check.taken(way), check.expected())
    assert found["gradient_cosine"] > 0.9


def test_a_wrong_step_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    way = check.Combination("loop", "off", "reverse", "off")
    loss, gradient = check.expected()
    other = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    skewed = gradient + 0.03 * gradient.norm() / other.norm() * other
    wrong = [(loss * 1.001, gradient), (loss, skewed), (loss, 1.01 * gradient), (float("nan"), gradient)]
    for found in [*wrong, (loss, gradient * float("nan"))]:
        with pytest.raises(ValueError, match="cosine"):
            check.compared(way, found, (loss, gradient))
    check.compared(way, (loss, gradient), (loss, gradient))


def test_auto_s_step_comes_first_and_what_compiles_longest_last() -> None:
    order = StepCase("resnet18", "layer2", 8, compiled=("vmap", "loop")).order()
    order = [(way, loss) for way, loss in order if way not in CPU_WAYS]
    names = [(way.name, loss) for way, loss in order]
    assert names[:3] == [
        ("compiled vmap", FULL),
        ("compiled vmap", CROSS_ENTROPY),
        ("compiled vmap, forward mode", FULL),
    ]
    assert names[-1] == ("compiled loop", DETACHED)
    assert len(set(names)) == len(names) == 16
    kinds = [(way.batching, way.compile) for way, _ in order]
    assert [kind for kind, _ in itertools.groupby(kinds)] == [
        ("vmap", "on"), ("vmap", "off"), ("loop", "off"), ("loop", "on")
    ]  # fmt: skip


def test_a_failing_test_is_told_before_the_others_have_run(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text("def test_bad():\n    raise OSError('why')\n\ndef test_good():\n    pass\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.pytest_outcomes", "-c", os.devnull]
    ended = subprocess.run(
        [*command, "--rootdir", str(tmp_path), str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True
    )
    (told,) = [found for text in ended.stdout.splitlines() if (found := outcomes.read(text)) is not None]
    assert told["name"].endswith("test_some.py::test_bad")
    assert (told["outcome"], told["cause"]) == (FAILED, "OSError: why")


# Trainings


@pytest.mark.parametrize(
    ("seconds", "images", "expected"),
    [
        (50.0, 10_000, 400),
        (1e4, 10_000, training.ATTACKED),
        (1e4, 300, 300),
        (1.0, 10_000, training.FEWEST),
        (1.0, 8, 8),
    ],
)
def test_as_many_images_are_attacked_as_fit(seconds: float, images: int, expected: int) -> None:
    assert training.attackable(seconds, 10.0, 0.1, images) == expected


@pytest.mark.parametrize(
    ("asked", "left", "epoch", "reserved", "expected"),
    [
        (16, 1000.0, 1.0, 0.0, 16),
        (16, 10 * training.SLACK + 5.0, 1.0, 5.0, 10),
        (16, 10 * training.SLACK + 4.9, 1.0, 5.0, 9),
        (16, 3.0, 4.0, 0.0, 0),
        (16, 10.0, 1.0, 30.0, 0),
    ],
)
def test_epochs_are_shortened_to_what_fits(
    asked: int, left: float, epoch: float, reserved: float, expected: int
) -> None:
    assert training.fitting(asked, left, epoch, reserved) == expected


def test_turns_share_what_is_left() -> None:
    left, names = 300.0, list(science.RUNS)
    while names:
        seconds = science.turn(names[0], left, names)
        assert 0 < seconds <= left
        left -= seconds
        names = names[1:]
    assert left == pytest.approx(0)
    assert science.turn("fgsm-rs, full", -1.0, ["fgsm-rs, full"]) == 0.0


def test_the_settings_are_those_of_the_runs() -> None:
    found = {name: training.config_of(name, "x.npz", False) for name in science.RUNS}
    assert [config.epochs for config in found.values()] == [16, 16, 15, 15, 15]
    assert [config.experts for config in found.values()] == [5, 5, 1, 5, 5]
    assert [config.adversarial for config in found.values()] == ["off"] * 2 + ["fgsm-rs"] * 3
    plain = [(config.beta, config.gamma) == (0, 0) for config in found.values()]
    assert plain == [True, False, False, True, False]
    assert all((c.arch, c.amp, c.flip) == ("resnet18", "bf16", "on") for c in found.values())
    assert (training.PGD.steps, training.PGD.radius, training.PGD.alpha) == (50, 8 / 255, 2 / 255)


# In the place of a training: says that it is ready, waits for its turn, and does what its name says.
FAKE = """
import sys
from benchmarks import outcomes
name = sys.argv[sys.argv.index("--run") + 1]
if name.startswith("standard, full"):
    raise RuntimeError("no such kernel")
outcomes.report(name, "ready", first_step_seconds=1.5)
seconds = float(sys.stdin.readline())
outcomes.report(name, "training", epoch={"epoch": 1, "loss": 2.0})
if name == "fgsm-rs, plain":
    import threading; threading.Event().wait()
outcomes.report(name, "passed", pgd50={"accuracy": 0.5}, seconds=seconds)
"""


def test_trainings_have_turns_and_one_that_fails_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(science, "RESERVE", 0.0)
    monkeypatch.setitem(science.RUNS, "fgsm-rs, plain", 0.001)  # its turn is short
    out = tmp_path / "science.json"
    found = science.run(_python(FAKE), out, GENEROUS, cores=2, grace=0.5)
    assert json.loads(out.read_text(encoding="utf-8"))["runs"] == found["runs"]
    runs = {run["name"]: run for run in found["runs"]}
    assert list(runs) == list(science.RUNS)
    outcome = {name: run["outcome"] for name, run in runs.items()}
    assert outcome.pop("standard, full") == FAILED
    assert outcome.pop("fgsm-rs, plain") == NOT_FINISHED
    assert set(outcome.values()) == {PASSED}
    assert "RuntimeError: no such kernel" in runs["standard, full"]["cause"]
    assert runs["fgsm-rs, plain"]["epochs"] == [{"epoch": 1, "loss": 2.0}]
    assert runs["standard, plain"]["first_step_seconds"] == 1.5
    assert runs["standard, plain"]["pgd50"] == {"accuracy": 0.5}
    assert runs["standard, plain"]["seconds"] == runs["standard, plain"]["turn_seconds"]


def test_science_at_its_limit_says_what_was_not_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(science, "RESERVE", 0.0)
    found = science.run(_python(HANG), tmp_path / "science.json", 1.0, cores=1)
    assert {run["outcome"] for run in found["runs"]} == {NOT_FINISHED}
    assert all("no time was left" in run["cause"] for run in found["runs"])


def test_without_data_science_says_what_it_needs(tmp_path: Path) -> None:
    taken: list[dict[str, Any]] = []
    gpu.science(_stage(tmp_path), taken.append)
    assert [(one["outcome"], one["cause"]) for one in taken] == [
        (NOT_RUN, "--data FILE.npz is missing, the images to train on")
    ]
    assert not list(tmp_path.iterdir())


def test_a_command_that_is_ended_ends_what_it_started(tmp_path: Path) -> None:
    """SIGTERM, as `timeout` sends it; the records are there."""
    file, ready = tmp_path / "pid", tmp_path / "ready"
    os.mkfifo(ready)
    hanging = f"import os; open({str(file)!r}, 'w').write(str(os.getpid())); open({str(ready)!r}, 'w').close(); {HANG}"
    code = (
        "import signal, sys, time; from pathlib import Path;"
        "from benchmarks import gpu; from benchmarks.stages import Job;"
        "signal.signal(signal.SIGTERM, gpu._stop);"
        f"stage = gpu.Stage(Path({str(tmp_path / 'out')!r}), [], True, None, 0.0, {{}}, {{}}); stage.out.mkdir();"
        f"run = lambda stage, take: stage.run([Job('x', [sys.executable, '-c', {hanging!r}])], take);"
        "gpu.run_stages(('steps',), stage, time.monotonic() + 600, {'steps': run})"
    )
    process = subprocess.Popen(_python(code), cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    ready.open().close()  # until the other side has opened it, too
    process.send_signal(signal.SIGTERM)
    assert process.wait(GENEROUS) == 143
    assert not _alive(int(file.read_text()))
    found = json.loads((tmp_path / "out" / "stages.json").read_text(encoding="utf-8"))
    assert [one["name"] for one in found["stages"]] == ["steps"]


def test_a_job_that_is_stopped_may_remove_what_it_has_on_disk(tmp_path: Path) -> None:
    place, ready = tmp_path / "scratch", tmp_path / "ready"
    os.mkfifo(ready)
    code = (
        "import shutil, signal, sys, os;"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143));"
        f"os.mkdir({str(place)!r});\n"
        f"try:\n open({str(ready)!r}, 'w').close(); {HANG}\nfinally:\n shutil.rmtree({str(place)!r})"
    )
    reader = threading.Thread(target=lambda: ready.open().close())
    reader.start()
    found = _run(Job("job", _python(code), limit=3))
    reader.join()
    assert [one["outcome"] for one in found] == [FAILED]
    assert not place.exists()


def test_where_nothing_has_passed_nobody_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.cases.DEVICE", torch.device("cuda"))
    monkeypatch.setattr("benchmarks.record.header", lambda command: {"command": command})
    monkeypatch.setattr(sys, "argv", ["gpu", "--stages", "science", "--budget", "60", "--out", str(tmp_path / "out")])
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit, match="nothing has passed: 1 not run"):
        gpu.main()
    assert "1 not run" in capsys.readouterr().out


def test_a_record_that_cannot_be_written_stops_its_stage_alone(tmp_path: Path) -> None:
    def unwritable(stage: gpu.Stage, _take: Any) -> None:
        outcomes.write(stage.out / "no such folder" / "record.json", {})

    run = {"check": unwritable, "kernels": lambda _stage, take: take({"name": "a", "outcome": PASSED})}
    counts, failures = gpu.run_stages(("check", "kernels"), _stage(tmp_path), time.monotonic() + 20, run)
    assert counts == {FAILED: 1, PASSED: 1}
    assert "No such file" in failures[0]["cause"]


def test_causes_that_go_round_in_a_circle_end() -> None:
    error = RuntimeError("this")
    error.__cause__ = error
    assert outcomes.innermost_cause(error) == "RuntimeError: this"


def test_a_place_at_the_start_of_a_line_is_not_written(tmp_path: Path) -> None:
    outcomes.write(tmp_path / "record.json", {"tail": ["x\n/usr/lib/secret/place.py", "\t/usr/lib/secret/other.py"]})
    assert "secret" not in (tmp_path / "record.json").read_text(encoding="utf-8")


def test_a_training_is_measured_shortened_and_attacked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of a training but the GPU, on dozens of images."""
    name = "fgsm-rs, full"
    options = argparse.Namespace(data=str(write_data(tmp_path / "data.npz")), rehearse=True)
    trainer = training.prepared(name, options)
    found = training.trained(name, trainer, tmp_path, time.monotonic() + 10 * GENEROUS, True)
    assert found is not None
    assert found[1] == len(trainer.dataset.test)
    training.evaluated(name, trainer, time.monotonic() + 10 * GENEROUS, *found, True)
    told = [found for text in capsys.readouterr().out.splitlines() if (found := outcomes.read(text)) is not None]
    assert [one["outcome"] for one in told][:2] == ["ready", "training"]
    assert told[-1]["outcome"] == PASSED
    (epoch,) = [one["epoch"] for one in told if "epoch" in one]
    assert epoch["epoch"] == 1
    (clean,) = [one["clean"] for one in told if "clean" in one]
    assert clean["images"] == len(trainer.dataset.test)
    assert clean["interval"][0] <= clean["accuracy"] <= clean["interval"][1]
    pgd = told[-1]["pgd50"]
    assert pgd["right"] <= clean["right"]
    assert pgd["settings"]["known"] == training.KNOWN
    assert trainer.epoch == 1
    # No time for an epoch: nothing is trained, and it says why.
    trainer = training.prepared(name, options)
    assert training.trained(name, trainer, tmp_path, time.monotonic(), False) is None
    told = [found for text in capsys.readouterr().out.splitlines() if (found := outcomes.read(text)) is not None]
    assert (told[-1]["outcome"], trainer.epoch) == (NOT_RUN, 0)
    # The limit comes in the middle.
    trainer = training.prepared(name, options)
    trainer.until = time.monotonic()
    with pytest.raises(training.OutOfTimeError):
        training.take_steps(trainer, 1)
