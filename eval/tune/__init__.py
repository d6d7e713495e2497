"""Searches the schedule of a method at a FLOPs budget."""
