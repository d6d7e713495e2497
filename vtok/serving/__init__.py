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
nothing of vLLM is changed. The worker logs one line with the resolved settings; clients see fewer `usage.prompt_tokens`.
"""

from vtok.core.prompt import View, VLMInfo
from vtok.core.tower import TowerBlock, TowerFacts
from vtok.serving.choice import Kept, TokenChoice, choose_tokens
from vtok.serving.layouts import ImageLayout, frames_layout, grid_layout, packed_crops_layout
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
]
