"""`vtok bench-growth`: time and memory of every method as the tokens grow."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vtok.eval.common import terminal


def bench_growth(
    tokens: Annotated[
        list[int] | None, typer.Option(min=4, help="patches of an image; repeatable (default: 256, 1024, 4096, 16384)")
    ] = None,
    visual: Annotated[
        list[int] | None, typer.Option(min=4, help="visual tokens; repeatable (default: 576, 2880, 8192, 32768)")
    ] = None,
    width: Annotated[int, typer.Option(min=6, help="of the encoder, whose 6 heads share it")] = 384,
    calls: Annotated[int, typer.Option(min=1, help="timed calls of each")] = 3,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads (default: torch's)")] = None,
    plot: Annotated[Path | None, typer.Option(help="file of a picture")] = None,
    markdown: Annotated[bool, typer.Option(help="print the tables as GitHub markdown")] = False,
) -> None:
    """Times every method at growing numbers of tokens, beside the attention that it saves."""
    import torch

    from vtok.errors import ConfigError
    from vtok.eval.benchmarks import growth

    if width % growth.HEADS:
        raise ConfigError(f"--width {width} is shared by {growth.HEADS} heads and must be a multiple of it")
    if threads is not None:
        torch.set_num_threads(threads)
    with terminal.bar("encoders") as advance:
        inside = growth.measure_encoders(sorted(tokens or growth.TOKENS), width, calls, progress=advance)
    with terminal.bar("prompts") as advance:
        before = growth.measure_prompts(sorted(visual or growth.VISUAL), calls=calls, progress=advance)
    tables = [
        growth.table(inside, "attention", f"inside encoders: {growth.DEPTH} blocks of width {width}"),
        growth.table(before, "a 7B prefill", "among visual tokens, a tenth stays"),
    ]
    for one in tables:
        if markdown:
            print(one.markdown(), end="\n\n")
        else:
            terminal.output(130).print(one)
    for r in (*inside, *before):
        if r.refused:
            print(f"{r.method} at {r.tokens} tokens: {r.refused}")
    if plot is not None:
        growth.plot([("inside encoders", inside), ("among visual tokens", before)], plot)
