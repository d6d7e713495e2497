"""`vtok methods`, `plan` and `export`: what is known or written of a model and a method without timing anything."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

import vtok
from vtok.errors import ConfigError
from vtok.eval.cli.flags import SETTING_HELP, Images, TextTokens
from vtok.eval.common import terminal
from vtok.eval.runs.names import check_methods, find
from vtok.registry import METHODS

console = terminal.output()


def methods() -> None:
    """Lists the methods with their parameters and defaults."""
    from vtok.eval.report.tables import Table

    rows = []
    for name in METHODS:
        cls = METHODS.get(name)
        defaults = ", ".join(f"{k}={v}" for k, v in cls().to_dict().items() if k != "method")
        about = (sys.modules[cls.__module__].__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")
        rows.append((name, cls.__name__, defaults, about))
    console.print(Table.plain(("method", "config class", "parameters and defaults", "what it does"), rows, 4))


def plan(
    model: Annotated[str, typer.Argument(help="as for bench; or, without a method, a run (see `vtok configs`)")],
    method: Annotated[list[str] | None, typer.Argument(help="as for bench")] = None,
    img_size: Annotated[int | None, typer.Option(help="input size in pixels")] = None,
    images: Images = 1,
    text_tokens: TextTokens = 64,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size", "-b", min=1, help="encoders: time passes for about a second, and foresee the speed-up at it"
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="with --batch-size (default: cpu)")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="with --batch-size: CPU threads (default: torch's)")] = None,
) -> None:
    """Tokens and MACs per block and the implied speed-up of methods on a model, before anything runs."""
    check_methods(method)
    if not method:
        find(model)
    from vtok.eval.benchmarks.throughput import threads_set
    from vtok.eval.common.settings import to_device
    from vtok.eval.models.by_name import load_model
    from vtok.eval.published import tables as published
    from vtok.eval.runs import loader as runs
    from vtok.targets import vlm_targets

    if batch_size is None and not (device is None and threads is None):
        raise ConfigError("--device and --threads go with --batch-size, for which passes are timed")
    if not method:
        if batch_size is not None:
            raise ConfigError("--batch-size goes with a model and methods; the speed of a run is measured by vtok run")
        if img_size is not None:
            raise ConfigError("--img-size goes with a model and methods; of a run say it in its options")
        for found in published.plans(runs.load(model), prompt={"images": images, "text_tokens": text_tokens}):
            console.print(str(found), highlight=False, soft_wrap=True)
            console.print()
        return
    net = load_model(model, img_size=img_size, meta=True)
    if batch_size is not None:
        if vlm_targets(net):
            raise ConfigError("--batch-size is for vision encoders; vtok bench times prompts")
        net = to_device(load_model(model, img_size=img_size), device=device)  # passes need weights, random ones will do
    prompt = {"images": images, "text_tokens": text_tokens} if vlm_targets(net) else None
    with threads_set(threads):
        for text in method:
            chosen = runs.parse_setting(text)
            named, params = chosen if isinstance(chosen, tuple) else (chosen, {})
            found = vtok.plan(net, named, prompt=prompt, batch_size=batch_size, **params)
            console.print(str(found), highlight=False, soft_wrap=True)
            console.print()


def write_onnx(
    model: Annotated[str, typer.Argument(help="a timm name, open_clip:NAME, transformers:NAME, reference(-clip, -dinov2)")],
    method: Annotated[str, typer.Argument(help=f"{SETTING_HELP}; unpatched: the model as it is")],
    out: Annotated[Path, typer.Argument(help="the .onnx file")],
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "-b", min=1, help="of the file (default: any batch size)")
    ] = None,
    img_size: Annotated[int | None, typer.Option(help="input size in pixels")] = None,
    pretrained: Annotated[bool, typer.Option(help="load pretrained weights")] = True,
    opset: Annotated[int | None, typer.Option(help="version of ONNX's operators (default: that of vtok.export)")] = None,
    check: Annotated[bool, typer.Option(help="run the file in onnxruntime against the model")] = True,
    seed: Annotated[int, typer.Option(min=0, help="of random weights")] = 0,
) -> None:
    """Writes a vision encoder with a method in it as an ONNX file, for onnxruntime, OpenVINO and others.

    The token counts are fixed; a method whose counts depend on the image is refused.
    """
    check_methods([] if method == "unpatched" else [method])
    import torch

    from vtok import export
    from vtok.eval.common.settings import Setting
    from vtok.eval.models.by_name import load_model, sample_images
    from vtok.eval.runs import loader as runs
    from vtok.writing import apart

    apart([out], [model])
    net = load_model(model, pretrained, img_size, seed)
    images = sample_images(model, net, batch_size or 2, seed)
    if method != "unpatched":
        net = Setting.of(runs.parse_setting(method)).apply(net, (images.shape[1], images.shape[2], images.shape[3]))
    with torch.no_grad():
        file = export.onnx(net, images, out, dynamic_batch=batch_size is None, opset=opset or export.OPSET, check=check)
    terminal.output().print(str(file), highlight=False, soft_wrap=True)
