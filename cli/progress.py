"""A progress bar on stderr with rate and time left."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        """What was said with the last move, else units a second, once there is a measurement."""
        speed = f"{task.speed:,.0f}" if task.speed else "-"
        return Text(task.fields["text"] or f"{speed} {self.unit}/s")


class Bar:
    """A bar that is moved by calling it."""

    def __init__(self, progress: Progress, title: str, total: int | None) -> None:
        self._progress = progress
        self._task = progress.add_task(title, total=total, text="")
        self._title, self._moved = title, False

    def __call__(self, done: int, total: int | None, text: str = "") -> None:
        """Move to `done` of `total`; text: in place of the rate."""
        if not self._moved:  # where work that was stopped goes on is no speed
            self._progress.tasks[0].completed = done
            self._moved = True
        self._progress.update(self._task, completed=done, total=total, text=text)

    def stage(self, title: str, done: int, total: int | None) -> None:
        """Move as by a call, in work of several stages, each of which begins anew."""
        if title != self._title:
            self._title, self._moved = title, False
            self._progress.reset(self._task, description=title)
        self(done, total)

    def print(self, line: str) -> None:
        """Print a line to stdout; where that is the terminal that the bar is on, above the bar."""
        if sys.stdout.isatty() and not self._progress.disable:
            self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, flush=True)


@contextlib.contextmanager
def bar(title: str, unit: str, *, total: int | None = None, enabled: bool = True) -> Iterator[Bar]:
    """A bar that is moved by calling what the block gets with (done, total)."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=14),  # all of it fits 80 columns
        MofNCompleteColumn(),
        _Rate(unit),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    # What others print to stdout stays there: it may be a file.
    with Progress(*columns, console=console, disable=not enabled, redirect_stdout=False) as shown:
        yield Bar(shown, title, total)
