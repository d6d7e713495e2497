"""Trains the reference LLaVA-NeXT of pages: `python -m vtok.eval.training.pages --export assets`."""
