"""The choice of visual tokens for engines that serve vision-language models, and vtok inside vLLM. Needs torch alone.

    from vtok.serving import TokenChoice, VLMInfo, grid_layout

    choice = TokenChoice({"method": "divprune", "keep_tokens": 64}, VLMInfo("my model", 32, 4096, 32))
    layout = grid_layout(24, 24)
    choice.count(layout)  # 64, before any image has been seen
    kept = choice.choose(features, layout)  # features [B, 576, D]: kept.rows [B, 64], kept.tokens [B, 64, D]

`choose_tokens` does the same in one call. `settings` holds the name of a method and its parameters, as `vtok.patch` takes them.

An engine lays out prompts, and reserves memory for them, before an image is encoded, and keeps what it has encoded for the next
prompt that shows the same image. So a method can be served that chooses from an image alone, before the LLM, and of which
settings and grid say how many tokens stay: `uniform`, `random`, `downsample`, `divprune`, `todre` (its first stage), `cdpruner`
with `relevance="none"`, and where the vision tower can be looked into `fastervlm`, `vispruner`, `visionzip`, `holov` and
`prumerge` with `keep` or `keep_tokens`; of videos `evs` and `vidcom2`. `TokenChoice` refuses all others when it is made and
says why: inside the LLM all layers of a paged KV cache hold the same tokens (fastv, pyramiddrop, sparsevlm, dart, atp, todre's
second stage, which is left out where `probe` is not given), features of an image must not depend on a question (cdpruner's
relevance), and where the image decides how many tokens stay the prompt cannot be laid out (correlation, prumerge by
outliers).

The plug-in for vLLM (`vtok.serving.vllm_plugin`) registers itself when `vtok` is installed beside vLLM:

    pip install "vtok[vllm]"
    vllm serve llava-hf/llava-1.5-7b-hf --hf-overrides '{"vtok": {"method": "todre", "keep": 0.1}}'

`LLM(model, hf_overrides={"vtok": {...}})` is the same, and so is a key `"vtok"` in the model's config.json. Without the key
vLLM runs its own classes. The worker logs one line with the resolved settings; clients see fewer `usage.prompt_tokens`.

Served by vLLM 0.31 and 0.32, with images: LLaVA-1.5 (CLIP and SigLIP towers), LLaVA-NeXT, LLaVA-OneVision, InternVL as
transformers has it, Gemma 3, Idefics3, SmolVLM, Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5; with videos too: LLaVA-OneVision,
Qwen2-VL and Qwen2.5-VL. Qwen keeps the positions that tokens had (`positions="original"`), the others number the shorter
prompt anew (`"compact"`). `make test-vllm` compares greedy tokens with transformers and `vtok.prune_inputs` on the same tiny
random weights, in fp32 on a CPU: pictures of many sizes in a batch, several in a prompt, the same again, requests without
any, prefix cache on and off, chunks of a prompt that end inside and around images, blocks that run out, aborted requests; and
`vllm serve` under 1, 8 and 32 requests at once.

What to know:

* Nothing here was run on a GPU, with tensor or pipeline parallelism, torch.compile or published weights, nor compared in bf16,
  where a near tie may fall otherwise than in fp32; positions are exact (`vtok.serving.vllm_plugin.positions`).
* Gemma 3 lets the tokens of a tile attend to each other both ways; vLLM's build for CPUs does not, and was compared with
  transformers made to do the same. On GPUs vLLM finds the tokens that stay by their placeholders.
* Qwen3.5 was compared without its layers of linear attention, which vLLM runs on a CPU in bf16 alone, and so without a prefix
  cache; with them it was started in bf16, and answered with prompts as short as announced.
* SmolVLM's processor needs a package more: `pip install num2words`.
* Of Idefics3 and SmolVLM all tiles of an image compete, each image by itself (`prune_inputs` lets those of all images of a
  prompt); names of tiles between them are placeholders in the prompt, and come with the features.
* Videos of one batch may differ in length, which vLLM's own LLaVA-OneVision fails on. Text behind a video is numbered as vLLM
  numbers it, behind the last position in time, height or width; transformers 5.24 leaves time out.
* Among exact copies (newline tokens of LLaVA-NeXT and LLaVA-OneVision) todre and divprune keep one, and rounding says which.
* A picture with crops may be larger than the largest that vLLM foresees: beside a method for videos alone, which leaves
  pictures as they are, vLLM refuses it where `--max-num-batched-tokens` is smaller still, as it does without the key.
* vLLM counts budget and cache of its encoder in tokens that stay: as many times more pictures may enter the vision tower in one
  step. `--max-num-seqs` and `--max-num-batched-tokens` bound them.
* Refused in a sentence, most of it before anything is loaded: other releases and models, methods as above, other videos, a
  method that looks at the tower together with tensor parallelism or with features that a client sends, speculative decoding,
  LoRA on the tower, vLLM's own --video-pruning-rate on Qwen-VL, and prompts of Qwen-VL that end with an image or a video.
* The whole comparison was run with vLLM 0.32; with 0.31 one method each on LLaVA-1.5, Idefics3, Qwen2-VL and Qwen3-VL. vLLM
  0.30 calls its processors otherwise, and 0.33 has no build for CPUs: both are refused.
* Processes of one engine, and engines that share a cache, tell different settings apart by keys of cached images.
"""

from vtok.core.prompt import View, VLMInfo
from vtok.core.tower import TowerBlock, TowerFacts
from vtok.serving.choice import Kept, TokenChoice, choose_tokens
from vtok.serving.layouts import ImageLayout, frames_layout, grid_layout, packed_crops_layout, tiles_layout
from vtok.serving.tower import block_of

__all__ = [
    "ImageLayout",
    "Kept",
    "TokenChoice",
    "TowerBlock",
    "TowerFacts",
    "VLMInfo",
    "View",
    "block_of",
    "choose_tokens",
    "frames_layout",
    "grid_layout",
    "packed_crops_layout",
    "tiles_layout",
]
