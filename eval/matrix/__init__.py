"""The support matrix, and the oracles that every method is compared with."""
