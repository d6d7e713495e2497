"""`vtok tune`: finds a method's schedule at a FLOPs budget and compares it with the default."""

from __future__ import annotations

import inspect
import shlex
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from vtok.errors import ConfigError, shown
from vtok.eval.cli.flags import options_from, signature
from vtok.eval.common import terminal
from vtok.eval.options import TUNED, Plan, Source
from vtok.eval.runs.names import check_methods
from vtok.registry import METHODS


def tune(model: str, method: str, out: Path | None, **flags: Any) -> None:
    """Searches the schedule of a method at a FLOPs budget, compares it with the default on held-out images, writes a config.

    Every candidate costs what the default costs. No label is needed: by default candidates are ranked by how far the model's
    probabilities move (KL divergence to the unpatched model); of vision-language models those of the answer's first token.
    """
    check_methods([method])
    from vtok.eval.runs.methods import parse_method
    from vtok.eval.tune.models import prepared_subject
    from vtok.eval.tune.tuner import JOURNAL, Tuning

    console = terminal.output()
    plan, source = (
        options_from(kind, {name: value for name, value in flags.items() if name in {f.name for f in fields(kind)}})
        for kind in (Plan, Source)
    )
    name, params = parse_method(method)
    if "flops" in params:
        raise ConfigError(f"{shown(method)}: give the budget as --flops {params['flops']}")
    config = METHODS.get(name).create(**params)
    folder = out or Path("results") / f"tune-{model.replace('/', '-').replace(':', '-')}-{name}-{plan.flops:g}"
    made = prepared_subject(model, config, source)
    plan = replace(plan, objective=plan.objective or made.subject.objective)
    with terminal.progress(transient=True) as progress:
        bar = progress.add_task("", total=None)

        def advance(what: str, done: int, total: int) -> None:
            progress.update(bar, description=f"{what:<28}", completed=done, total=total)

        result = Tuning(made.subject, plan, made.calibration, made.held_out, folder, advance).run()
    if result.resumed:
        console.print(f"{folder / JOURNAL} held {result.resumed} candidates; none was repeated")
    _report(result, made, plan, folder, console)


def _report(result: Any, made: Any, plan: Plan, folder: Path, console: Any) -> None:
    """Tables to the console, files into the folder."""
    import vtok
    from vtok.eval.tune import report as tune_report
    from vtok.writing import write_beside

    winner = result.candidates[result.best]
    console.print(tune_report.table(result, made.subject, made.held_out))
    for note in (*made.calibration.notes, *made.held_out.notes):
        console.print(f"- {note}")
    verdict = tune_report.finding(result)
    default = result.candidates[0]
    console.print(
        f"- {len(result.candidates)} schedules at {default.fraction:.3f} of the FLOPs, {plan.objective} on "
        f"{default.samples} calibration samples: default {default.loss[0]:.4f}, best {winner.loss[0]:.4f}"
    )
    console.print(f"- {verdict}", highlight=False)
    costs = {name: held.cost["gmacs"] for name, held in result.held_out.items() if held.cost}
    macs = {name: cost["model"] + cost["pruner"] for name, cost in costs.items()}
    more = 100 * (macs["tuned"] / macs["default"] - 1)
    console.print(f"- on held-out samples the tuned schedule needs {more:+.1f} % MACs against the default")
    for name, number in (("default", 0), ("tuned", result.best)):
        console.print(f"- {name}: {tune_report.schedule(result.candidates[number].config)}", highlight=False)
        console.print(f"  tokens, block by block: {tune_report.tokens(result.held_out[name])}", highlight=False)
    about = (
        f"Written by: {shlex.join(['vtok', *sys.argv[1:]])}\n"
        f"{winner.fraction:.4f} of the unpatched model's FLOPs, the default has {result.candidates[0].fraction:.4f}.\n"
        f"On {made.held_out.name}: {verdict}."
    )
    path = write_beside(folder / "tuned.yaml", tune_report.run_file(result, made, plan, about, str(folder / "run")))
    tune_report.keep_records(folder / "results.jsonl", tune_report.records_of(result, made.subject, plan, made.held_out))
    made.subject.apply(winner.config)
    config = path.with_suffix(".json")  # of the same number
    vtok.save_config(made.subject.patched, config)
    made.subject.apply(None)
    console.print(f"- {path}: for `vtok run`; {config}: for vtok.patch(model, ...)", highlight=False)


_MODEL = f"{', '.join(TUNED)}, a timm name, or transformers:NAME of a VLM"
_METHOD = "name or name:key=value,...; what is given stays, e.g. ats:layers=[3,6]"
_OUT = "folder for results; a second run goes on where the first stopped"
_LEADING: dict[str, tuple[Any, Any]] = {
    "model": (Annotated[str, typer.Argument(help=_MODEL)], inspect.Parameter.empty),
    "method": (Annotated[str, typer.Argument(help=_METHOD)], inspect.Parameter.empty),
    "out": (Annotated[Path | None, typer.Option(help=_OUT)], None),
}
# typer reads a command's flags off its signature.
_FLAGS = {**signature(Plan, _LEADING).parameters, **signature(Source, {}).parameters}
tune.__signature__ = inspect.Signature(list(_FLAGS.values()))  # type: ignore[attr-defined]
