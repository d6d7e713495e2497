"""`vtok demo`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from vtok.errors import ConfigError, MissingExtraError, brief, shown
from vtok.eval.common import terminal


def demo(
    images: Annotated[
        int | None, typer.Option("--images", "-n", min=2, max=10_000, help="pictures, and questions, at most")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="all pictures, questions and methods, and the small models too")] = False,
    out: Annotated[Path, typer.Option(help="folder for results; a second run goes on where the first stopped")] = Path(
        "results/demo"
    ),
    budgets: Annotated[str, typer.Option(help="shares of the FLOPs of the small ViT")] = "0.8,0.6,0.4",
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="of the small ViT")] = 100,
    control: Annotated[
        bool, typer.Option("--control", help="with --full, also: what each method's choice is worth on the small ViT")
    ] = False,
    clip: Annotated[bool, typer.Option(help="with --full, also: the bundled CLIP, zero-shot and retrieval")] = True,
    vqa: Annotated[bool, typer.Option(help="with --full, also: questions to the small LLaVA and LLaVA-NeXT")] = True,
) -> None:
    """Methods for encoders on a pretrained DINOv2, methods for prompts on a LLaVA above it: accuracy, cost, speed."""
    from vtok.eval.demo import encoders, prompts
    from vtok.eval.models.dinov2 import installed

    try:
        shares = tuple(float(b) for b in budgets.split(","))
    except ValueError:
        raise ConfigError(f"--budgets takes numbers such as 0.8,0.6,0.4, got {shown(budgets)}") from None
    if not all(0 < share <= 1 for share in shares):
        raise ConfigError(f"--budgets takes shares of the FLOPs in (0, 1], got {brief(budgets)}")

    def at_most(count: int) -> int | None:
        return images if full else count if images is None else min(images, count)

    console, small = terminal.output(100), full
    if not full and images is None:
        console.print("about seven minutes on two cores; a run that was stopped goes on where it was", style="dim")
    try:
        encoders.run_encoder_demo(out, at_most(encoders.DINOV2_PICTURES), full, console=console)
        prompts.run_scenes_demo(out, at_most(prompts.SCENE_QUESTIONS), full, console=console)
    except MissingExtraError as error:
        console.print(f"questions about scenes were left out: {error}", style=terminal.WARNING)
    except ConfigError as error:  # the encoder's weights come with a package
        if installed():
            raise
        small = True
        console.print(f"only the small models, for now: {error}", style=terminal.WARNING)
    if not small:
        return
    console = terminal.output()
    encoders.run_demo(out, at_most(1000), shares, console=console, batch_size=batch_size, control=control)
    if clip:
        counts = at_most(encoders.CLIP_PICTURES), at_most(encoders.CLIP_PAGES)
        _unless_missing("the CLIP part", console, encoders.run_clip_demo, out, *counts, encoders.CLIP_BUDGETS, None)
    if vqa:
        counts = at_most(prompts.QUESTIONS), at_most(prompts.PAGE_QUESTIONS)
        _unless_missing("the small LLaVA", console, prompts.run_vqa_demo, out, *counts)


def _unless_missing(what: str, console: Console, part: Callable[..., Any], *given: Any) -> None:
    """Runs a part of the demo, or says which extra it lacks."""
    try:
        part(*given, console=console)
    except MissingExtraError as error:
        console.print(f"{what} was left out: {error}", style=terminal.WARNING)
