"""Engines of vLLM in this process, and what they answer."""

import contextlib
import json
import os

import asked
import numpy as np
from cases import PROCESSED

os.environ.update({"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"})
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

COMMON = {
    "dtype": "float32",
    "max_model_len": 1024,
    "enforce_eager": True,
    "limit_mm_per_prompt": {"image": 2},
    "seed": 0,
    "distributed_executor_backend": "uni",
    "disable_log_stats": False,
    "block_size": 32,
    "max_num_seqs": 16,
}


@contextlib.contextmanager
def engine(folder, settings=None, **options):
    """A `vllm.LLM` of a tiny model; `settings` is what the key "vtok" holds."""
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    options = {**COMMON, **options}
    if folder.name in asked.CLIPS:
        options["limit_mm_per_prompt"] = {"image": 2, "video": 2}
    if folder.name in PROCESSED:
        options["mm_processor_kwargs"] = PROCESSED[folder.name]
    if settings is not None:
        options["hf_overrides"] = {"vtok": settings}
    llm = LLM(str(folder), **options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()  # now, not when the caller's name for it goes
        del llm
        cleanup_dist_env_and_memory()


def prompt(text, media):
    """As vLLM takes it; media: pictures, and clips as arrays."""
    pictures = [one for one in media if not isinstance(one, np.ndarray)]
    clips = [(one, {**asked.told(one), "do_sample_frames": False}) for one in media if isinstance(one, np.ndarray)]
    data = {name: found for name, found in (("image", pictures), ("video", clips)) if found}
    return {"prompt": text, "multi_modal_data": data} if data else {"prompt": text}


def ask(llm, requests, tokens=12):
    """Greedy answers to all requests at once: [{"prompt": length, "tokens": [...], "cached": tokens from the prefix cache}]."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    outputs = llm.generate([prompt(*one) for one in requests], greedy, use_tqdm=False)
    return [
        {"prompt": len(o.prompt_token_ids), "tokens": list(o.outputs[0].token_ids), "cached": o.num_cached_tokens or 0}
        for o in outputs
    ]


def differences(reference, got):
    """(request, what) of every answer that is not the reference's."""
    found = []
    for i, (a, b) in enumerate(zip(reference, got, strict=True)):
        if a["prompt"] != b["prompt"]:
            found.append((i, f"prompt of {b['prompt']} tokens instead of {a['prompt']}"))
        elif a["tokens"] != b["tokens"]:
            at = next(j for j, (x, y) in enumerate(zip(a["tokens"], b["tokens"])) if x != y)
            found.append((i, f"token {at} (margin {a['margins'][at]:.1e} of {min(a['margins']):.1e})"))
    return found


def reference(folder, case):
    """What transformers and `vtok.prune_inputs` answered."""
    return json.loads((folder / f"{case}.json").read_text())


def preemptions(llm):
    """How often the engine took blocks away from a request."""
    return sum(metric.value for metric in llm.get_metrics() if metric.name.startswith("vllm:num_preemptions"))
