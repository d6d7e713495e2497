"""Prompts that are more than one text with images: several samples in a row, embeddings, later turns, what rides along."""
