"""The main job: methods for encoders on a pretrained DINOv2 and for prompts on a LLaVA, beside random; and smaller models."""
