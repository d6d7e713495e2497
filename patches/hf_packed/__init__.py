"""Vision towers of Hugging Face transformers that run the patches of all images as one sequence (the Qwen-VL family)."""
