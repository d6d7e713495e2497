"""Models for lmms-eval (0.7.3): its own wrappers of LLaVA, Qwen2.5-VL and Qwen3-VL, patched; see assets/docs/evaluate.md."""

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
