"""An evaluation from its plan to its report: run with a progress bar, written down, printed."""

import time

from immunity_fast.data.datasets import ImageDataset, fingerprint
from immunity_fast.evaluation.least import least_sentence
from immunity_fast.evaluation.ledger import Ledger
from immunity_fast.evaluation.plan import Plan, Row
from immunity_fast.evaluation.report import About, Outputs, write
from immunity_fast.evaluation.results import Results, worst_case
from immunity_fast.evaluation.runner import Evaluation
from immunity_fast.evaluation.targets import TargetModel
from immunity_fast.losses import FusedImmunityLoss
from immunity_fast.runtime import cli
from immunity_fast.runtime.precision import emulation_line, set_float32


def evaluate(
    target: TargetModel,
    dataset: ImageDataset,
    plan: Plan,
    outputs: Outputs,
    about: About,
    loss_fn: FusedImmunityLoss | None = None,
    *,
    printed: bool = True,
) -> Results:
    """Carry out a plan on the test split, taking over what is finished; write results.json, tables, figures, report.

    Args:
        target: in evaluation mode, on the data's device.
        dataset: whose test split is attacked.
        plan: what to find out.
        outputs: the folder, which is made where it is missing.
        about: for the report.
        loss_fn: how the heatmaps of a mixture of at least 2 experts are looked at.
        printed: print the tables, and where the report is.

    Returns:
        `results.results`.

    Raises:
        ValueError: a model that cannot be attacked or whose output is not finite.
    """
    set_float32("ieee")  # the numbers that are kept are not to depend on the device
    evaluation = Evaluation(
        target,
        dataset.test,
        plan,
        Ledger(outputs.ledger),
        data=fingerprint(dataset.test),
        loss_fn=loss_fn,
    )
    outputs.figures.mkdir(parents=True, exist_ok=True)
    for pair in evaluation.left_out:
        cli.console.print(f"left out: {pair['attack']} by {pair['attacker']}: {pair['why']}")
    if (note := emulation_line(plan.amp, dataset.test.labels.device)) is not None:
        cli.console.print(note)
    _run(evaluation)
    found, shown = write(evaluation, dataset, outputs, about)
    for table in shown if printed else ():
        cli.console.print()
        cli.console.print(table.to_markdown())
    if printed:
        if (least := least_sentence(found)) is not None:
            cli.console.print(f"\n{least}")
        cli.console.print(f"\nreport: {outputs.report}")
    return found


def _run(evaluation: Evaluation) -> None:
    """Compute what an evaluation misses, with a progress bar, or now and then a line.

    After the first images it prints an estimate of what will come out.
    """
    pieces = list(evaluation.pieces())
    remaining = sum(
        stop - start for row, start, stop in pieces if evaluation.key(row, start, stop) not in evaluation.ledger
    )
    if len(pieces) and remaining < sum(stop - start for _, start, stop in pieces):
        cli.console.print(f"going on with {evaluation.ledger.path}")
    judge = evaluation.target.judges[0]
    begin, estimated, done, status = time.perf_counter(), False, 0, ""
    total = sum(stop - start for _, start, stop in pieces)

    def told() -> str:
        minutes = (time.perf_counter() - begin) / 60
        return f"evaluation: {done:,} of {total:,} images after {minutes:.0f} min" + (f"; {status}" if status else "")

    with cli.progress_bar() as progress, cli.status_lines(told):
        task = progress.add_task("evaluation", total=total, status="")

        def advance(row: Row, images: int, new: bool) -> None:
            nonlocal estimated, done, status
            done += images
            progress.advance(task, images)
            if row != evaluation.rows[-1]:
                return
            so_far = worst_case(evaluation, judge)
            low, high = so_far["interval"]
            status = (
                f"worst case so far {100 * so_far['accuracy']:.1f} % (95 %: {100 * low:.1f} to {100 * high:.1f}), "
                f"{so_far['images']} images"
            )
            progress.update(task, status=status)
            if new and not estimated and so_far["images"] < len(evaluation.order):
                estimated = True
                seconds = time.perf_counter() - begin
                progress.console.print(f"{status}; these took {seconds:.0f} s")

        evaluation.run(advance)
