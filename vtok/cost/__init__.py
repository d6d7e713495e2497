"""Closed-form costs of encoders and of prompts, and the setting that a FLOPs budget chooses."""
