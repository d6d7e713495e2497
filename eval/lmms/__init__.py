"""Models for lmms-eval (0.7.3): its own wrappers of LLaVA, Qwen2.5-VL and Qwen3-VL, patched by vtok.

`pip install "vtok[lmms]"` is all there is to set up; lmms-eval finds the models by the entry point `lmms_eval.models`:

    lmms-eval --model vtok_llava_hf --tasks gqa,pope,mme,textvqa_val --batch_size 1 --log_samples --output_path logs \\
        --model_args pretrained=llava-hf/llava-1.5-7b-hf,method=todre,keep=0.1
    lmms-eval --model vtok_qwen2_5_vl --model_args pretrained=Qwen/Qwen2.5-VL-7B-Instruct,method=uniform,keep=0.25 ...
    lmms-eval --model vtok_qwen3_vl --model_args pretrained=Qwen/Qwen3-VL-8B-Instruct,method=none ...

On several GPUs every process holds the model and answers its share of the questions:

    accelerate launch --num_processes 8 -m lmms_eval --model vtok_llava_hf --model_args ... --tasks ...

Without a GPU add `--device cpu`, and `device_map=cpu` to the arguments of the Qwen models and, if there are several processes
(`accelerate launch --cpu --num_processes 2 ...`), to those of LLaVA.

Arguments besides those of lmms-eval's class of the same name, which pass through:

* `method=todre`: what to patch. `method=none` is the unpatched model, measured in the same way: the baseline.
* `keep=0.1` and so on: parameters of the method, lists as `layers=[1,2]`.
* `method=pitome+todre`: several methods together. A parameter goes to the one that has it, or is written behind it:
  `method=pitome:ratio=0.9+todre:keep=0.1`, in quotes if that contains a comma.
* `method=folder/vtok.json`: a patch that `vtok.save_config` wrote.
* `flops=0.6`: a budget instead, solved for the prompt `prompt={images: 1, text_tokens: 64}`.
* `positions=compact`: as for `vtok.patch`.
* `calibration=16`: for methods that lack a number (`correlation`), which is found on the images of the first 16 questions; with
  several processes, on those of the first one, for all.

A wrong method or parameter is an error before the model is loaded; lmms-eval prints it, and ends with exit code 0 all the same
unless `--verbosity DEBUG` is given. `--force_simple` takes the simple classes, as for the originals. lmms-eval asks LLaVA one
question at a time: `--batch_size` is 1 there.

What the logs hold, in lmms-eval's own files under `--output_path`:

* `<date>_samples_<task>.jsonl` (`--log_samples`): `token_counts` of every sample has `input_tokens` of the prompt as the
  processor made it, `output_tokens`, `visual_tokens` in the prompt, `kept_tokens` (visual tokens that entered each decoder
  layer), `kv_bytes` of the prompt, `ttft_ms`, `decode_ms_per_token` and `elapsed_ms` (of the batch), `batch_size`, `gmacs`
  until the first token of the model as patched, of the unpatched one and of the reduction (`null` without a method), and
  `error` if the model failed and the harness counts an empty answer. (A failure at the first prompt, and what vtok itself
  refuses, ends the run.) Samples that come out of `--use_cache` have no counts; of several answers to a question
  (`--repeats`) the harness logs the counts of the first one.
* `<date>_results.json`: under `throughput` the harness's totals, and the means `avg_visual_tokens`, `avg_kept_tokens` (over
  layers and questions), `avg_ttft_ms`, `avg_decode_ms_per_token` (both without the first batch, which warms up) and
  `avg_failed`, the number of questions that failed; of the first process if there are several.

`python -m vtok.eval.lmms.task FOLDER` writes the bundled LLaVA and a task of easy-VQA's questions, to try all this offline.
"""

from __future__ import annotations

from typing import Any

MODELS = {"vtok_llava_hf": "LlavaHf", "vtok_qwen2_5_vl": "Qwen25VL", "vtok_qwen3_vl": "Qwen3VL"}


def manifests() -> list[Any]:
    """What lmms-eval's registry asks for: a `ModelManifest` a model, whose classes are imported when one is used."""
    from lmms_eval.models.registry_v2 import ModelManifest

    home = "vtok.eval.lmms.models"
    return [
        ModelManifest(name, simple_class_path=f"{home}.{cls}Simple", chat_class_path=f"{home}.{cls}")
        for name, cls in MODELS.items()
    ]
