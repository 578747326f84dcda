"""Turns records into Markdown tables and plots: speed-up against size, share of the copy bandwidth against size.

    python -m benchmarks.report FILE [FILE ...] --out DIR

A FILE is what `benchmarks.record` wrote (`benchmarks.gpu`: kernels.json), or `pytest benchmarks --benchmark-json=FILE`.
In DIR: report.md, and for each FILE two plots that bear its name.
"""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.cases import COMPILED, EAGER, NAIVE, TRITON

VARIANTS = (NAIVE, EAGER, COMPILED, TRITON)
PLOTS = {"speedup": "Speed-up", "share_of_copy": "Share of the copy's bandwidth"}
Row = dict[str, Any]


class ReportError(Exception):
    """A file that cannot be reported on; one line."""


class Record(NamedTuple):
    """What is read of one file of records."""

    name: str
    title: str  # machine and versions
    copy: float  # GB/s
    cases: list[tuple[Row, dict[str, Row]]]  # of a case in one mode, the subject's row and every variant's
    failures: list[Row]
    steps: list[Row]  # of `benchmarks.gpu`


def load(path: Path) -> Record:
    """A record of either kind; ReportError where it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ReportError(f"{path}: not JSON ({error})") from None
    try:
        if "benchmarks" in content:  # pytest-benchmark's; what is no kernel has no speed-up
            rows = [test["extra_info"] for test in content["benchmarks"] if "speedup" in test["extra_info"]]
            content = {"records": rows} | ({"machine": rows[0]["device"]} | rows[0] if rows else {})
        if not content.get("records"):
            raise ReportError(f"{path}: holds no measurement of a kernel")
        versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items() if version)
        title = f"{content['machine']}; {versions}"
        cases = by_case(content["records"])
        return Record(
            path.stem, title, content["copy_gb_per_s"], cases, content.get("failures", []), content.get("steps", [])
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ReportError(f"{path}: not a record of benchmarks ({type(error).__name__}: {error})") from None


def by_case(rows: list[Row]) -> list[tuple[Row, dict[str, Row]]]:
    """Groups, dtypes and layouts in the order in which they were first measured, sizes in their own."""
    seen = {name: list(dict.fromkeys(row[name] for row in rows)) for name in ("group", "dtype", "layout", "mode")}

    def place(row: Row) -> tuple[Any, ...]:
        group, dtype, layout, mode = (seen[name].index(row[name]) for name in ("group", "dtype", "layout", "mode"))
        return (group, dtype, layout, row["shape"], row["samples"], mode)

    found = []
    for _, of_case in itertools.groupby(sorted(rows, key=place), place):
        variants = {row["variant"]: row for row in of_case}
        subject = variants.get(TRITON) or variants.get(EAGER)
        if subject:
            found.append((subject, variants))
    return found


def markdown(record: Record) -> str:
    """A section for the file, a table for each group."""
    lines = [f"## {record.name}", "", f"{record.title}. A copy moves {record.copy:,.4g} GB/s.", ""]
    lines += [f"* {step['name']}: {step['outcome']}, {step['seconds']} s" for step in record.steps]
    lines += [""] * bool(record.steps)
    for group, of_group in itertools.groupby(record.cases, lambda case: case[0]["group"]):
        cases = list(of_group)
        variants = [variant for variant in VARIANTS if any(variant in by_variant for _, by_variant in cases)]
        subject = cases[0][0]["variant"]
        baselines = [variant for variant in variants if variant != subject]
        columns = ["B", "size", "dtype", "layout", "pass", *(f"{variant}, µs" for variant in variants), "IQR, µs"]
        columns += ["GB/s", "of copy", *(f"× {variant}" for variant in baselines), "peak, MiB"]
        lines += [f"### {group}", "", f"IQR, GB/s, share of the copy's bandwidth, speed-ups and memory: {subject}.", ""]
        lines += ["| " + " | ".join(columns) + " |", "|" + "---:|" * 2 + "---|" * 3 + "---:|" * (len(columns) - 5)]
        lines += [
            "| " + " | ".join(cells(row, by_variant, variants, baselines)) + " |"
            for row, by_variant in cases
            if row["variant"] == subject
        ]
        lines.append("")
    if any(row["timed"] == "events" for _, by_variant in record.cases for row in by_variant.values()):
        lines += ["\\* launched from the host, not by a CUDA graph.", ""]
    lines += [f"* no number: {f['case']}, {f['mode']}, {f['variant']}: {f['error']}" for f in record.failures]
    return "\n".join(lines)


def cells(row: Row, by_variant: dict[str, Row], variants: list[str], baselines: list[str]) -> list[str]:
    """The cells of a case's line in a table, as text."""

    def time(variant: str) -> str:
        if variant not in by_variant:
            return "–"
        other = by_variant[variant]
        return number(other["median_us"]) + ("\\*" if other["timed"] == "events" else "")

    return [
        str(row["samples"]),
        "×".join(map(str, row["shape"])),
        row["dtype"],
        row["layout"],
        row["mode"],
        *map(time, variants),
        number(row["iqr_us"]),
        number(row["gb_per_s"]),
        f"{100 * row['share_of_copy']:.1f} %",
        *(number(row["speedup"][other]) if other in row["speedup"] else "–" for other in baselines),
        "–" if row["peak_mib"] is None else number(row["peak_mib"]),
    ]


def number(value: float) -> str:
    """With three digits, or all that stand before the point."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f}"


def main() -> None:
    """The command `python -m benchmarks.report`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    options = parser.parse_args()
    text = "# Benchmarks of the losses\n"
    try:
        from benchmarks import plots  # matplotlib is not needed to measure

        records = [load(file) for file in options.files]
        options.out.mkdir(parents=True, exist_ok=True)
        for record in records:
            text += f"\n{markdown(record)}\n"
            for quantity, name in PLOTS.items():
                image = options.out / f"{record.name}_{quantity}.png"
                plots.plot(record.cases, quantity, record.title, image)
                text += f"\n![{name} against size]({image.name})\n"
        (options.out / "report.md").write_text(text, encoding="utf-8")
    except (ReportError, OSError) as error:
        raise SystemExit(f"error: {' '.join(str(error).split())}") from None
    except ModuleNotFoundError as error:
        raise SystemExit(f"error: the plots need {error.name}: pip install {error.name}") from None
    print(text)


if __name__ == "__main__":
    main()
