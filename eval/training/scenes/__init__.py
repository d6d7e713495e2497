"""Trains the reference LLaVA of scenes: `python -m vtok.eval.training.scenes --export assets`."""
