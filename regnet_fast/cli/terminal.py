"""What the command line shows: lines, tables that keep their columns, and progress that costs no time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table


def line(text: str = "") -> None:
    """A line of text to standard output, as it is: no markup, no wrapping."""
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


def print_json(content: Any) -> None:
    """Everything as JSON to standard output."""
    print(json.dumps(content, indent=2, default=str))


def table(title: str, *columns: str, flexible: tuple[str, ...] = (), tight: bool = False) -> Table:
    """A table whose columns keep their width, except for those that may be folded; `tight` saves room between them."""
    padding = (0, 0 if tight else 1, 0, 0)
    rows = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=padding, pad_edge=False, show_edge=not tight
    )
    for column in columns:
        rows.add_column(column, no_wrap=column not in flexible, overflow="fold")
    return rows


def show(rows: Table) -> None:
    """Print a table, wider than the terminal where it must be, and whole where nobody is looking."""
    console = Console()
    needed = Measurement.get(console, console.options.update(width=10_000), rows)
    console.width = max(console.width, needed.minimum) if console.is_terminal else needed.maximum
    console.print(rows)


class Announcer:
    """A line of progress on standard error that changes only when it is called with a text.

    No thread redraws it: on two cores that would be timed too.
    """

    def __init__(self, progress: Progress, steps: int):
        self._progress, self._task = progress, progress.add_task("", total=steps)

    def __call__(self, text: str) -> None:
        self._progress.update(self._task, description=escape(text), refresh=True)

    def expect(self, steps: int) -> None:
        """So many steps there are, of which none is done."""
        self._progress.reset(self._task, total=steps)

    def advance(self) -> None:
        """One of the steps is done."""
        self._progress.update(self._task, advance=1, refresh=True)

    def print(self, text: str) -> None:
        """A line to standard output, with the line of progress out of its way."""
        self._progress.stop()
        line(text)
        self._progress.start()


@contextmanager
def progress(steps: int = 1) -> Iterator[Announcer]:
    """An announcer for a task of so many steps; it shows nothing where standard error is no terminal."""
    console = Console(stderr=True)
    columns = (BarColumn(20), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(
        *columns,
        console=console,
        auto_refresh=False,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
        disable=not console.is_terminal,
    ) as bar:
        yield Announcer(bar, steps)
