"""The collapse of single-step adversarial training, catastrophic overfitting: its sign in the records, and its line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from immunity_fast.evaluation.metrics import wilson_interval


def collapsed(records: Sequence[Mapping[str, float]], images: int) -> float | None:
    """The PGD accuracy that was lost, if the last epoch's record shows catastrophic overfitting; None if it does not.

    That is (Wong et al., arXiv 2001.03994, section 5.4): accuracy under PGD has fallen, by half or more and beyond the
    chance of so few images, and to half or less of that under FGSM: the network is robust against single steps alone.

    Args:
        records: of the epochs so far, with `val_pgd10_accuracy_mean` and `val_fgsm_accuracy_mean`.
        images: how many were attacked.
    """
    if not records or not {"val_fgsm_accuracy_mean", "val_pgd10_accuracy_mean"} <= records[-1].keys():
        return None
    under_pgd = [record["val_pgd10_accuracy_mean"] for record in records if "val_pgd10_accuracy_mean" in record]
    best, last = max(under_pgd), under_pgd[-1]
    apart = wilson_interval(round(last * images), images)[1] < wilson_interval(round(best * images), images)[0]
    if apart and last <= best / 2 and last <= records[-1]["val_fgsm_accuracy_mean"] / 2:
        return best
    return None


def collapse_line(record: Mapping[str, float], lost: float, best: Path | None) -> str:
    """The line on a training that has collapsed, by catastrophic overfitting: what is lost, and what may help.

    Args:
        record: the epoch's, as metrics.jsonl has it.
        lost: validation accuracy under PGD-10 before, a fraction.
        best: the checkpoint from before; None where nothing is saved.
    """
    kept = "" if best is None else f" {best} is from before."
    return (
        f"epoch {record['epoch']}: training has collapsed (catastrophic overfitting): validation accuracy under PGD-10 "
        f"fell from {100 * lost:.1f} % to {100 * record['val_pgd10_accuracy_mean']:.1f} % although it is "
        f"{100 * record['val_fgsm_accuracy_mean']:.1f} % under FGSM.{kept} Try a "
        "smaller --eps or --lr, fewer epochs, or --adversarial pgd"
    )
