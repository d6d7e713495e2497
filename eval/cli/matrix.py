"""`vtok matrix`."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated

import typer

from vtok.errors import ConfigError
from vtok.eval.common import terminal
from vtok.registry import METHODS, encoder_methods
from vtok.writing import write


def print_matrix(
    backend: Annotated[list[str] | None, typer.Option(help="repeatable; default: all that are installed")] = None,
    method: Annotated[list[str] | None, typer.Option(help="name; repeatable (default: all)")] = None,
    markdown: Annotated[bool, typer.Option(help="print the table as GitHub markdown")] = False,
    output: Annotated[Path | None, typer.Option("--json", help="file for every cell, with what was measured")] = None,
    into: Annotated[Path | None, typer.Option(help="file, such as assets/docs/support.md, whose table is replaced")] = None,
    generic: Annotated[bool, typer.Option(help="vision-language models that no row describes, as markdown, instead")] = False,
) -> None:
    """Which methods work on which models, found out by running them: tokens go down, and removing equals masking.

    Ends with code 1 if some method is neither right nor refused.
    """
    for name in method or ():
        METHODS.check(name)
    from vtok.eval.common.settings import versions
    from vtok.eval.matrix import encoder as matrix
    from vtok.eval.matrix import generic as generic_matrix
    from vtok.eval.matrix import report as matrix_report
    from vtok.eval.matrix import vlm as vlm_matrix
    from vtok.eval.runs import loader as runs
    from vtok.testing import tiny

    runs.prepared(output, [into])
    marks = (generic_matrix.BEGIN, generic_matrix.END) if generic else (matrix_report.BEGIN, matrix_report.END)
    page = "" if into is None else _read(into)

    def put(made: str) -> None:
        if into is not None:
            write(into, matrix_report.put_into(page, made, *marks))

    if into is not None:
        matrix_report.put_into(page, "", *marks)  # refuses a page without a place for it, now
    if generic:
        if backend or method or output is not None:
            raise ConfigError("--generic asks every method about every class; leave --backend, --method and --json out")
        made = generic_matrix.markdown(generic_matrix.answers())
        put(made)
        return print(made)
    examples, too_new = tiny.examples(backend)
    vlms = tiny.vlm_examples(backend)
    inside = [name for name in method or encoder_methods() if METHODS.get(name).for_encoders()]
    console, errors = terminal.output(160), terminal.errors()
    with terminal.progress(errors, transient=True) as progress:
        bar = progress.add_task("models", total=len(examples) * len(inside) + len(vlms) * len(method or METHODS.names()))
        found = []
        for cell in itertools.chain(matrix.cells(examples, inside), vlm_matrix.cells(vlms, method)):
            found.append(cell)
            progress.update(bar, advance=1, description=f"{cell.backend}: {cell.model}")
    for name, example in too_new.items():
        errors.print(f"left out: {name} (needs release {example.since})", highlight=False)
    if output is not None:
        write(output, matrix.to_json(found))
    put(matrix_report.markdown(found))
    if markdown:
        print(matrix_report.markdown(found))
    else:
        software = ", ".join(f"{name} {version}" for name, version in versions().items())
        for part in matrix_report.parts(found):
            console.print(matrix_report.table(part, software))
            console.print(matrix_report.notes(part), markup=False, highlight=False)
    if any(cell.status == matrix.FAILED for cell in found):
        raise typer.Exit(1)


def _read(path: Path) -> str:
    if not path.is_file():
        raise ConfigError(f"{path} is no file; --into takes one that has a place for the table, such as assets/docs/support.md")
    return path.read_text(encoding="utf-8")
