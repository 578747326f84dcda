"""The losses' operations, each beside its baselines; `pytest benchmarks --benchmark-only`.

pytest-benchmark times one test after the other, which would blame a change of the machine on whoever runs next. So the
first test of a case measures all its variants in turns, and each test then replays the rounds of its own.
"""

import itertools

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import machine
from benchmarks.cases import Case, all_cases
from benchmarks.measure import keys, measure


class ReplayClock:
    """A clock that stands still but for what is added to it."""

    def __init__(self) -> None:
        self.now = 0.0

    def read(self) -> float:
        """The time in seconds."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Put the clock forward by so many seconds."""
        self.now += seconds


CLOCK = ReplayClock()


@pytest.mark.benchmark(timer=CLOCK.read)
@pytest.mark.parametrize(
    ("case", "mode", "variant"),
    [
        pytest.param(case, mode, variant, id=f"{case} {mode} {variant}".replace(" ", "-"))
        for case in all_cases()
        for mode, variant in keys(case)
    ],
)
def test_kernel(benchmark: BenchmarkFixture, case: Case, mode: str, variant: str) -> None:
    measured = measure(case)
    if measured.skipped:
        pytest.skip(measured.skipped)
    if (mode, variant) in measured.failures:
        pytest.fail(measured.failures[mode, variant], pytrace=False)
    benchmark.group = f"{case} {mode}"
    header = {"device": machine.device(), "versions": machine.versions(), "copy_gb_per_s": machine.copy_gb_per_s()}
    benchmark.extra_info |= header | measured.records[mode, variant]
    rounds = measured.seconds[mode, variant]
    durations = itertools.cycle(rounds)
    benchmark.pedantic(lambda: CLOCK.advance(next(durations)), rounds=len(rounds), iterations=1)  # type: ignore[no-untyped-call]
