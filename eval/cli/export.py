"""`vtok export`: a patched encoder as an ONNX file, checked in onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vtok.eval.cli.flags import SETTING_HELP
from vtok.eval.common import terminal
from vtok.eval.runs.names import check_methods


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
