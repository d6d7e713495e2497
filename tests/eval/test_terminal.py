"""Names of files and models stand on the terminal as they are, whatever brackets and colons are in them."""

import io

from rich.console import Console
from rich.table import Table

from vtok.eval.common import terminal
from vtok.eval.report.printed import scores

NAME = "out[/v1] [bold]x[/bold] :smile: [b]"


def _heard(console):
    console.file = io.StringIO()
    return console


def test_names_are_no_markup():
    for console in (terminal.output(200), terminal.errors()):
        console = _heard(console)
        console.print(f"written: {NAME}", soft_wrap=True)
        table = Table(NAME, title=NAME, caption=NAME)
        table.add_row(NAME)
        console.print(table)
        assert console.file.getvalue().count(NAME) >= 2


def test_descriptions_of_bars_are_no_markup():
    console = Console(file=io.StringIO(), markup=False, emoji=False, width=200, force_terminal=True)
    with terminal.progress(console) as bars:
        bars.add_task(NAME, total=1)
        bars.refresh()
    assert "[/v1]" in console.file.getvalue() and ":smile:" in console.file.getvalue()


def test_skipped_files_are_shown_with_their_whole_name():
    console = _heard(terminal.output(200))
    record = {
        "model": NAME, "n": 8, "img_size": 8, "setting": "tome", "metrics": {"top1": 50.0, "top1_stderr": 1.0, "top5": 60.0},
        "tokens": {"out": 5.0}, "gmacs": {"model": 1.0}, "gflops": {"model": 2.0}, "implied_speedup": 1.0, "notes": [NAME],
        "num_skipped": 1, "skipped": [{"file": "a/[b]2[/b].png", "reason": NAME}],
    }  # fmt: skip
    scores([record], console)
    assert f"a/[b]2[/b].png was skipped: {NAME}" in console.file.getvalue()
