"""Vision-language models: methods on their prompts and in their vision towers."""
