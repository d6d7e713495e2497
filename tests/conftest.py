"""Nothing in the tests may reach the network or use more than its share of the cores."""

import os
from importlib.util import find_spec

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

from vtok.patches.hf_vlm import OLDEST, release

# lmms-eval has an environment of its own (`make test-lmms`).
collect_ignore = [] if find_spec("lmms_eval") else ["lmms", "helpers_lmms.py"]

# Vision-language models need a younger transformers than vision encoders; older ones are refused (tests/test_errors.py).
if release() < OLDEST:
    collect_ignore_glob = [
        "test_atp*.py", "test_correlation_vlm.py", "test_decoder_soft.py", "test_prompt_bench.py", "test_reference_*.py",
        "test_tower_taps.py", "test_train_*.py", "test_vlm_*.py", "test_vqa_demo.py", "test_vqa_task.py",
    ]  # fmt: skip


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)
