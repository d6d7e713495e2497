"""`vtok bench`, `bench-select`, `bench-growth` and `bench-suite`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import vtok
from vtok.errors import ConfigError, unknown
from vtok.eval.cli.flags import Images, TextTokens
from vtok.eval.common import terminal
from vtok.eval.runs.names import check_methods

console = terminal.output()

Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads (default: torch's)")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="of whatever is random")]


def bench(
    model: Annotated[
        str,
        typer.Argument(
            help="a timm name, open_clip:NAME, transformers:NAME, reference, reference-clip, reference-dinov2, "
            "reference-llava(-next), reference-scenes, reference-print"
        ),
    ],
    method: Annotated[
        list[str], typer.Argument(help="name or name:key=value,..., e.g. tome:r=13 or pitome:flops=0.6; several together: A+B")
    ],
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1)] = 16,
    pairs: Annotated[int, typer.Option(help="unpatched/patched pairs of timed batches")] = 20,
    threads: Threads = None,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16")] = "fp32",
    device: Annotated[str | None, typer.Option()] = None,
    img_size: Annotated[int | None, typer.Option()] = None,
    pretrained: Annotated[
        bool, typer.Option(help="load pretrained weights (they change what data-dependent methods keep)")
    ] = False,
    memory: Annotated[bool, typer.Option(help="measure peak memory, one child process a setting")] = True,
    profile: Annotated[bool, typer.Option(help="profile the share of the reduction step")] = True,
    output: Annotated[Path | None, typer.Option("--json", help="file for the results")] = None,
    markdown: Annotated[bool, typer.Option(help="print the table as GitHub markdown")] = False,
    compiled: Annotated[
        str | None, typer.Option("--compile", help="torch.compile all models first: default, reduce-overhead, max-autotune")
    ] = None,
    dynamic: Annotated[bool, typer.Option("--dynamic", help="with --compile: one graph for every batch size")] = False,
    beside: Annotated[
        list[str] | None,
        typer.Option(
            help="another program in the same rounds: tome:r=13@FOLDER or pitome:ratio=0.9@FOLDER of its checkout, or "
            "NAME:key=value@FILE.py that defines change(model, key); repeatable"
        ),
    ] = None,
    runtime: Annotated[str, typer.Option(help="torch; or, of files that are exported, onnxruntime or openvino")] = "torch",
    seed: Seed = 0,
    images: Images = 1,
    text_tokens: TextTokens = 64,
    new_tokens: Annotated[int, typer.Option(min=2, help="vision-language models: tokens of an answer")] = 16,
) -> None:
    """Times patched models against the unpatched one, interleaved in one run, beside what their MACs imply.

    Of vision-language models it times prefill, first token and decoding, whose steps alone --compile compiles (peak memory
    and the profiler are for encoders).
    """
    check_methods(method)
    from vtok.eval.benchmarks import result as bench_result
    from vtok.eval.benchmarks.compiled import RUNTIMES, Compiler, measure_exported
    from vtok.eval.benchmarks.prefill import measure_prompts
    from vtok.eval.benchmarks.programs import parse_beside
    from vtok.eval.benchmarks.throughput import measure
    from vtok.eval.models.architectures import sample_prompts
    from vtok.eval.models.by_name import load_model, sample_images
    from vtok.eval.runs import loader as runs
    from vtok.targets import vlm_targets
    from vtok.writing import write

    runs.prepared(output, [model, *method])
    if runtime not in (torch_alone := "torch", *RUNTIMES):
        raise unknown("runtime", runtime, [torch_alone, *RUNTIMES])
    if dynamic and compiled is None:
        raise ConfigError("--dynamic goes with --compile MODE")
    how = None if compiled is None else Compiler(compiled, True if dynamic else None)
    others = parse_beside(beside or [])
    net = load_model(model, pretrained, img_size, seed)
    if how is not None and runtime in RUNTIMES:
        raise ConfigError("--compile is for models that torch runs; leave it out")
    if runtime in RUNTIMES and (dtype != "fp32" or device not in (None, "cpu") or vlm_targets(net)):
        raise ConfigError(f"--runtime {runtime} times vision encoders in fp32 on the CPU; leave it out for anything else")
    if others and (runtime in RUNTIMES or vlm_targets(net)):
        raise ConfigError("--beside is for vision encoders that torch runs; leave it out")
    common: dict[str, Any] = {"pairs": pairs, "dtype": dtype, "device": device, "threads": threads, "name": model, "seed": seed}
    settings = [runs.parse_setting(text) for text in method]
    results: Any
    with terminal.bar("timing, in rounds", pairs) as common["progress"]:
        if vlm_targets(net):
            inputs = sample_prompts(net, batch_size, vtok.Prompt(images, text_tokens), seed)
            results = measure_prompts(net, inputs, settings, new_tokens=new_tokens, compiler=how, **common)
        elif runtime in RUNTIMES:
            exported = {key: common[key] for key in ("pairs", "threads", "name", "seed", "progress")}
            pictures = sample_images(model, net, batch_size, seed)
            results = measure_exported(net, pictures, settings, runtime=runtime, **exported)
        else:
            pictures = sample_images(model, net, batch_size, seed)
            results = measure(net, pictures, settings, memory=memory, profile=profile, compiler=how, beside=others, **common)
    if output is not None:
        write(output, bench_result.to_json(results))
    if markdown:
        print(bench_result.markdown(results))
    else:
        console.print(bench_result.table(results))


def bench_select(
    tokens: Annotated[int, typer.Option(min=2, help="visual tokens of an image")] = 2880,
    keep: Annotated[int, typer.Option(min=1, help="how many stay")] = 288,
    width: Annotated[int, typer.Option(min=1, help="of a token")] = 1024,
    pairs: Annotated[int, typer.Option(min=1, help="pairs of a call and a loop; 5 or more for an interval")] = 5,
    threads: Threads = None,
    every_method: Annotated[
        bool, typer.Option("--every-method", help="instead: the choice of every method, its share of a 7B prefill, its memory")
    ] = False,
    views: Annotated[int, typer.Option(min=1, help="crops of the image, or frames, with --every-method")] = 5,
    video: Annotated[bool, typer.Option("--video", help="views are frames, with --every-method")] = False,
    device: Annotated[str, typer.Option(help="with --every-method")] = "cpu",
    selector: Annotated[list[str] | None, typer.Option(help="only this one; repeatable (default: all)")] = None,
    seed: Seed = 0,
) -> None:
    """Times the choice of diverse tokens against loops that go step by step; or the choice of every method."""
    import torch

    from vtok.eval.benchmarks import selection as select_bench
    from vtok.eval.benchmarks import selectors

    if keep > tokens:
        raise ConfigError(f"--keep {keep} of --tokens {tokens}: at most all of them can stay")
    if threads is not None:
        torch.set_num_threads(threads)
    if every_method:
        prompt = selectors.Synthetic.of(tokens, views, width, video, seed, device)
        with terminal.bar("timing") as advance:
            chosen = selectors.measure(selectors.configs(keep / tokens), prompt, pairs, advance)
        console.print(selectors.table(chosen, prompt))
        for line in selectors.refusals(chosen):
            console.print(f"- {line}", highlight=False)
        return
    with terminal.bar("timing") as advance:
        results = select_bench.measure(tokens, keep, width, pairs, seed, advance, selector or ())
    console.print(select_bench.table(results, tokens, keep, width))


def bench_growth(
    tokens: Annotated[
        list[int] | None, typer.Option(min=4, help="patches of an image; repeatable (default: 256, 1024, 4096, 16384)")
    ] = None,
    visual: Annotated[
        list[int] | None, typer.Option(min=4, help="visual tokens; repeatable (default: 576, 2880, 8192, 32768)")
    ] = None,
    width: Annotated[int, typer.Option(min=6, help="of the encoder, whose 6 heads share it")] = 384,
    calls: Annotated[int, typer.Option(min=1, help="timed calls of each")] = 3,
    threads: Threads = None,
    plot: Annotated[Path | None, typer.Option(help="file of a picture")] = None,
    markdown: Annotated[bool, typer.Option(help="print the tables as GitHub markdown")] = False,
) -> None:
    """Times every method at growing numbers of tokens, beside the attention that it saves."""
    import torch

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


def bench_suite(
    suite: Annotated[str, typer.Argument(help="a suite that comes with vtok (gpu), or a YAML file")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="folder of results.jsonl and table.md")] = None,
    minutes: Annotated[float | None, typer.Option(min=0, help="after so many no further benchmark is begun")] = None,
    device: Annotated[str | None, typer.Option(help="default: the GPU, if there is one")] = None,
) -> None:
    """Runs a list of benchmarks; a second start goes on where the first stopped. Prints one table of all."""
    from vtok.eval.benchmarks import suite as suites

    console = terminal.output(160)
    benchmarks = suites.load(suite)
    folder = out or Path("results") / "bench" / Path(suite).stem
    records, left = suites.run(benchmarks, folder, device, minutes, lambda text: console.print(text, highlight=False))
    if records:
        console.print(suites.table(records))
    for line in left:
        console.print(f"not run: {line}", highlight=False, soft_wrap=True)
    console.print(f"results.jsonl and table.md are in {folder}", highlight=False)
    if not records or any("minutes were over" not in line for line in left):
        raise typer.Exit(2)
