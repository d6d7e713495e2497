"""`vtok eval imagenet`: the flags of timm's validate.py, made from the fields of `Options`, plus `--method`."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from vtok.errors import ConfigError
from vtok.eval.runs import parse_method, prepared
from vtok.eval.tasks.timm_pipeline import Options

_SHORT = {"batch_size": "-b", "workers": "-j"}


def evaluate_imagenet(**flags: Any) -> None:
    """Accuracy on an ImageNet-style folder with timm's own pipeline, unpatched and patched on the same batches."""
    from vtok.eval.tasks.imagenet import evaluate

    console = Console() if sys.stdout.isatty() else Console(width=132)
    model, data, methods, output = (flags.pop(name) for name in ("model", "data", "method", "results_file"))
    prepared(output)
    settings = [None, *(parse_method(text) for text in methods or ())]
    options = Options(**{name: _value(name, value) for name, value in flags.items() if value is not None})
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(model, total=None)
        records = evaluate(
            model, data, settings, options, lambda done, total: progress.update(bar, completed=done, total=total)
        )
    if output is not None:
        output.write_text(json.dumps(records, indent=2), encoding="utf-8")
    print_records(records, console)


def _value(name: str, value: Any) -> Any:
    """Numbers and mappings that the command line gives as text."""
    kind = str(_FIELDS[name].type)
    if value is None or not isinstance(value, str):
        return value
    try:
        if "tuple" in kind:
            number = float if "float" in kind else int
            return tuple(number(part) for part in value.replace(",", " ").split())
        if "Mapping" in kind:
            parsed = yaml.safe_load("{" + value.replace("=", ": ") + "}")
            if not isinstance(parsed, dict):
                raise ValueError("not key=value")
            return parsed
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"--{name.replace('_', '-')} cannot be read: {value!r} ({error})") from error
    return value


def print_records(records: list[dict[str, Any]], console: Console) -> None:
    """A table of accuracies, and what was skipped."""
    first = records[0]
    table = Table(title=f"{first['model']}, {first['n']} images, {first['img_size']} px", caption="± standard error, paired")
    for i, column in enumerate(
        ("method", "top-1 %", "top-5 %", "vs unpatched", "agreement", "tokens out", "GMACs", "GFLOPs", "implied")
    ):
        table.add_column(column, justify="left" if i == 0 else "right")
    for record in records:
        m = record["metrics"]
        table.add_row(
            record["setting"],
            f"{m['top1']:.3f} ± {m['top1_stderr']:.3f}",
            f"{m['top5']:.3f}",
            f"{m['difference']:+.3f} ± {m['difference_stderr']:.3f}" if "difference" in m else "-",
            f"{m['agreement']:.1f} %" if "agreement" in m else "-",
            f"{record['tokens']['out']:.1f}",
            f"{record['gmacs']['model']:.3f}",
            f"{record['gflops']['model']:.3f}",
            f"{record['implied_speedup']:.2f}x",
        )
    console.print(table)
    for note in first["notes"]:
        console.print(f"- {note}")
    if first["num_skipped"]:
        console.print(f"- {first['num_skipped']} files were skipped:")
        for one in first["skipped"]:
            console.print(f"  {one['file']}: {one['reason']}")


_FIELDS = {field.name: field for field in dataclasses.fields(Options)}


def _help() -> dict[str, str]:
    """What the docstring of `Options` says about each field."""
    listed = inspect.cleandoc(Options.__doc__ or "").partition("Attributes:\n")[2]
    entries = re.findall(r"^    (\w+(?:, \w+)*): (.+?)(?=\n    \w|\Z)", listed, re.MULTILINE | re.DOTALL)
    return {name: " ".join(text.split()) for names, text in entries for name in names.split(", ")}


def _signature() -> inspect.Signature:
    """One keyword a field of `Options`, so that flag names and defaults are stated once."""
    parameters = {
        "model": Annotated[str, typer.Option("--model", "-m", help="timm model name")],
        "data": Annotated[Path, typer.Option("--data", "--data-dir", help="image folder")],
        "method": Annotated[list[str] | None, typer.Option("--method", "-M", help="name or name:key=value,...; repeatable")],
        "results_file": Annotated[Path | None, typer.Option("--results-file", help="JSON file for the records")],
    }
    made = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=annotation,
            default=inspect.Parameter.empty if name in ("model", "data") else None,
        )
        for name, annotation in parameters.items()
    ]
    about = _help()
    for name, field in _FIELDS.items():
        kind, default = str(field.type), field.default
        text = "tuple" in kind or "Mapping" in kind
        base = str if text else {"str": str, "bool": bool, "int": int, "float": float}[kind.split(" |")[0]]
        optional = text or "None" in kind
        flag = "--" + name.replace("_", "-")
        names = [flag, *([_SHORT[name]] if name in _SHORT else [])] if base is not bool else [f"{flag}/--no-{flag[2:]}"]
        annotation: Any = Annotated[base | None if optional else base, typer.Option(*names, help=about.get(name))]
        made.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                annotation=annotation,
                default=None if default is dataclasses.MISSING else default,
            )
        )
    return inspect.Signature(made)


evaluate_imagenet.__signature__ = _signature()  # type: ignore[attr-defined]
