"""Progress in a notebook: one line of a cell's output that changes in place, where a terminal would have a bar."""

from __future__ import annotations

import html
import sys
import time
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import Progress, Task, TaskID

SECONDS = 0.25  # between two versions of the line: each is a message to the browser


def in_notebook() -> bool:
    """Whether what is displayed is shown by a notebook: Jupyter's, or one that runs its kernels, such as VS Code's."""
    if "IPython" not in sys.modules:  # whose kernel a notebook's process is
        return False
    shell = sys.modules["IPython"].get_ipython()
    return getattr(shell, "kernel", None) is not None


class NotebookProgress(Progress):
    """rich's progress as a line of HTML with a bar; it needs no widgets, and stays behind with what was done.

    Args:
        console: takes the lines that are printed beside it, as text.
    """

    def __init__(self, console: Console) -> None:
        super().__init__(console=console, disable=True)  # of rich's own displays; it still counts
        self._handle: Any = None
        self._shown = 0.0

    def stop(self) -> None:
        """Show how far it has come, for good."""
        if self.tasks:
            self._show(ended=True)

    def add_task(self, description: str, *args: Any, **fields: Any) -> TaskID:
        """As rich's, and shown."""
        task = super().add_task(description, *args, **fields)
        self._show()
        return task

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """As rich's, and shown now and then."""
        super().advance(task_id, advance)
        self._show_now_and_then()

    def update(self, task_id: TaskID, **fields: Any) -> None:
        """As rich's, and shown now and then."""
        super().update(task_id, **fields)
        self._show_now_and_then()

    def _show_now_and_then(self) -> None:
        if time.monotonic() - self._shown >= SECONDS:
            self._show()

    def _show(self, *, ended: bool = False) -> None:
        from IPython.display import display  # not at the top: only a notebook has it

        self._shown = time.monotonic()
        lines = [text_of(task, ended=ended) for task in self.tasks]
        bars = [html_of(task, line, ended=ended) for task, line in zip(self.tasks, lines, strict=True)]
        shown = {"text/plain": "\n".join(lines), "text/html": "<br>".join(bars)}
        if self._handle is None:
            self._handle = display(shown, raw=True, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._handle.update(shown, raw=True)


def text_of(task: Task, *, ended: bool = False) -> str:
    """How far a task has come, in a line."""
    parts = [f"{task.description}: {task.completed:,.0f} of {task.total or 0:,.0f}"]
    parts += [f"{clock(task.elapsed)} so far" if not ended else f"{clock(task.elapsed)}"]
    if not ended:
        parts += [f"{clock(task.time_remaining)} left"] if task.time_remaining is not None else []
        parts += [str(task.fields["status"])] if task.fields.get("status") else []
    return ", ".join(parts)


def html_of(task: Task, line: str, *, ended: bool = False) -> str:
    """The same, with a bar before it while it goes on."""
    text = f'<span style="font-family: monospace">{html.escape(line)}</span>'
    if ended:
        return text
    return f'<progress value="{task.completed:g}" max="{task.total or 1:g}"></progress> {text}'


def clock(seconds: float | None) -> str:
    """Seconds as 0:01:23."""
    return str(timedelta(seconds=int(seconds or 0)))
