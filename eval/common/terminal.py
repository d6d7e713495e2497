"""What goes to the terminal: names of files, models and data as they are, never read as rich's markup or emoji codes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

WARNING = "yellow"  # style of what went wrong but does not end a run


def output(width: int = 132) -> Console:
    """To standard output; piped into a file or a log, tables keep `width` columns."""
    found = Console(markup=False, emoji=False)
    return found if found.is_terminal else Console(markup=False, emoji=False, width=width)


def errors(quiet: bool = False) -> Console:
    """To standard error: progress, warnings."""
    return Console(stderr=True, markup=False, emoji=False, quiet=quiet)


def progress(console: Console | None = None, transient: bool = False, counted: bool = True) -> Progress:
    """Bars with a description each, by default on standard error; `transient` ones vanish at the end."""
    columns = [TextColumn("{task.description}", markup=False), BarColumn(), *([MofNCompleteColumn()] if counted else [])]
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console or errors(), transient=transient)


@contextmanager
def bar(what: str, total: int | None = None, console: Console | None = None) -> Iterator[Callable[[int, int], None]]:
    """One bar that vanishes at the end; gives what is called with (done, total)."""
    with progress(console, transient=True) as shown:
        task = shown.add_task(what, total=total)
        yield lambda done, total: shown.update(task, completed=done, total=total)
