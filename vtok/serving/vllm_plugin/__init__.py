"""vtok inside vLLM, as a plug-in of the entry-point group `vllm.general_plugins`. See `vtok.serving`.

    vllm serve llava-hf/llava-1.5-7b-hf --hf-overrides '{"vtok": {"method": "todre", "keep": 0.1}}'

vLLM calls `register` in every process. Models whose config has no key "vtok" get vLLM's own classes; others a subclass that
asks for as many placeholders as tokens will stay, and hands the LLM these. Caches of encoded images and of prompts are keyed by
the settings too, so that none is ever mixed up.

Releases and models that were not run are refused in a sentence, and so are: speculative decoding, LoRA on the vision tower,
features of images that a client sends (`image_embeds`) with a method that looks at the tower, and tensor parallelism with such
a method. bf16 and fp16 are served; where two tokens score nearly alike another one may stay than in fp32. Importing this
package imports neither vLLM nor transformers.
"""

from vtok.serving.vllm_plugin.plugin import RELEASES, register

__all__ = ["RELEASES", "register"]
