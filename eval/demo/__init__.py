"""The main job: every method on the reference models, beside random, uniform and unpatched."""
