"""Which operators a training step's losses add: a profile of the whole step beside that of its cross-entropy alone.

    python -m benchmarks.operators --out FILE [--arch densenet121] [--way "eager loop, channels-last"]

Times are those of the operators themselves, without what they call, under a profiler, which slows small ones down: what
counts is how the difference is made up.
"""

import argparse
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.outcomes import write
from benchmarks.record import header
from benchmarks.step_cases import CROSS_ENTROPY, FULL, WAYS, StepCase, Way, cases

STEPS = 5
# In this order: an operator is of the first kind of which a word is in its name.
KINDS = {
    "convolutions": ("conv",),
    "batch normalisation": ("batch_norm", "batchnorm"),
    "ReLU, concatenation, pooling": ("relu", "clamp_min", "threshold", "cat", "slice", "narrow", "pool"),
    "memory: allocated, cleared, copied": ("empty", "zero", "fill", "copy", "clone", "resize", "_like", "contiguous"),
    "sums and products of maps and statistics": ("add", "mul", "div", "sub", "sum", "mean", "rsqrt", "square", "neg"),
}
PYTHON = "Python and autograd between them"
REST = "the rest"


def main() -> None:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    by_arch = {case.arch: case for case in reversed(cases(quick=False))}  # of several cases the first
    parser.add_argument("--arch", default="densenet121", choices=by_arch)
    parser.add_argument("--way", default="eager loop, channels-last", choices=[way.name for way in WAYS])
    given = parser.parse_args()
    way = next(way for way in WAYS if way.name == given.way)
    record = header(f"python -m benchmarks.operators --arch {given.arch} --way '{given.way}'") | measured(
        by_arch[given.arch], way
    )
    write(given.out, record)
    print(table(record))


def measured(case: StepCase, way: Way) -> dict[str, Any]:
    """Milliseconds a step by kind of operator, of both losses, and the operators that differ most."""
    by_loss = {loss: _profiled(case, way, loss) for loss in (CROSS_ENTROPY, FULL)}
    names = sorted(set().union(*by_loss.values()), key=lambda name: -_added(by_loss, name))
    return {
        "case": str(case),
        "way": way.name,
        "kinds": {
            kind: {
                loss: round(sum(found[name] for name in found if kind_of(name) == kind), 3)
                for loss, found in by_loss.items()
            }
            for kind in (*KINDS, PYTHON, REST)
        },
        "operators": [
            {"name": name, **{loss: round(found.get(name, 0.0), 3) for loss, found in by_loss.items()}}
            for name in names[:20]
        ],
    }


def _added(by_loss: dict[str, dict[str, float]], name: str) -> float:
    return by_loss[FULL].get(name, 0.0) - by_loss[CROSS_ENTROPY].get(name, 0.0)


def _profiled(case: StepCase, way: Way, loss: str) -> dict[str, float]:
    """Milliseconds a step of each operator."""
    step, _ = case.step(way, loss)
    for _ in range(2):
        step()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(STEPS):
            step()
    return {event.key: event.self_cpu_time_total / 1e3 / STEPS for event in found.key_averages()}


def kind_of(name: str) -> str:
    """Of an operator's name; what is not PyTorch's own is Python's or autograd's."""
    if not name.startswith("aten::"):
        return PYTHON
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), REST)


def table(record: dict[str, Any]) -> str:
    """Markdown: a row a kind."""
    kinds: dict[str, dict[str, float]] = record["kinds"]
    added = sum(each[FULL] - each[CROSS_ENTROPY] for each in kinds.values())
    rows = [
        f"| {record['case']} | cross-entropy, ms | full, ms | added, ms | of all that is added |",
        "|---|" + "---:|" * 4,
    ]
    for kind, each in kinds.items():
        more = each[FULL] - each[CROSS_ENTROPY]
        rows.append(f"| {kind} | {each[CROSS_ENTROPY]:,.1f} | {each[FULL]:,.1f} | {more:,.1f} | {more / added:.0%} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
