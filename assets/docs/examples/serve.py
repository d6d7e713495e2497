"""Serve with fewer visual tokens: in vLLM, or in an engine of your own, which asks for the choice alone.

python serve.py                                             # the choice, as an engine asks for it; torch is all it needs
python serve.py --vllm llava-hf/llava-1.5-7b-hf cat.jpg     # vLLM (pip install "vtok[vllm]"), offline batch
vllm serve llava-hf/llava-1.5-7b-hf --hf-overrides '{"vtok": {"method": "todre", "keep": 0.1}}'   # vLLM, a server
"""

import argparse

import torch

from vtok.serving import TokenChoice, VLMInfo, grid_layout

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("image", nargs="?", help="a picture, for vLLM")
parser.add_argument("--vllm", metavar="MODEL", help="a LLaVA of Hugging Face, run by vLLM")
parser.add_argument("--method", default="todre")
parser.add_argument("--keep", type=float, default=0.1)
parser.add_argument("--question", default="What is this?")
args = parser.parse_args()
settings = {"method": args.method, "keep": args.keep}

if args.vllm:
    from PIL import Image
    from vllm import LLM, SamplingParams

    llm = LLM(args.vllm, hf_overrides={"vtok": settings})
    prompt = {
        "prompt": f"USER: <image>\n{args.question} ASSISTANT:",
        "multi_modal_data": {"image": Image.open(args.image).convert("RGB")},
    }
    (result,) = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=32))
    print(f"{len(result.prompt_token_ids)} tokens in the prompt: {result.outputs[0].text.strip()}")
else:
    choice = TokenChoice(settings, VLMInfo("LLaVA-1.5-7B", depth=32, width=4096, num_heads=32))
    layout = grid_layout(24, 24)  # 576 visual tokens
    print(f"of 576 visual tokens {choice.count(layout)} stay, known before an image is seen: the prompt is laid out for these")
    torch.manual_seed(0)
    features = torch.randn(2, 576, 4096)  # what the connector returns for two images
    kept = choice.choose(features, layout)
    print(
        f"rows of the first image: {kept.rows[0, :8].tolist()} ...; features for the language model: {tuple(kept.tokens.shape)}"
    )
