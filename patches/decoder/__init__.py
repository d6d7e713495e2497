"""Hooks that shorten a prompt before a language model and between its layers."""
