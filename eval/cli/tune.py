"""`vtok tune`: finds a method's schedule at a FLOPs budget and compares it with the default."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import vtok
from vtok.errors import ConfigError, shown
from vtok.eval.common import terminal
from vtok.eval.common.checked import MOST
from vtok.eval.runs import loader as runs
from vtok.eval.tune import report as tune_report
from vtok.eval.tune.models import BUNDLED, Source, prepared_subject
from vtok.eval.tune.result import Plan
from vtok.eval.tune.score import OBJECTIVES
from vtok.eval.tune.tuner import JOURNAL, Tuning
from vtok.registry import METHODS
from vtok.writing import write_beside


def tune(
    model: Annotated[str, typer.Argument(help=f"{', '.join(BUNDLED)}, a timm name, or transformers:NAME of a VLM")],
    method: Annotated[str, typer.Argument(help="name or name:key=value,...; what is given stays, e.g. ats:layers=[3,6]")],
    flops: Annotated[float, typer.Option(help="share of the unpatched model's FLOPs to leave")],
    data: Annotated[str | None, typer.Option("--data", help="image folder (of a VLM: questions, see `vtok eval vqa`)")] = None,
    held_out: Annotated[
        str | None, typer.Option("--held-out", help="others to compare on (default: the rest of --data)")
    ] = None,
    search: Annotated[
        str, typer.Option(help="tpe learns from earlier candidates; halving and random do not, and random drops none early")
    ] = "tpe",
    candidates: Annotated[int, typer.Option("--candidates", "-n", min=2, help="schedules, the default among them")] = 48,
    images: Annotated[int | None, typer.Option(min=1, help="to calibrate on (default: 400, or what there is)")] = None,
    held_out_images: Annotated[int | None, typer.Option(min=2, help="images to compare on (default: all there are)")] = None,
    objective: Annotated[str | None, typer.Option(help=f"{', '.join(OBJECTIVES)}; default: kl, of embeddings distance")] = None,
    eta: Annotated[int, typer.Option(min=2, help="halving: the best 1 / eta go on")] = 3,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1)] = 100,
    seed: Annotated[int, typer.Option(min=0, max=MOST, help="of candidates and of the choice of images")] = 0,
    out: Annotated[Path | None, typer.Option(help="folder for results; a second run goes on where the first stopped")] = None,
    pretrained: Annotated[bool, typer.Option(help="load pretrained weights")] = True,
    checkpoint: Annotated[str, typer.Option(help="file with weights of a timm model")] = "",
    num_classes: Annotated[int | None, typer.Option(min=1, help="of a timm model")] = None,
    class_map: Annotated[str, typer.Option(help="file that maps folder names to classes")] = "",
    workers: Annotated[int, typer.Option("--workers", "-j", min=0)] = 4,
    device: Annotated[str | None, typer.Option()] = None,
) -> None:
    """Searches the schedule of a method at a FLOPs budget, compares it with the default on held-out images, writes a config.

    Every candidate costs what the default costs. No label is needed: by default candidates are ranked by how far the model's
    probabilities move (KL divergence to the unpatched model); of vision-language models those of the answer's first token.
    """
    console = terminal.output()
    name, params = runs.parse_method(method)
    if "flops" in params:
        raise ConfigError(f"{shown(method)}: give the budget as --flops {params['flops']}")
    config = METHODS.get(name).create(**params)
    folder = out or Path("results") / f"tune-{model.replace('/', '-').replace(':', '-')}-{name}-{flops:g}"
    source = Source(
        data,
        held_out,
        images,
        held_out_images,
        seed,
        pretrained,
        checkpoint,
        num_classes,
        class_map,
        workers,
        batch_size,
        device,
    )
    made = prepared_subject(model, config, source)
    plan = Plan(flops, search, candidates, eta, objective or made.subject.objective, seed, batch_size)
    with terminal.progress(transient=True) as progress:
        bar = progress.add_task("", total=None)

        def advance(what: str, done: int, total: int) -> None:
            progress.update(bar, description=f"{what:<28}", completed=done, total=total)

        result = Tuning(made.subject, plan, made.calibration, made.held_out, folder, advance).run()
    if result.resumed:
        console.print(f"{folder / JOURNAL} held {result.resumed} candidates; none was repeated")
    _report(result, made, plan, folder, console)


def _report(result: Any, made: Any, plan: Plan, folder: Path, console: Console) -> None:
    """Tables to the console, files into the folder."""
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
