"""The reference, in vtok's own environment: PYTHON reference.py FOLDER MODEL [CASE ...]

Saves a tiny model and, for each case, FOLDER/MODEL/CASE.json: greedy tokens of transformers' generate() on prompts that
`vtok.prune_inputs` shortened, one request at a time.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import asked
import numpy as np
import torch
from cases import APART, CASES, CAUSAL, POSITIONS, PROCESSED
from tiny import BUILDERS
from transformers import AutoModelForImageTextToText, AutoProcessor

import vtok

TOKENS = 12


def answer(model, processor, text, pictures, settings, positions, told=None, causal=False, mark=None, tokens=TOKENS):
    """{"prompt": its length, "unpruned": before, "tokens": the answer, "margins": of every token over the second best}"""
    images, clips = ([one for one in pictures if isinstance(one, np.ndarray) is kind] or None for kind in (False, True))
    seen = (
        {}
        if clips is None
        else {"videos": clips, "video_metadata": [asked.told(one) for one in clips], "do_sample_frames": False}
    )
    inputs = processor(images=images, text=text, return_tensors="pt", **seen, **(told or {}))
    before = inputs["input_ids"].shape[1]
    if settings and pictures:
        params = {name: value for name, value in settings.items() if name != "method"}
        if mark is None:
            inputs = vtok.prune_inputs(model, inputs, settings["method"], positions=positions, **params)
        else:
            inputs = apart(model, processor, text, pictures, mark, settings["method"], params)
    if causal:
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    length = inputs["input_ids"].shape[1]
    with torch.no_grad():
        got = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=tokens,
            eos_token_id=[],
            output_scores=True,
            return_dict_in_generate=True,
        )
    margins = [float(a - b) for a, b in (s[0].topk(2).values.tolist() for s in got.scores)]
    return {"prompt": length, "unpruned": before, "tokens": got.sequences[0, length:].tolist(), "margins": margins}


def apart(model, processor, text, pictures, mark, method, params):
    """A prompt whose images were pruned one by one: every one with the text in front of it, the last with that behind too."""
    *fronts, end = text.split(mark)
    texts = [f"{front}{mark}" for front in fronts]
    texts[-1] += end
    parts = [
        vtok.prune_inputs(
            model, processor(images=[image], text=one, return_tensors="pt"), method, positions="compact", **params
        )
        for one, image in zip(texts, pictures, strict=True)
    ]
    first = parts[0]
    features = [x for part in parts for x in part["mm_encoder_outputs"]["image"].pooler_output]
    first["mm_encoder_outputs"]["image"].pooler_output = [torch.cat(features)]
    for name in ("input_ids", "attention_mask"):
        first[name] = torch.cat([part[name] for part in parts], 1)
    first["position_ids"] = torch.arange(first["input_ids"].shape[1])[None]
    return first


def main():
    torch.set_num_threads(1)
    folder, name, *only = Path(sys.argv[1]), *sys.argv[2:]
    target = folder / name
    if not (target / "config.json").exists():
        BUILDERS[name](target)
    model, report = AutoModelForImageTextToText.from_pretrained(target, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"], report
    processor = AutoProcessor.from_pretrained(target)
    for case in only or CASES[name]:
        how = CASES[name][case], POSITIONS.get(name, "compact"), PROCESSED.get(name), name in CAUSAL
        how = (*how, asked.MARKS[name][0] if name in APART else None)
        found = [answer(model.eval(), processor, *one, *how) for one in asked.of(name)]
        (target / f"{case}.json").write_text(json.dumps(found))
        print(name, case, len({tuple(one["tokens"]) for one in found}), "different answers of", len(found))


if __name__ == "__main__":
    main()
