"""Trains ATP's modules: `python -m vtok.eval.training.atp`; what it asks and learns from is in `train.py`."""
