"""The program `vtok`: its commands by name. What a command needs is imported when it is called, not for `--help` or a typo."""

from __future__ import annotations

import ast
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperGroup

import vtok
from vtok.eval.common import terminal
from vtok.eval.common.launch import check_command


@cache
def _first_lines(module: str) -> dict[str, str]:
    """Function of a module in this folder -> first line of its docstring, read without importing what the module imports.

    Empty where sources were not installed.
    """
    source = Path(__file__).with_name(f"{module}.py")
    tree = ast.parse(source.read_text(encoding="utf-8") if source.is_file() else "")
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {node.name: (ast.get_docstring(node) or "").partition("\n")[0] for node in functions}


class Entry(NamedTuple):
    """A command: "module:function" in `vtok.eval.cli`."""

    home: str

    @property
    def help(self) -> str:
        """What the list of commands says of it."""
        module, _, function = self.home.partition(":")
        return _first_lines(module).get(function, "")


COMMANDS = {
    "methods": Entry("app:methods"),
    "plan": Entry("app:plan"),
    "bench": Entry("bench:bench"),
    "bench-select": Entry("bench:bench_select"),
    "bench-growth": Entry("bench:bench_growth"),
    "bench-suite": Entry("bench:bench_suite"),
    "demo": Entry("demo:demo"),
    "run": Entry("run:run"),
    "sweep": Entry("run:sweep"),
    "tune": Entry("tune:tune"),
    "configs": Entry("published:list_configs"),
    "published": Entry("published:run_published"),
    "report": Entry("pages:write_page"),
    "viz": Entry("pages:draw_tokens"),
    "export": Entry("app:write_onnx"),
    "matrix": Entry("matrix:print_matrix"),
}
EVALUATIONS = {
    "imagenet": Entry("tasks:evaluate_imagenet"),
    "zeroshot": Entry("tasks:evaluate_zeroshot"),
    "retrieval": Entry("tasks:evaluate_retrieval"),
    "vqa": Entry("tasks:evaluate_vqa"),
}
_BOOK: dict[str, Any] = {"hidden": True, "deprecated": True, "help": "Called published now."}  # its name in 0.1


class OnCall(TyperGroup):
    """Commands that are placeholders, with a name and a line of help, until one of them is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, found, rest = super().resolve_command(ctx, args)
        home = getattr(getattr(found, "callback", None), "home", None)
        return name, command_at(home, str(name)) if home else found, rest


def command_at(home: str, name: str) -> Any:
    """The command that a function is."""
    module, _, function = home.partition(":")
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    alone.command(name, **(_BOOK if name == "book" else {}))(getattr(import_module(f"vtok.eval.cli.{module}"), function))
    return typer.main.get_command(alone)


def _placeholder(home: str) -> Any:
    def called() -> None: ...

    called.home = home  # type: ignore[attr-defined]  # read by `OnCall` when the command is called
    return called


_plain: dict[str, Any] = {"no_args_is_help": True, "add_completion": False, "pretty_exceptions_enable": False, "cls": OnCall}
app = typer.Typer(help=vtok.__doc__, **_plain)
_evaluate = typer.Typer(help="Accuracy of patched models on standard tasks.", **_plain)
for _app, _entries in ((app, COMMANDS), (_evaluate, EVALUATIONS)):
    for _name, _entry in _entries.items():
        _app.command(_name, help=_entry.help)(_placeholder(_entry.home))
app.command("book", **_BOOK)(_placeholder("published:run_published"))
app.add_typer(_evaluate, name="eval")


@app.callback(invoke_without_command=True)
def _main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="print the version and leave")] = False,
) -> None:
    check_command(context.invoked_subcommand)
    if version:
        terminal.output().print(vtok.__version__)
        raise typer.Exit
