"""Tiny models, and what transformers answers on them: worked out once, by vtok's own environment, on the same saved weights.

VTOK_REFERENCE_PYTHON names the Python of that environment (`make test-vllm` sets it): vLLM pins a release of transformers that
is older than what vtok needs for vision-language models. VTOK_VLLM_FOLDER keeps models and answers for the next run.
"""

import os
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Name of a tiny model -> its folder, with the reference answers in it."""
    kept = os.environ.get("VTOK_VLLM_FOLDER")
    base = Path(kept) if kept else tmp_path_factory.mktemp("vllm")
    ready = set()

    def folder(name):
        if name not in ready:
            python = os.environ.get("VTOK_REFERENCE_PYTHON")
            if not python:
                pytest.fail("VTOK_REFERENCE_PYTHON is not set: run `make test-vllm`, or name the Python of vtok's environment")
            missing = _missing(base, name)
            if missing:
                environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
                command = [python, str(HERE / "reference.py"), str(base), name, *missing]
                done = subprocess.run(command, env=environment, capture_output=True, text=True)
                assert done.returncode == 0, done.stderr[-3000:]
            ready.add(name)
        return base / name

    return folder


def _missing(base, name):
    from cases import CASES

    return [case for case in CASES[name] if not (base / name / f"{case}.json").exists()]
