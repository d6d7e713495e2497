"""The program `vtok`: its commands by name. What a command needs is imported when it is called, not for `--help` or a typo."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperGroup

import vtok
from vtok.eval.common import terminal
from vtok.eval.common.launch import check_command


class Entry(NamedTuple):
    """A command.

    Attributes:
        home: "module:function" in `vtok.eval.cli`.
        help: the first line of the function's docstring.
    """

    home: str
    help: str


COMMANDS = {
    "methods": Entry("app:methods", "Lists the methods with their parameters and defaults."),
    "plan": Entry(
        "app:plan", "Tokens and MACs per block and the implied speed-up of methods on a model, before anything runs."
    ),
    "bench": Entry(
        "app:bench", "Times patched models against the unpatched one, interleaved in one run, beside what their MACs imply."
    ),
    "bench-select": Entry(
        "app:bench_select",
        "Times the choice of diverse tokens against loops that go step by step; or the choice of every method.",
    ),
    "bench-growth": Entry(
        "growth:bench_growth", "Times every method at growing numbers of tokens, beside the attention that it saves."
    ),
    "bench-suite": Entry(
        "suite:bench_suite",
        "Runs a list of benchmarks; a second start goes on where the first stopped. Prints one table of all.",
    ),
    "demo": Entry(
        "demo:demo",
        "Methods for encoders on a pretrained DINOv2, methods for prompts on a LLaVA above it: accuracy, cost, speed.",
    ),
    "run": Entry("run:run", "Runs a configuration and prints what is measured, beside what was published for it."),
    "sweep": Entry("run:sweep", "Runs a grid of settings or a list of FLOPs budgets: a table, sweep.csv and sweep.png."),
    "tune": Entry(
        "tune:tune",
        "Searches the schedule of a method at a FLOPs budget, compares it with the default on held-out images, writes a "
        "config.",
    ),
    "configs": Entry(
        "published:list_configs",
        "Lists the runs that come with vtok by table, with their published figures and what differs from them by convention.",
    ),
    "published": Entry(
        "published:run_published",
        "Runs a whole table of published results and prints what was published beside what is measured.",
    ),
    "report": Entry(
        "report:write_page",
        "Writes results as one self-contained HTML page: tables, plots, what is significant, how to repeat it.",
    ),
    "viz": Entry(
        "viz:draw_tokens",
        "Draws which tokens of an image are merged, dropped and kept, layer by layer; of vision-language models in the LLM "
        "too.",
    ),
    "export": Entry(
        "export:write_onnx",
        "Writes a vision encoder with a method in it as an ONNX file, for onnxruntime, OpenVINO and others.",
    ),
    "matrix": Entry(
        "matrix:print_matrix",
        "Which methods work on which models, found out by running them: tokens go down, and removing equals masking.",
    ),
}
EVALUATIONS = {
    "imagenet": Entry(
        "tasks.imagenet:evaluate_imagenet",
        "Accuracy on an ImageNet-style folder with timm's own pipeline, unpatched and patched on the same batches.",
    ),
    "zeroshot": Entry(
        "tasks.clip:evaluate_zeroshot",
        "Zero-shot accuracy of a CLIP-like model on an image folder, unpatched and patched on the same batches.",
    ),
    "retrieval": Entry(
        "tasks.clip:evaluate_retrieval",
        "Image and text recall of a CLIP-like model on captioned images, unpatched and patched on the same batches.",
    ),
    "vqa": Entry(
        "tasks.vqa:evaluate_vqa",
        "Answers of a vision-language model to questions about images, unpatched and patched on the same batches.",
    ),
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
