"""What may be shortened: language models between whose layers tokens may leave (before the first, always), and caches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vtok.errors import StateError, UnsupportedModelError
from vtok.patches.decoder.kv_cache import CACHES, cache_in, cached_length, unknown, vouch
from vtok.patches.decoder.masks import shares
from vtok.patches.protocol import qualified_name


def _in(model: str) -> str:
    return f"transformers.models.{model}.modeling_{model}."


# LLMs whose layers are known to take gathered masks, positions and rotary tables.
TEXT_MODELS = frozenset(
    {
        _in("gemma") + "GemmaModel",
        _in("gemma2") + "Gemma2Model",
        _in("gemma3") + "Gemma3TextModel",
        _in("llama") + "LlamaModel",
        _in("mistral") + "MistralModel",
        _in("qwen2") + "Qwen2Model",
        _in("qwen2_5_vl") + "Qwen2_5_VLTextModel",
        _in("qwen2_vl") + "Qwen2VLTextModel",
        _in("qwen3") + "Qwen3Model",
        _in("qwen3_vl") + "Qwen3VLTextModel",
    }
)


# The same of models that no row describes.
GENERIC_TEXT_MODELS = frozenset(
    {
        _in("aria") + "AriaTextModel",
        _in("cohere_compass") + "CohereCompassTextModel",
        _in("cosmos3_edge") + "Cosmos3EdgeTextModel",
        _in("deepseek_ocr2") + "DeepseekOcr2TextModel",
        _in("emu3") + "Emu3TextModel",
        _in("ernie4_5_vl_moe") + "Ernie4_5_VLMoeTextModel",
        _in("glm4v") + "Glm4vTextModel",
        _in("glm4v_moe") + "Glm4vMoeTextModel",
        _in("glm_ocr") + "GlmOcrTextModel",
        _in("granite4_vision") + "Granite4VisionTextModel",
        _in("granite_docling") + "GraniteDoclingTextModel",
        _in("hyperclovax") + "HyperCLOVAXModel",
        _in("molmo2") + "Molmo2TextModel",
        _in("paddleocr_vl") + "PaddleOCRTextModel",
        _in("qwen2_5_omni") + "Qwen2_5OmniThinkerTextModel",
        _in("qwen3_omni_moe") + "Qwen3OmniMoeThinkerTextModel",
        _in("qwen3_vl_moe") + "Qwen3VLMoeTextModel",
        _in("step3p7") + "Step3p7TextModel",
    }
)
# The same, where queries and keys are not made as in Llama: no positions in some layers, another norm or none in front, a norm
# behind the rotation, one projection for both, a latent. The layer itself says what they are.
OWN_ATTENTION = frozenset(
    {
        _in("apertus1p5") + "Apertus1p5TextModel",
        _in("cohere2") + "Cohere2Model",
        _in("deepseek_v3") + "DeepseekV3Model",
        _in("exaone4") + "Exaone4Model",
        _in("gemma4") + "Gemma4TextModel",
        _in("gemma4_unified") + "Gemma4UnifiedTextModel",
        _in("hunyuan_vl") + "HunYuanVLTextModel",
        _in("lfm2") + "Lfm2Model",
        _in("lfm3") + "Lfm3Model",
        _in("muse_glimmer") + "MuseGlimmerTextModel",
        _in("muse_spark") + "MuseSparkTextModel",
        _in("persimmon") + "PersimmonModel",
        _in("qwen3_5") + "Qwen3_5TextModel",
        _in("qwen3_5_moe") + "Qwen3_5MoeTextModel",
    }
)
_OWN = {name.rpartition(".")[0] for name in OWN_ATTENTION}
# Kinds of layers that any token may be missing from. Those that carry something from one token to the next read what is left
# of the sequence, as they would read a prompt of that length.
_FORGETS = {"full_attention", "sliding_attention", "mlp", "moe", "linear_attention", "conv"}


def why_not_between(text: Any) -> str | None:
    """Why tokens cannot leave between the layers of an LLM, or `None` if they can."""
    config = text.config
    odd = sorted(set(getattr(config, "layer_types", None) or ()) - _FORGETS)
    if odd:
        return f"its LLM has layers of type {', '.join(odd)}, which count stored tokens or choose among them"
    if getattr(config, "num_kv_shared_layers", 0) and not any(shares(layer) for layer in text.layers):
        return "layers of its LLM share keys and values, and none says that it does"
    if getattr(config, "altup_num_inputs", 1) > 1:
        return "its LLM carries several hidden states of every token (AltUp) from layer to layer"
    if not any(hasattr(layer, "self_attn") for layer in text.layers):
        return "none of its LLM's layers has an attention of the name self_attn, by which vtok finds it"
    if not any(qualified_name(cls) in TEXT_MODELS | GENERIC_TEXT_MODELS | OWN_ATTENTION for cls in type(text).__mro__):
        return f"its LLM, {qualified_name(type(text))}, is not among those whose layers vtok has been tested with"
    return None


def has_own_attention(attention: Any) -> bool:
    """Whether the attention of a decoder layer is that of an LLM of `OWN_ATTENTION`."""
    return any(cls.__module__ in _OWN for cls in type(attention).__mro__)


def final_norm_of(text: Any) -> Any:
    """The last norm of an LLM, or `None`."""
    return getattr(text, "norm", getattr(text, "final_layernorm", None))


def counts_columns(text: Any) -> bool:
    """Whether an LLM measures something in columns that positions must agree with, so that what is left of a prompt is numbered
    anew, as if it had been that short: attention within chunks, whose borders are every so many columns, and sparse attention
    that finds a query's own block by its position. (A recurrent state takes no positions: those of the layers between may stay
    as they were.)
    """
    return not {"chunked_attention", "minimax_m3_sparse"}.isdisjoint(getattr(text.config, "layer_types", None) or ())


def check_padding(text: Any, padded: bool) -> None:
    """Raises if rows of a short prompt are padded and an LLM is wrong about padding: it compares positions, which leave padding
    out, with slots.
    """
    if padded and "minimax_m3_sparse" in (getattr(text.config, "layer_types", None) or ()):
        raise UnsupportedModelError(
            f"rows of this batch differ in what is left of them, and {type(text).__name__} takes padding for tokens in its "
            "sparse attention; pass one prompt at a time"
        )


def stated_number(config: Any, name: str) -> int | None:
    """A number that a config states for all its layers, or `None`: some have one for each."""
    if name in (getattr(config, "per_layer_attributes", None) or ()):
        return None
    value = getattr(config, name, None)
    return value if isinstance(value, int) else None


def check_kind(kwargs: Mapping[str, Any]) -> None:
    """Raises if a call that would shorten its prompt brings a store of tokens that cannot hold a shortened one."""
    if cache_in(kwargs) is None and any(kwargs.get(name) is not None for name in CACHES):
        raise UnsupportedModelError(
            "images were passed with a store of tokens that is no transformers Cache (continuous batching keeps those of many "
            "requests side by side) and cannot hold a shortened prompt; use generate(), or vtok.prune_inputs"
        )


def check_origin(kwargs: Mapping[str, Any], generating: bool) -> None:
    """Raises if a cache that holds text may be one that a shortened prompt filled and that lost what was known of it.

    Args:
        kwargs: of a call of a patched model. A 2-D mask says how many tokens the caller knows of.
        generating: whether generate() made the call: it counts what is stored, so that its mask is no evidence.

    Raises:
        StateError: it may be.
    """
    cache = cache_in(kwargs)
    if not unknown(cache) or cached_length(cache) == 0:
        return
    mask, count, known = kwargs.get("attention_mask"), cached_length(cache), 0
    x = kwargs.get("inputs_embeds") if kwargs.get("input_ids") is None else kwargs["input_ids"]
    if isinstance(mask, Tensor) and mask.ndim == 2 and x is not None:
        known = mask.shape[1] - x.shape[1]
    sliding, layers = list(getattr(cache, "is_sliding", ())), range(len(getattr(cache, "layers", ())))
    counts = [i for i in layers if hasattr(cache.layers[i], "get_seq_length")]  # a recurrent state does not
    lengths = sorted({cached_length(cache, i) for i in counts if not (i < len(sliding) and sliding[i])})
    if len(lengths) > 1:
        found = f"its layers hold {lengths[0]} to {lengths[-1]} tokens"
    elif generating or known <= 0:
        found = f"nothing says how many tokens its {count} stand for"
    elif known > count and not getattr(cache, "is_compileable", False):
        found = f"it holds {count} tokens where attention_mask has {known}"
    else:
        return vouch(cache)
    raise StateError(
        f"the cache was not filled by this patched model, or was rebuilt from its tensors, and {found}: visual tokens may have "
        "been dropped from it; pass the cache that the model returned or a deep copy of it, or read the prompt anew"
    )
