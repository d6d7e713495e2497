"""Tiny random vision-language models of every supported family, and prompts for them: for tests."""

from vtok.patches.hf_vlm.examples.models import VLMExample, prompts
from vtok.patches.hf_vlm.examples.pages import END, IMAGE, PAD, START
from vtok.patches.hf_vlm.examples.videos import VIDEO

__all__ = ["END", "IMAGE", "PAD", "START", "VIDEO", "VLMExample", "prompts"]
