"""Patches that leave in front of a packed vision tower (the Qwen-VL family), by their pixels alone."""
