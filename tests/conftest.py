"""Nothing in the tests may reach the network or use more than its share of the cores."""

import gc
import os
from importlib.util import find_spec

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

from vtok.patches.hf_vlm.families import OLDEST, release

# lmms-eval has an environment of its own (`make test-lmms`).
collect_ignore = [] if find_spec("lmms_eval") else ["lmms", "helpers_lmms.py"]

# So has vLLM (`make test-vllm`). A folder of that name beside this file is no package: only a file counts.
if getattr(find_spec("vllm"), "origin", None) is None:
    collect_ignore.append("vllm")

# Vision-language models need a younger transformers than vision encoders; older ones are refused (test_errors_files.py).
if release() < OLDEST:
    collect_ignore_glob = [
        "*test_atp*.py", "*test_correlation_vlm*.py", "*test_decoder_soft.py", "*test_prompt_bench.py", "*test_question_*.py",
        "*test_readme.py", "*test_reference_*.py", "*test_tower_taps.py", "*test_train_*.py", "*test_tune_prompts.py",
        "*test_upstream.py", "*test_vlm_*.py", "*test_vqa_demo.py", "*test_vqa_resume.py", "*test_vqa_task.py",
    ]  # fmt: skip

# The tests of other files that need one.
_VLM_TESTS = (
    "test_launch.py::test_a_killed_process_ends_the_run_and_the_next_one_goes_on",
    "test_matrix.py::test_every_cell_of_a_vision_language_model",
    "test_matrix.py::test_notes_of_vision_language_models_are_said_once",
    "test_matrix.py::test_prompts_are_those_that_a_method_takes",
    "test_matrix.py::test_the_check_of_vision_language_models_notices",
    "test_report_parts.py::test_questions_are_drawn_with_what_is_left_of_their_tokens",
    "test_runner.py::test_records_of_questions",
)


def pytest_collection_modifyitems(items):
    if release() < OLDEST:
        needed = ".".join(map(str, OLDEST))
        for item in items:
            if item.nodeid.split("[")[0].endswith(_VLM_TESTS):
                item.add_marker(pytest.mark.skip(reason=f"vision-language models need transformers {needed}"))


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def _short_collections():
    """What is alive before a file's tests stays so: the collector, which would look through all imported libraries and all
    tests each time, leaves it out. Half of the time of tests that make many objects went there."""
    gc.collect()
    gc.freeze()
