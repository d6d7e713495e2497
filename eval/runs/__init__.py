"""Runs as data: YAML files that name a model, methods and tasks, and what runs them."""
