"""Vision-language models whose prompts cannot be shortened, and why."""

from __future__ import annotations


def _in(model: str) -> str:
    return f"transformers.models.{model}.modeling_{model}."


_CROSS = "its LLM attends to the image by cross-attention: visual tokens are no part of the prompt that could be shortened"
_MERGED = "it puts image features into the prompt itself, so that vtok is not told which columns are visual"
_ENCODED = "its LLM is an encoder and a decoder: what is generated attends to the image, which is no part of it"
_DIFFUSED = "what it generates attends to keys and values of a prompt that another model read, and counts them"
_APART = "it hands over every patch as an image of its own, of which no token could leave"
_FRONT = "it puts the image in front of the prompt itself and marks no columns of it by a placeholder"
_MARKED = "it marks the image by a mask over the prompt, not by a placeholder, and a few latent queries stand for all of it"
_QUERIES = "its Q-Former has made a few tokens of every image already, whatever its size"
_ONE = "merging and decoder layers are one module: there is no LLM of its own that could be given a shorter prompt"
_BLIND = "it is a language model alone, whose prompts hold no image"

# Class -> why; nothing in a model that holds one of these is patched.
REFUSED: dict[str, str] = {
    _in("chameleon") + "ChameleonModel": _ONE,
    _in("colqwen2") + "ColQwen2ForRetrieval": _MERGED,
    _in("diffusion_gemma") + "DiffusionGemmaModel": _DIFFUSED,
    _in("evolla") + "EvollaModel": _CROSS,
    _in("florence2") + "Florence2Model": _ENCODED,
    _in("idefics") + "IdeficsModel": _CROSS,
    _in("inkling") + "InklingModel": _APART,
    _in("mllama") + "MllamaModel": _CROSS,
    _in("pi0") + "PI0Model": _MERGED,
    _in("t5gemma2") + "T5Gemma2Model": _ENCODED,
}

# Class -> why its prompts stay as they are; a vision encoder inside may still be patched by methods that act there.
UNPROMPTED: dict[str, str] = {
    _in("blip") + "BlipForConditionalGeneration": _CROSS,
    _in("blip_2") + "Blip2ForConditionalGeneration": _QUERIES,
    _in("git") + "GitModel": _FRONT,
    _in("instructblip") + "InstructBlipForConditionalGeneration": _QUERIES,
    _in("instructblipvideo") + "InstructBlipVideoForConditionalGeneration": _QUERIES,
    _in("kosmos2") + "Kosmos2ForConditionalGeneration": _MARKED,
    _in("kosmos2_5") + "Kosmos2_5ForConditionalGeneration": _MARKED,
    _in("mistral4") + "Mistral4Model": _BLIND,
    _in("pix2struct") + "Pix2StructForConditionalGeneration": _ENCODED,
    _in("pp_formulanet") + "PPFormulaNetModel": _ENCODED,
    _in("udop") + "UdopForConditionalGeneration": _ENCODED,
    _in("vision_encoder_decoder") + "VisionEncoderDecoderModel": _ENCODED,
}
