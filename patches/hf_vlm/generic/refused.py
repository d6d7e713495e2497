"""Vision-language models whose prompts cannot be shortened, and why."""

from __future__ import annotations


def _in(model: str) -> str:
    return f"transformers.models.{model}.modeling_{model}."


_CROSS = "its LLM attends to the image by cross-attention: visual tokens are no part of the prompt that could be shortened"
_MERGED = "it puts image features into the prompt itself, so that vtok is not told which columns are visual"
_SHARED = "later layers of its LLM share keys and values with earlier ones, which would have to hold the same tokens"
_LINEAR = "its LLM has convolutions over neighbouring tokens, and shortening its prompt has not been tested"
_CHUNKED = "its LLM attends within chunks of the prompt, whose borders dropped tokens would move"
_ENCODED = "its LLM is an encoder and a decoder: what is generated attends to the image, which is no part of it"

REFUSED: dict[str, str] = {
    _in("colqwen2") + "ColQwen2ForRetrieval": _MERGED,
    _in("florence2") + "Florence2Model": _ENCODED,
    _in("gemma3n") + "Gemma3nModel": _SHARED,
    _in("gemma4") + "Gemma4Model": _SHARED,
    _in("idefics") + "IdeficsModel": _CROSS,
    _in("lfm2_vl") + "Lfm2VlModel": _LINEAR,
    _in("llama4") + "Llama4ForConditionalGeneration": _CHUNKED,
    _in("mllama") + "MllamaModel": _CROSS,
    _in("pi0") + "PI0Model": _MERGED,
    _in("t5gemma2") + "T5Gemma2Model": _ENCODED,
}
