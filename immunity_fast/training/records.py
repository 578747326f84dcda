"""The records of a training's epochs, as a list of dictionaries that reads as a table, in a notebook above all."""

from __future__ import annotations

from typing import Any, SupportsIndex, overload

from immunity_fast.reporting.html import Table

# What of a record is shown: the column's title, how a value is written, and by what it is multiplied.
COLUMNS = {
    "epoch": ("epoch", "{:.0f}", 1),
    "lr": ("learning rate", "{:.2g}", 1),
    "loss": ("loss", "{:.3f}", 1),
    "cross_entropy": ("cross-entropy", "{:.3f}", 1),
    "mutual_information": ("mutual information, nats", "{:.2f}", 1),
    "val_accuracy_sample": ("accuracy, gate sample, %", "{:.1f}", 100),
    "val_accuracy_mean": ("accuracy, gate mean, %", "{:.1f}", 100),
    "val_fgsm_accuracy_mean": ("under FGSM, %", "{:.1f}", 100),
    "val_pgd10_accuracy_mean": ("under PGD-10, %", "{:.1f}", 100),
    "images_per_second": ("images/s", "{:.0f}", 1),
}
NOTE = "Accuracies are of validation images; all that a record holds is in the list itself."


class Records(list[dict[str, Any]]):
    """A list of records, an epoch each, as metrics.jsonl has them; `pandas.DataFrame(records)` takes it, too."""

    def table(self) -> Table:
        """What a person looks at, a row an epoch; what no epoch has is left out, as is what one network has not."""
        names = [name for name in COLUMNS if any(record.get(name) is not None for record in self)]
        if not any(record.get("mutual_information_loss") for record in self):
            names = [name for name in names if name != "mutual_information"]
        rows = [[_cell(name, record.get(name)) for name in names] for record in self]
        return Table("", [COLUMNS[name][0] for name in names], rows, NOTE if rows else "")

    @overload
    def __getitem__(self, which: SupportsIndex) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, which: slice) -> Records: ...

    def __getitem__(self, which: SupportsIndex | slice) -> dict[str, Any] | Records:
        found = super().__getitem__(which)
        return Records(found) if isinstance(which, slice) else found  # type: ignore[arg-type, return-value]

    def _repr_html_(self) -> str:
        return self.table().to_html() if self else "no epochs yet"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """IPython's text of it: what is kept beside the HTML in a notebook's file."""
        printer.text(self.table().to_markdown() if self else "[]")


def _cell(name: str, value: float | None) -> str:
    _, form, factor = COLUMNS[name]
    return "—" if value is None else form.format(factor * value)
